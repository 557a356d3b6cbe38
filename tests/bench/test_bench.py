"""`lit-llm bench`: names and finite figures in its JSON, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from lit_llm.bench.generation import measure_decode
from lit_llm.bench.run import heaps_of
from lit_llm.bench.settings import BenchSettings, Lengths, lengths_from, what_of
from lit_llm.bench.training_step import compare_steps, measure_training, random_text
from tests.bench.small_bench import SIZE, small_settings
from tests.commands import in_a_process, lit_llm

pytestmark = pytest.mark.xdist_group("bench")
GENERATION = ["prefill", "first token", "token", "answer"]
OURS = {"decoder": ["ours", "DecLLM"], "encoder-decoder": ["ours", "RedLLM"]}
PEERS = {"decoder": "Llama", "encoder-decoder": "T5Gemma"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, list[str]]:
    """(JSON, stderr, files) of the command, which starts a process for each measurement."""
    folder = tmp_path_factory.mktemp("bench")
    given = ["--size", "tiny", "--turns", 1, "--threads", 1, "--lengths", "5+3", "--heap", "--device", "cpu"]
    done = in_a_process("bench", "families", "memory", *given, "--json", "--figure", folder / "fig")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr, sorted(file.name for file in folder.iterdir())


def check(comparison: dict[str, Any], quantities: list[str]) -> None:
    """Each contestant has each quantity, and every number is finite."""
    pairs = [(row["quantity"], row["contestant"]) for row in comparison["measured"]]
    assert pairs == [(quantity, name) for quantity in quantities for name in comparison["parameters"]]
    for row in comparison["measured"]:
        assert all(math.isfinite(number) for number in (*row["value"].values(), *row["ratio"].values()))
        if row["quantity"] != "token":  # a difference of two times
            assert row["value"]["median"] > 0
    assert comparison["ceilings"] is None or all(value > 0 for value in comparison["ceilings"].values())


@pytest.mark.parametrize(
    ("measure", "what", "title", "quantities", "without_peers"),
    [
        (measure_training, "training", "training step, {}", ["step"], [["DecLLM", "RedLLM"]]),
        (measure_decode, "decode", "{}, 5 + 4 tokens", GENERATION, []),
    ],
)
def test_ours_are_measured_beside_the_peers(measure, what, title, quantities, without_peers, monkeypatch):
    found = json.loads(json.dumps([asdict(one) for one in measure(small_settings(monkeypatch), "default")]))
    found, rest = found[: len(PEERS)], found[len(PEERS) :]
    assert [[*one["parameters"]] for one in rest] == without_peers
    for one in rest:
        check(one, quantities)
    assert [one["title"] for one in found] == [title.format(kind) for kind in PEERS]
    for one, (kind, peer) in zip(found, PEERS.items(), strict=True):
        assert (one["what"], one["heap"]) == (what, "default")
        names = [*one["parameters"]]
        assert names[0] == "ours"
        assert {*OURS[kind], peer} <= {*names}
        assert f"{peer} (transformers)" in one["same"]
        check(one, quantities)
        shares = {row["quantity"] for row in one["measured"] if row["of_machine"] is not None}
        assert shares == {"step", "prefill", "token"} & {*quantities}


def test_the_command_prints_every_measurement(printed):
    result, errors, files = printed
    memory = [one for one in result["comparisons"] if one["what"] == "memory"]
    (families,) = [one for one in result["comparisons"] if one["what"] == "families"]
    assert [one["title"] for one in memory] == [f"memory of a step, {kind}" for kind in PEERS]
    assert families["title"] == "RedLLM against DecLLM, 5 + 3 tokens"
    assert [*families["parameters"]] == ["DecLLM", "RedLLM"]
    check(families, GENERATION)
    for one, (kind, peer) in zip(memory, PEERS.items(), strict=True):
        assert {*OURS[kind], peer} <= one["parameters"].keys()
        check(one, ["peak"])
        for row in one["measured"]:
            # Weights, gradients and two moments, in float32.
            assert row["value"]["median"] >= 4 * 4 * one["parameters"][row["contestant"]]
    assert files == ["fig.png", "fig.svg"]
    assert "measuring memory, families at size tiny" in errors


def test_the_machine_and_the_versions_are_in_the_result(printed):
    result, _, _ = printed
    assert {"torch", "transformers", "python", "lit-llm"} <= result["machine"]["versions"].keys()
    assert result["machine"]["cpu"]
    assert result["settings"] == {
        "size": "tiny", "precision": "fp32", "threads": 1, "turns": 1, "lengths": [[5, 3]], "prompts": 1,
        "compiled": False, "device": "cpu",
    }  # fmt: skip
    assert {one["heap"] for one in result["comparisons"]} == {"kept"}
    assert result["failed"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainng"], "WHAT: 'trainng' cannot be measured - did you mean 'training'?"),
        (["--size", "smal"], "--size: 'smal' is unknown - did you mean 'small'?"),
        (["--precision", "fp64"], "--precision: 'fp64' is unknown"),
        (["decode", "--lengths", "128"], "--lengths: '128' is no pair of lengths"),
        (["decode", "--lengths", "128+1"], "--lengths: '128+1' is no pair of lengths"),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(arguments, message):
    done = lit_llm("bench", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_figure_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    done = lit_llm("bench", "--figure", tmp_path / "file" / "fig")
    assert done.returncode == 2
    assert "--figure: " in done.stderr


def test_what_is_measured_by_default():
    assert what_of([]) == ("training", "decode", "memory", "families")
    assert what_of(["families", "training"]) == ("training", "families")
    assert BenchSettings().lengths_of("families") == ((128, 128), (1000, 1000))
    assert BenchSettings(lengths=(lengths_from("7+9"),)).lengths_of("families") == (Lengths(7, 9),)
    assert [heaps_of(keep, "cpu") for keep in (None, True, False)] == [("default", "kept"), ("kept",), ("default",)]
    assert heaps_of(None, "cuda") == ("default",)


def test_an_encoder_reads_half_of_each_sequence():
    """The same tokens in both: what the decoder reads and predicts is shifted by one."""
    split, whole = random_text(SIZE, True), random_text(SIZE, False)
    assert split.source_BS.shape == split.inputs_BT.shape == (SIZE.batch, SIZE.length // 2)
    assert whole.inputs_BT.shape == (SIZE.batch, SIZE.length)
    for text in (split, whole):
        assert text.inputs_BT[:, 1:].tolist() == text.targets_BT[:, :-1].tolist()
    assert split.targets_BT.tolist() == whole.targets_BT[:, SIZE.length // 2 :].tolist()


def test_compiled_contestants_take_part_and_lower_the_loss(monkeypatch):
    """With torch's own backend, which traces and does not compile."""
    import torch

    from lit_llm.bench.entries import decoders
    from lit_llm.bench.training_step import training_step
    from lit_llm.components.loss.module import terms_of_rows
    from lit_llm.models.stacks import apply_block

    compiled, calls = torch.compile, []

    def traced(function, **settings):
        calls.append(function)
        return compiled(function, **settings | {"backend": "eager"})

    monkeypatch.setattr(torch, "compile", traced)
    settings = small_settings(monkeypatch, compiled=True, turns=2)
    ours = [entry for entry in decoders(SIZE) if not entry.package]
    found = compare_steps(ours, "steps", settings, "default")
    names = ["ours", "ours, compiled", "DecLLM", "DecLLM, compiled"]
    assert [row.contestant for row in found.measured] == names
    assert calls == [apply_block, terms_of_rows] * 2
    contestant = ours[0].build(ours[0].model, None).compiled()
    text = random_text(SIZE, False)
    before = contestant.loss(text).item()
    step = training_step(contestant, text, settings)
    for _ in range(5):
        step()
    assert contestant.loss(text).item() < before
