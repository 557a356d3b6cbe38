"""One holder at a time: by the kernel, and by leases where the kernel's locks fail without a word."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lit_llm.config.problems import InputError
from lit_llm.store import locks, mounts
from lit_llm.store.locks import VARIABLE, Busy, is_locked, locked
from lit_llm.store.mounts import check_leases_work, is_network_mount, kernel_locks_work
from lit_llm.store.store import Store
from tests.store.other_hosts import NETWORK_DISK, Hosts, hosts

__all__ = ["hosts"]
NAME = "0123456789abcdef"
DAY = 86400.0


def store_with(root: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A new store of a kind of locks."""
    monkeypatch.setenv(VARIABLE, kind)
    store = Store(root).open()
    monkeypatch.delenv(VARIABLE)
    return store


@pytest.fixture(params=["kernel", "lease:30"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return store_with(tmp_path / "store", request.param, monkeypatch)


# --- one holder ----------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_free_at_once_when_its_process_is_killed(store: Store, hosts: Hosts) -> None:
    path = store.stage(NAME).folder / "lock"
    assert not is_locked(path)
    process = hosts.start(
        "import sys; from pathlib import Path; from lit_llm.store.locks import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
        path,
        disk={},
    )
    assert process.line() == "held"
    assert is_locked(path)
    with pytest.raises(Busy, match=r"lock is held by another process"), locked(path):
        pass
    process.kill()
    assert not is_locked(path)
    with locked(path, patience=math.inf):
        assert is_locked(path)
        with pytest.raises(Busy), locked(path):
            pass
    assert not is_locked(path)


def test_a_lock_is_freed_after_an_error(store: Store) -> None:
    with pytest.raises(KeyError), locked(store.root / "lock"):
        raise KeyError
    assert not is_locked(store.root / "lock")


CLAIMS = """
import os, sys, time
from lit_llm.store import locks, store
from lit_llm.store.claims import last_claim
from lit_llm.store.store import Store
locks.POLL, store.PATIENCE = 0.002, 60.0
stage, inside, overlaps, mine = Store(sys.argv[1]).stage(sys.argv[2]), sys.argv[1] + "/inside", 0, []
print("ready", flush=True)
sys.stdin.readline()
for _ in range(100):
    with stage.claim():
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            overlaps += 1
        mine.append(last_claim(stage.folder).generation)
        time.sleep(0.001)
        try:
            os.unlink(inside)
        except FileNotFoundError:
            overlaps += 1
print(overlaps, *mine, flush=True)
"""


@pytest.mark.parametrize("kind", ["kernel", "lease:5"])
def test_two_hosts_that_claim_a_stage_200_times_hold_it_one_at_a_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    """With kernel locks that are granted to all, the same count finds overlaps: it can."""
    store = store_with(tmp_path / "store", kind, monkeypatch)
    ahead, behind = (
        hosts.start(CLAIMS, store.root, NAME, host=host, skew=skew)
        for host, skew in (("ahead", 5 * 3600), ("behind", -DAY))
    )
    assert [ahead.line(), behind.line()] == ["ready", "ready"]
    for process in (ahead, behind):
        assert process.popen.stdin is not None
        process.popen.stdin.write("go\n")
        process.popen.stdin.flush()
    counts = [list(map(int, process.line().split())) for process in (ahead, behind)]
    if kind == "kernel":
        assert sum(overlaps for overlaps, *_ in counts) > 0
        return
    assert [overlaps for overlaps, *_ in counts] == [0, 0]
    assert sorted(generation for _, *mine in counts for generation in mine) == list(range(1, 201))


# --- leases of holders that died ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [DAY, -DAY])
def test_a_dead_holder_of_another_host_is_succeeded_after_its_lease(
    skew: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    """Judged by the looker's own clock: the holder's may be a day ahead or behind."""
    stage = store_with(tmp_path / "store", "lease:1", monkeypatch).stage(NAME)
    lock = stage.folder / "lock"
    holder = hosts.holder(stage.store.root, NAME, host="another", skew=skew)
    began = time.monotonic()
    while time.monotonic() - began < 1.5:  # its heart beats
        assert is_locked(lock)
        time.sleep(0.1)
    holder.kill()
    killed = time.monotonic()
    assert is_locked(lock)
    assert stage.status()["state"] == "running"
    with locked(lock, patience=20):
        assert 0.5 < time.monotonic() - killed < 10
    assert stage.status()["state"] == "interrupted"


def test_looking_at_a_lease_shows_in_time_that_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    """A look takes no lock and changes no file."""
    stage = store_with(tmp_path / "store", "lease:1", monkeypatch).stage(NAME)
    hosts.holder(stage.store.root, NAME, host="another").kill()
    before = (stage.folder / "lock").stat()
    deadline = time.monotonic() + 10
    while is_locked(stage.folder / "lock"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    after = (stage.folder / "lock").stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_the_lease_of_a_dead_process_of_this_host_is_taken_over_at_once_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    store = store_with(tmp_path / "store", "lease:300", monkeypatch)
    hosts.holder(store.root, NAME, host="node7").kill()
    assert store.stage(NAME).status()["state"] == "running"  # here it could still live
    hosts.holder(store.root, NAME, host="node7")


def test_a_slower_successor_puts_the_new_lease_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its look and its rename another process has taken the lease over."""
    store = store_with(tmp_path / "store", "lease:30", monkeypatch)
    path = store.root / "lock"
    with locked(path):
        state = locks._state(path)
        assert state is not None
        looks = iter([(0, 0, 0), state])
        monkeypatch.setattr(locks, "_state", lambda _: next(looks))
        assert not locks._put_aside(path, (0, 0, 0))
        monkeypatch.undo()
        assert path.stat().st_ino == state[0]
        assert [file.name for file in store.root.iterdir() if ".ended." in file.name] == []


# --- the kind of a store -------------------------------------------------------------------------------------------


def kind_in(root: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((root / "store.json").read_text())
    return content


def test_a_store_where_the_kernel_grants_a_lock_twice_has_leases(tmp_path: Path, hosts: Hosts) -> None:
    code = "import sys; from lit_llm.store.store import Store; Store(sys.argv[1]).open(); print('done', flush=True)"
    assert hosts.start(code, tmp_path / "good", disk={}).line() == "done"
    assert hosts.start(code, tmp_path / "bad", disk=NETWORK_DISK).line() == "done"
    assert kind_in(tmp_path / "good") == {"schema": 1, "locks": "kernel"}
    assert kind_in(tmp_path / "bad") == {"schema": 1, "locks": "lease", "lease_seconds": 60.0}


@pytest.mark.parametrize(
    ("kind", "network"),
    [("ext4", False), ("xfs", False), ("overlay", False), ("fuseblk", False), ("nfs4", True), ("lustre", True),
     ("fuse.sshfs", True), ("9p", True), ("cifs", True)],
)  # fmt: skip
def test_the_mount_of_a_store_decides_by_its_type(
    kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [("/", "ext4"), (str(tmp_path.parent), "nfs" if kind == "ext4" else "ext4"), (str(tmp_path), kind)]
    partitions = [SimpleNamespace(mountpoint=point, fstype=fstype) for point, fstype in parts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: partitions)
    assert is_network_mount(tmp_path / "store") is network
    Store(tmp_path / "store").open()
    assert kind_in(tmp_path / "store")["locks"] == ("lease" if network else "kernel")


def test_an_old_store_has_kernel_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store.json").write_text('{"schema": 1}')
    assert locks.locks_of(tmp_path / "stages" / NAME / "lock").kind == "kernel"
    monkeypatch.setattr(locks, "choose_locks", lambda _: pytest.fail("asked"))
    Store(tmp_path).open()


def test_the_kind_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(tmp_path / "store", "lease:7", monkeypatch)
    assert locks.locks_of(store.root / "studies" / "a" / "lock") == locks.Locks("lease", 7.0)
    (store.root / "store.json").unlink()
    assert locks.locks_of(store.root / "stages" / NAME / "lock") == locks.Locks("lease", 7.0)


@pytest.mark.parametrize("words", ["flock", "lease:", "lease:0", "lease:-1", "lease:x", "lease:inf", "kernel:3"])
def test_an_unknown_kind_is_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, words)
    if words == "lease:":
        assert locks.forced_locks() == locks.Locks("lease")
        return
    with pytest.raises(InputError, match=r"LIT_LLM_LOCKS: is '.*'; write kernel, lease or lease:SECONDS"):
        Store(tmp_path / "store").open()


def test_another_kind_than_the_store_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store").open()
    monkeypatch.setenv(VARIABLE, "lease")
    with pytest.raises(InputError, match=r"all processes must agree; unset the variable"):
        store.check()


@pytest.mark.parametrize("content", ['"locks": "flock"', '"locks": "lease", "lease_seconds": 0', '"locks": ["lease"]'])
def test_a_store_with_unknown_locks_is_damaged(content: str, tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text(f'{{"schema": 1, {content}}}')
    with pytest.raises(InputError, match="is damaged"):
        Store(tmp_path).check()


def test_a_disk_on_which_no_lock_works_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *mode, **more: real(path, flags & ~os.O_EXCL, *mode, **more))
    with pytest.raises(InputError, match=r"without locks, and without what leases need \(it creates a file twice\)"):
        check_leases_work(tmp_path)
    monkeypatch.setenv(VARIABLE, "lease")
    with pytest.raises(InputError, match="choose another"):
        Store(tmp_path / "store").open()
    assert list((tmp_path / "store").iterdir()) == []


def test_the_test_of_kernel_locks_finds_a_disk_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts._kernel_locks_work.cache_clear()
    try:
        assert kernel_locks_work(tmp_path)
        mounts._kernel_locks_work.cache_clear()

        def absent(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", absent)
        assert not kernel_locks_work(tmp_path)
    finally:
        mounts._kernel_locks_work.cache_clear()
    assert list(tmp_path.iterdir()) == []
