"""What tests share: a small corpus, a store, and studies that train in a blink."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

from lit_llm.launch.devices import has_gpu
from lit_llm.runs.worker import preloaded
from lit_llm.store.store import Store
from lit_llm.tracking import mlflow_database
from lit_llm.tracking.address import resolved, sqlite_address
from tests.equal_budgets import budgets_allowed
from tests.two_stages import ARMS_OF_TWO_STAGES

for _signal, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        # A shell that started the tests in the background, or `nohup`, has them and all that they start ignore it.
        signal.signal(_signal, _default)

# Processes that tests start compile the package once, also where Python is told to write no bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

WORDS = "the a of to in is that it was for on as with his they be at one have this from or had by hot but".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for minutes begins first, and the others run beside it."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


def pytest_collection_finish() -> None:
    """Exempt what lives until this process ends from garbage collections, which torch and statsmodels begin often."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def own_user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the user's cache or writes into it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's migrations take seconds: each fresh database of this process is a copy of the first one."""
    migrate, whole = mlflow_database._migrate, tmp_path_factory.mktemp("mlflow") / "whole.db"

    def copied(address: str) -> None:
        if not whole.exists():
            migrate(sqlite_address(work := whole.with_name("new.db")))
            work.rename(whole)
        shutil.copyfile(whole, resolved(address)[1] or "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_database, "_migrate", copied)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_fork_server() -> Iterator[None]:
    """Let the fork server of this process import what studies and sweeps need, whichever test starts it."""
    set_preload = forkserver.set_forkserver_preload

    def set_larger_preload(modules: list[str]) -> None:
        set_preload([*modules, *(name for name in preloaded() if name not in modules)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "set_forkserver_preload", set_larger_preload)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 documents of random common words, about 75 kB; the same for everybody."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    for number in range(48):
        (folder / f"{number:02}.txt").write_text(" ".join(words.choices(WORDS, k=400)))
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store for a whole test process: opening MLflow's database takes seconds, once."""
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def small_base(corpus: Path) -> str:
    """The `base` of a study whose runs take a tenth of a second of training."""
    return f"""
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training:
      {{max_steps: 12, schedule: {{warmup_steps: 2}}, stability: {{logit_every: 4}}, execution: {{log_every: 4}}}}
    validation: {{times: 3, sequences: 8}}
"""


@pytest.fixture
def write_sweep(tmp_path: Path, small_base: str) -> Callable[..., Path]:
    """Write a sweep of arms that train in a blink: write_sweep("name", "space: {...}", trials=4) -> its path.

    allow_budgets: with a reason, so that arms may cost what they cost.
    """

    def write(
        name: str, rest: str, trials: int = 4, extends: str | None = "redllm-tiny", allow_budgets: bool = True
    ) -> Path:
        path = tmp_path / f"{name}.yaml"
        text = f"sweep: {name}\nextends: {extends}\nbase: {small_base}\n{rest}\ntrials: {trials}\n"
        path.write_text(budgets_allowed(text) if allow_budgets else text)
        return path

    return write


@pytest.fixture
def write_study(tmp_path: Path, small_base: str) -> Callable[..., Path]:
    """Write a study: write_study("name", "arms: {...}", seeds=[0]) -> its path.

    allow_budgets: with a reason, so that arms may cost what they cost.
    """

    def write(
        name: str,
        rest: str,
        seeds: Sequence[int] = (0,),
        extends: str | None = "redllm-tiny",
        allow_budgets: bool = True,
    ) -> Path:
        path = tmp_path / f"{name}.yaml"
        head = f"study: {name}\nquestion: Does it hold?\n"
        if extends is not None:  # else `rest` has its own
            head += f"extends: {extends}\nbase: {small_base}\n"
        text = f"{head}{rest}\nseeds: {list(seeds)}\n"
        path.write_text(budgets_allowed(text) if allow_budgets else text)
        return path

    return write


@pytest.fixture
def write_two(tmp_path: Path, write_study: Callable[..., Path]) -> Callable[..., Path]:
    """write_two("name", rest, seeds): a study whose base has a finetuning and an evaluation after both stages."""
    path = tmp_path / "sums.jsonl"
    pairs = [(a, b) for a in range(12) for b in range(12)]
    lines = [
        {"inputs": f"{a}+{b}=", "targets": f"{a + b}", "task": "even" if (a + b) % 2 == 0 else "odd"} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(
        name: str, rest: str = ARMS_OF_TWO_STAGES, seeds: Sequence[int] = (0, 1), tuning: str = "max_steps: 8"
    ) -> Path:
        file = write_study(name, rest, seeds)
        tuned = f"""
  finetune:
    data: {{examples: {{kind: jsonl, files: ["{path}"]}}, task: task, input_length: 8, target_length: 4, batch_size: 4,
            validation_fraction: 0.3}}
    training: {{{tuning}, schedule: constant, optimizer: {{lr: 1e-2}}, dropout: 0.1, execution: {{log_every: 2}}}}
    validation: {{times: 2, examples: 20}}
  evaluate: {{examples: {{examples: 25}}}}
"""
        text = file.read_text().replace(
            "validation: {times: 3, sequences: 8}\n", f"validation: {{times: 3, sequences: 8}}{tuned}"
        )
        file.write_text(text)
        return file

    return write
