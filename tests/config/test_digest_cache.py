"""A large file is hashed once, and again as soon as anything about it has changed."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_llm.config import hashing as module
from lit_llm.config.hashing import digest_of_file

SIZE = 1 << 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/lit-llm/digests"


@pytest.fixture
def reads(monkeypatch):
    """The files that were read through."""
    found, real = [], hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", lambda file, name: found.append(file.name) or real(file, name))
    return found


def write(path, content, age=60.0):
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_an_untouched_file_is_read_once(tmp_path, cache, reads):
    path = write(tmp_path / "a", b"x" * SIZE)
    expected = hashlib.sha256(b"x" * SIZE).hexdigest()
    assert [digest_of_file(path) for _ in range(3)] == [expected] * 3
    assert len(reads) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "same time", "other file", "size"])
def test_a_file_that_was_changed_is_read_again(tmp_path, cache, change):
    path = write(tmp_path / "a", b"x" * SIZE)
    digest_of_file(path)
    stamp, new = path.stat().st_mtime_ns, b"y" * (SIZE + (change == "size"))
    if change == "other file":
        write(tmp_path / "b", new)
        os.replace(tmp_path / "b", path)
    else:
        path.write_bytes(new)
    os.utime(path, ns=(stamp, stamp + (change == "content")))
    assert digest_of_file(path) == hashlib.sha256(new).hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path, cache, reads):
    """Its clock may not have moved on when it is written again."""
    path = write(tmp_path / "a", b"x" * SIZE, age=1.0)
    digest_of_file(path), digest_of_file(path)
    assert len(reads) == 2
    assert not cache.exists()


def test_small_files_leave_no_trace(tmp_path, cache):
    digest_of_file(write(tmp_path / "a", b"x" * (SIZE - 1)))
    assert not cache.exists()


@pytest.mark.parametrize("broken", ["", "{", "[]", "{}", '{"file": 1}', "\x00"])
def test_a_broken_note_is_written_anew(tmp_path, cache, reads, broken):
    path = write(tmp_path / "a", b"x" * SIZE)
    digest_of_file(path)
    (note,) = cache.iterdir()
    note.write_text(broken)
    assert [digest_of_file(path), digest_of_file(path)] == [hashlib.sha256(b"x" * SIZE).hexdigest()] * 2
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a directory cannot be made in it
    path = write(tmp_path / "a", b"x" * SIZE)
    assert digest_of_file(path) == hashlib.sha256(b"x" * SIZE).hexdigest()


def test_without_a_setting_it_lies_in_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for value in ("", "relative"):  # the XDG specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert module.user_cache() == Path("/home/somebody/.cache/lit-llm")


def test_processes_at_once_agree_and_leave_one_note(tmp_path, cache):
    path = write(tmp_path / "a", b"x" * 5 * SIZE)
    code = "import sys; from pathlib import Path; from lit_llm.config.hashing import digest_of_file as d; "
    code += "print(*{d(Path(sys.argv[1])) for _ in range(20)})"
    command = [sys.executable, "-c", code, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate()[0].strip() for process in running} == {hashlib.sha256(b"x" * 5 * SIZE).hexdigest()}
    assert len(list(cache.iterdir())) == 1
