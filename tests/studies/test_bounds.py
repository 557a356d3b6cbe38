"""What no honest study holds is one message with its place, before time or memory go."""

from __future__ import annotations

import gzip
import time
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.data.config import JsonLines, TextFiles
from lit_llm.data.corpora import open_corpus
from lit_llm.data.record_files import LONGEST_LINE
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.studies.load import load_study
from lit_llm.sweeps.sweep import load_sweep

SECONDS = 5
HEAD = "study: bounds\nquestion: Does it end?\nextends: decllm-tiny\n"


def refused(call, *arguments) -> str:
    """The message of an input that is refused within SECONDS of computing."""
    started = time.process_time()
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert time.process_time() - started < SECONDS
    assert len(error.value.report().splitlines()) < 60
    return str(error.value)


def factors(count: int, levels: int) -> str:
    listed = "".join(f"    pretrain.training.f{n}: {list(range(levels))}\n" for n in range(count))
    return f"grid:\n  design: factorial\n  factors:\n{listed}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("base: {model: {decoder: {layers: 1000000000000000000}}}", ":4: model.decoder.layers: "),
        ("base: {model: {d_model: 1" + "0" * 400 + "}}", ":4: "),
        ("arms:\n" + "".join(f"  a{n}: {{}}\n" for n in range(1_000_000)), ": is larger than 1,000,000 bytes"),
        ("arms:\n" + "".join(f"  a{n}: {{}}\n" for n in range(5_000)), ": arms: 5,000 arms"),
        (factors(3, 100), ":6: grid.factors: 1,000,000 arms"),
        (factors(200, 2), ":6: grid.factors: takes at most 100 of them, has 200"),
        (factors(1, 5000), "grid.factors.pretrain.training.f0: has 5000 levels"),
        (f"seeds: {list(range(20_000))}", ":4: seeds: takes at most 1000 of them"),
        (f"{factors(1, 500)}seeds: {list(range(900))}", "seeds: 500 arms x 900 seeds are 450,000 runs"),
        ("seeds: [0, 1]\nmore_seeds: {max: 1000000000000}", ":5: more_seeds.max: "),
        (f"seeds: [1{'0' * 30}]", ":4: 1000000000000000000000000000000 is beyond the integers of 64 bits"),
        (f"arms: {{{'y' * 300}: {{}}, b: {{}}}}", "a name has at most 100 letters"),
        (f"base: {{{'a.' * 3000}b: 1}}", ":4: "),
        (f"grid: {{factors: {{{'a.' * 400}b: [1, 2]}}}}", "nested more than 50 levels deep"),
        ("arms: " + "[" * 100_000, ":4: is nested more than 50 levels deep"),
        ("extends_: [" + ",".join(["decllm-tiny"] * 60_000) + "]", "more than 50,000 values"),
    ],
    ids=lambda value: value[:24].replace("\n", " "),
)
def test_what_no_study_holds_is_refused_with_its_place(tmp_path: Path, text: str, place: str):
    path = tmp_path / "study.yaml"
    path.write_text(f"{HEAD}{text}\n")
    assert place in refused(load_study, path)


def test_an_override_with_thousands_of_dots_is_refused():
    assert "-o a.a." in refused(load_study, "decllm-tiny", ["a." * 3000 + "b=1"])


def test_files_that_stand_on_each_other_twice_are_read_once_each(tmp_path: Path):
    """Each file names the next one twice: 2^30 readings, if none was remembered."""
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, ./{number + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("extends: decllm-tiny\nseed: 7\n")
    assert load_study(tmp_path / "0.yaml").arms[0].experiment.seed == 7


def test_a_chain_of_a_hundred_files_is_refused(tmp_path: Path):
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (tmp_path / "100.yaml").write_text("extends: decllm-tiny\n")
    assert "more than 50 files stand on each other" in refused(load_study, tmp_path / "0.yaml")


@pytest.mark.parametrize("pattern", ["/**", "/**/*.zzz", "/**/**/*"])
def test_a_glob_over_the_whole_machine_is_refused(pattern: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_llm.data.corpora.MOST_FILES", 5_000)
    message = refused(open_corpus, TextFiles(files=(pattern,)))
    assert f"corpus.files: {pattern}: leads past more than 5,000 files" in message


def test_a_line_that_is_larger_than_memory_is_refused_in_a_small_archive(tmp_path: Path):
    path = tmp_path / "text.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(LONGEST_LINE // (1 << 20) + 2):
            file.write(b"a" * (1 << 20))
    assert path.stat().st_size < 1 << 20
    assert f"{path}:1: is longer than 64 MB" in refused(open_corpus, JsonLines(files=(str(path),)))


def test_a_task_file_of_aliases_of_aliases_is_refused(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    (tmp_path / "task.yaml").write_text("\n".join(["task: bomb", *lines]))
    assert "task.yaml:2: evaluate.tasks.folder: holds more than 50,000 values" in refused(read_task_files, tmp_path)
    (tmp_path / "task.yaml").write_text(f"task: {'[' * 5000}")
    assert "nested more than 50 levels deep" in refused(read_task_files, tmp_path)


def test_more_trials_than_anybody_waits_for_are_refused(write_sweep):
    path = write_sweep("many", "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-2]}}", trials=10**18)
    assert "trials: should be less than or equal to 100000" in refused(load_sweep, path)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("pretrain.training.max_steps: 50", "write `base: {pretrain: {training: {max_steps: 50}}}`"),
        ("base: {pretrain.training.max_steps: 50}", "write `pretrain: {training: {max_steps: 50}}`"),
        ("base: {pretrain: {training.max_steps: 50}}", "write `training: {max_steps: 50}`"),
        ("arms: {a: {pretrain.training.max_steps: 50}, b: {}}", "write `pretrain: {training: {max_steps: 50}}`"),
        ("pretrain: {training: {max_steps: 50}}", "write `base: {pretrain: {...}}`"),
    ],
)
def test_a_dotted_key_is_told_how_a_file_has_it(tmp_path: Path, text: str, written: str):
    path = tmp_path / "study.yaml"
    path.write_text(f"{HEAD}{text}\n")
    assert written in refused(load_study, path)


def test_a_sweep_says_so_too(write_sweep):
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-2]}}"
    path = write_sweep("dotted", f"pretrain.training.max_steps: 50\n{space}")
    assert "write `base: {pretrain: {training: {max_steps: 50}}}`" in refused(load_sweep, path)
