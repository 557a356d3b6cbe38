"""The command line: what it prints, how it fails, how fast it answers."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.cli import app
from lit_llm.cli.tools import store_app
from lit_llm.launch import cores
from lit_llm.studies.parallelism import choices_of
from tests.commands import command, in_a_process, lit_llm
from tests.instructions import write_instructions

ROOT = Path(__file__).parents[1]

# facts: parameters in millions (arXiv 2510.26622's shapes) and forward FLOPs of a sequence in the paper's convention.
PAPER = {
    "decllm-150m": (167.8, 0.96e12), "decllm-1b": (1140.9, 5.5e12), "decllm-2b": (2181.0, 1.01e13),
    "decllm-4b": (3724.5, 1.69e13), "decllm-8b": (8724.2, 3.85e13), "redllm-150m": (146.8, 0.49e12),
    "redllm-1b": (1124.1, 2.77e12), "redllm-2b": (2207.3, 5.13e12), "redllm-4b": (3498.0, 7.95e12),
    "redllm-8b": (8589.9, 1.89e13),
}  # fmt: skip


@pytest.mark.parametrize("preset", PAPER)
def test_plan_gives_the_papers_parameters_and_flops(preset: str) -> None:
    """Parameters to the digit; FLOPs within 0.5% as read off the figure (2.8% for the smallest encoder-decoder)."""
    answer = lit_llm("plan", preset, "--json")
    assert answer.returncode == 0, answer.stderr
    arm = json.loads(answer.stdout)["arms"][0]
    parameters, flops = PAPER[preset]
    assert round(arm["parameters"] / 1e6, 1) == parameters
    assert arm["paper_flops_per_sequence"] == pytest.approx(flops, rel=0.03 if preset == "redllm-150m" else 0.006)


def test_plan_json_has_every_promised_key() -> None:
    plan = json.loads(lit_llm("plan", "ablations/quickstart.yaml", "--json", cwd=ROOT).stdout)
    assert {"study", "question", "arms", "findings"} <= plan.keys()
    for arm in plan["arms"]:
        assert {
            "name", "differs", "derived", "seeds", "fingerprints", "parameters", "non_embedding_parameters",
            "active_parameters", "flops_per_token", "paper_flops_per_sequence", "kv_cache_bytes", "tokens",
            "loss_tokens", "memory_bytes",
        } <= arm.keys()  # fmt: skip
        assert arm["flops_per_token"].keys() == {"train", "train_all_experts", "prefill", "decode"}
        assert arm["kv_cache_bytes"]["total_at"]["prompt"] == arm["kv_cache_bytes"]["total_at"]["generate"] == 1000
        assert len(arm["fingerprints"]["pretrain"]) == len(arm["seeds"])


@pytest.mark.slow
def test_plan_estimates_the_time_of_each_run_and_of_all(tmp_path: Path) -> None:
    """Once three steps of each arm are timed, which is said while it goes on, and is known from then on."""
    options = ("ablations/quickstart.yaml", "--json", "--store", str(tmp_path), "-j", "1")
    small = ("-o", "pretrain.data.sequence_length=32", "-o", "pretrain.data.batch_size=2")
    measured = lit_llm("plan", *options, *small, "--measure", cwd=ROOT)
    assert "timing 5 kinds of steps" in measured.stderr
    assert "5 of 5 timed" in measured.stderr
    found = json.loads(measured.stdout)
    assert found["estimate"]["seconds"] == pytest.approx(sum(3 * arm["seconds"] for arm in found["arms"]))
    assert found["estimate"]["slots"] == 1
    choices = choices_of(cores(), 15) if cores() > 1 else []
    throughputs = found["throughputs"]
    assert sorted((each["slots"], each["threads"]) for each in throughputs) == sorted(choices)
    assert all(f"timing -j {runs} with threads {threads}" in measured.stderr for runs, threads in choices)
    speeds = [each["steps_per_second"] for each in throughputs]
    assert all(0 < speed < 1e5 for speed in speeds)
    assert speeds == sorted(speeds, reverse=True)
    assert json.loads(lit_llm("plan", *options, *small, cwd=ROOT).stdout)["estimate"] == found["estimate"]


def test_a_preset_is_planned_at_once_where_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer = lit_llm("plan", "redllm-8b")
    assert answer.returncode == 0
    assert "--measure" in answer.stdout
    assert answer.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted((ROOT / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_study_is_fair_and_opens_with_its_question(path: Path, tmp_path: Path) -> None:
    write_instructions(tmp_path)
    shutil.copytree(path.parent, tmp_path / "ablations")
    answer = lit_llm("plan", f"ablations/{path.name}", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert not [finding for finding in plan["findings"] if finding["kind"] in ("refused", "no_op")]
    assert path.read_text().startswith("# ")


TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"


def wrong(write: Callable[..., Path], change: Callable[[str], str], rest: str = TWO) -> str:
    """What `run` says to a study with something wrong in it; nothing may have been started."""
    path = write("wrong", rest)
    path.write_text(change(path.read_text()))
    store = path.parent / "store"
    answer = lit_llm("run", str(path), "--store", str(store))
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    assert "nothing was started" in answer.stderr
    assert not list(store.glob("stages/*"))
    return answer.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("heads: 2", "haeds: 2", "did you mean 'heads'?"),
        ("heads: 2", "heads: 3", "3 heads do not divide d_model 16"),
        ("heads: 2", "heads: 16", "head_dim 1 must be even"),
        ("heads: 2", "heads: two", "model.attention.heads: "),
        ("d_model: 16", "d_model: yes", "model.d_model: "),
        ("batch_size: 4", "batch_size: 0", "pretrain.data.batch_size: "),
        ("seeds: [0]", "seeds: []", "seeds: "),
        ("study: wrong", "study: ../wrong", "study: '../wrong' is not a plain name"),
        ("*.txt", "*.none", "no file matches"),
        ("question:", "qestion:", "did you mean 'question'?"),
        ("tokenizer: bytes", "tokenizer: {kind: bpe, vocabulary: 300}", "258 rows for a tokenizer of 300 tokens"),
        ("    validation:", "    objective: {split: 32}\n    validation:", "a prefix of 32 tokens leaves no target"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_one_message_and_exit_code_2(
    write_study: Callable[..., Path], old: str, new: str, message: str
) -> None:
    assert message in wrong(write_study, lambda text: text.replace(old, new, 1))


def test_all_problems_are_told_at_once_each_with_its_line(write_study: Callable[..., Path]) -> None:
    changes = {"heads: 2": "haeds: 2", "sequence_length: 32": "sequence_length: long"}
    told = wrong(write_study, lambda text: functools.reduce(lambda t, c: t.replace(*c), changes.items(), text))
    assert told.count("wrong.yaml:5: ") >= 1
    assert "haeds" in told
    assert "sequence_length" in told


def test_an_unfair_study_is_refused_with_the_key_that_differs(write_study: Callable[..., Path]) -> None:
    rest = "arms: {red: {}, dec: {extends: decllm-tiny, pretrain: {training: {optimizer: {lr: 1e-2}}}}}"
    told = wrong(write_study, lambda text: text, rest)
    assert "pretrain.training.optimizer.lr" in told
    assert "0.003" in told
    assert "0.01" in told


def test_empty_documents_are_refused(write_study: Callable[..., Path], tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert "all empty" in wrong(write_study, lambda text: text.replace(f"{corpus}/*.txt", f"{tmp_path}/empty.txt"))


def test_another_schema_in_the_store_is_refused(write_study: Callable[..., Path]) -> None:
    path = write_study("schema", "arms: {red: {}}")
    store = path.parent / "store"
    store.mkdir()
    (store / "store.json").write_text('{"schema": 999}')
    answer = lit_llm("run", str(path), "--store", str(store))
    assert answer.returncode == 2
    assert "schema 999" in answer.stderr
    assert sorted(p.name for p in store.iterdir()) == ["store.json"]


def test_a_process_of_its_own_prints_and_ends_as_the_tests_see_it(write_study: Callable[..., Path]) -> None:
    """With each stream in a pipe; tests run the command in their own process."""
    wrong = write_study("wrong", "arms: {red: {modle: {}}}")
    answered = (["diff", "redllm-8b", "decllm-8b"], 0)
    for arguments, code in (answered, (["plan", str(wrong)], 2), (["plan", "--nothing"], 2)):
        process, here = in_a_process(*arguments), lit_llm(*arguments)
        assert process.returncode == here.returncode == code
        assert process.stdout == here.stdout
        assert process.stderr.replace("python -m lit_llm", "lit-llm") == here.stderr
        assert bool(here.stdout) != bool(here.stderr)


def test_help_and_a_wrong_study_load_no_heavy_library(tmp_path: Path) -> None:
    """They answer at once because torch, lightning and mlflow are not imported for them."""
    (tmp_path / "wrong.yaml").write_text("study: x\nquestion: y\nsedes: [0]\n")
    for arguments in (["--help"], ["plan", str(tmp_path / "wrong.yaml")], ["run", str(tmp_path / "wrong.yaml")]):
        code = (
            "import sys; from lit_llm.cli import main\n"
            f"sys.argv = ['lit-llm', *{arguments!r}]\n"
            "try: main()\nexcept SystemExit as e: pass\n"
            "print([m for m in ('torch', 'lightning', 'mlflow', 'numpy', 'scipy') if m in sys.modules])"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert answer.stdout.splitlines()[-1] == "[]", answer.stderr


def test_help_is_whole_and_wraps_only_at_the_edge_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No option's text is cut off, and no sentence breaks where its next word would have had room."""
    monkeypatch.setenv("COLUMNS", "80")
    names = [[each.name or each.callback.__name__] for each in app.registered_commands if each.callback]
    names += [["store", each.name] for each in store_app.registered_commands if each.name]
    assert len(names) > 20
    for name in names:
        text = lit_llm(*name, "--help").stdout
        assert "…" not in text, name
        lines = [line.strip() for line in text.partition("╭")[0].splitlines()]
        for line, following in itertools.pairwise(lines):
            assert not following or not line or len(f"{line} {following.split()[0]}") > 78, (name, line)


def test_a_plan_loads_no_torch() -> None:
    code = (
        "import sys; from lit_llm.cli import main\n"
        "sys.argv = ['lit-llm', 'plan', 'redllm-8b', '-o', 'pretrain.training.precision=fp32', '--json']\n"
        "try: main()\nexcept SystemExit as e: pass\n"
        "print([m for m in ('torch', 'lightning', 'mlflow') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "[]", answer.stderr
    assert '"estimate": null' in answer.stdout


def test_diff_shows_what_tells_two_presets_apart() -> None:
    found = json.loads(lit_llm("diff", "redllm-8b", "decllm-8b", "--json").stdout)
    assert found["model.family"] == ["encoder_decoder", "decoder"]
    assert found["model.decoder.layers"] == [14, 32]
    assert "pretrain.training.optimizer.lr" not in found


def test_the_schema_is_one_that_a_validator_accepts_and_knows_the_keys() -> None:
    import jsonschema

    schema = json.loads(lit_llm("schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {"study", "question", "arms", "grid", "seeds", "compare", "allow"} <= schema["properties"].keys()
    study = {
        "study": "a",
        "question": "b",
        "extends": "redllm-tiny",
        "base": {"pretrain": {"training": {"max_steps": 3}}},
    }
    jsonschema.validate(study, schema)
    for wrong in ({"base": {"model": {"haeds": 4}}}, {"arms": {"red": {"pretrain": {"training": {"max_stepz": 3}}}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(study | wrong, schema)


def test_status_of_a_study_that_never_ran_is_pending() -> None:
    told = lit_llm("status", "ablations/quickstart.yaml", "--json", "--store", "/nonexistent/store", cwd=ROOT)
    answer = json.loads(told.stdout)
    assert {run["state"] for run in answer["runs"]} == {"pending"}
    assert {"arm", "seed", "stage", "state", "fingerprint", "run_id", "metrics", "error"} <= answer["runs"][0].keys()


def test_a_level_may_be_called_by_brackets(tmp_path: Path) -> None:
    """What looks like a terminal's markup is a label like any other."""
    levels = '{"[/4]": {model.encoder.layers: 2}, "[b]": {model.encoder.layers: 1}}'
    (tmp_path / "s.yaml").write_text(
        f"study: s\nquestion: Why?\nextends: redllm-tiny\ngrid: {{factors: {{a: {levels}}}}}\n"
        "allow: [{key: budget, because: layers are the question}]\n"
    )
    for arguments in (["plan", "s.yaml"], ["status", "s.yaml"]):
        answer = lit_llm(*arguments, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert "baseline/a=[b]" in answer.stdout


def test_a_terminal_of_another_encoding_has_every_letter_spelt(tmp_path: Path) -> None:
    path = tmp_path / "letters.yaml"
    path.write_text(
        "study: letters\nquestion: 更大 größer?\nextends: decllm-tiny\n"
        "grid: {factors: {大: {没有: {model.attention.output_norm: head}, größer: "
        "{model.attention.output_norm: none}}}}\nseeds: [0]\n"
    )
    line = command("plan", path, "--store", tmp_path / "store")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "100"}
    shown = subprocess.run(line, capture_output=True, cwd=ROOT, env=os.environ | plain)
    assert shown.returncode == 0, shown.stderr
    said = shown.stdout.decode("ascii")
    assert r"\u66f4\u5927 gr\xf6\xdfer?" in said
    assert r"gr\xf6\xdfer" in said.replace(r"\u66f4\u5927 gr\xf6\xdfer?", "")
