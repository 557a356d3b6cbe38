"""The losses of single documents, examples and questions make up every metric, and are of the right documents."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from lit_llm.data.batches import Windows
from lit_llm.data.shards import Shards
from lit_llm.evaluation import window_documents
from lit_llm.evaluation.config import LikelihoodConfig, ValidationConfig
from lit_llm.evaluation.documents import likelihood
from lit_llm.evaluation.examples import HeldOutExamples, summary
from lit_llm.evaluation.final import FinalEvaluation
from lit_llm.evaluation.likelihood import Validation, nats_by_place
from lit_llm.evaluation.unit_losses import UnitLosses, read_losses, units_of, write_losses
from lit_llm.evaluation.window_documents import documents_of
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.objectives.config import EOD, CausalLM, MaskedLM, MasksConfig, PrefixLM
from lit_llm.store.store import Stage
from tests.evaluation.evaluated import BYTES, FAMILIES, model_of, plain_nats


@pytest.fixture(scope="module")
def data(prepared, write, documents):
    """Of the documents four in ten are for validation, and as many for the test."""
    folder = write({f"{number:02}.txt": text for number, text in enumerate(documents)})
    return prepared({"kind": "text", "files": [f"{folder}/*.txt"]}, fraction=0.4, test=0.4)


def final(model, data, objective=PrefixLM(), split="validation", **config):
    family = model.config.family
    return Validation(ValidationConfig(**config), data, objective, family, MasksConfig(), split, True).measured(model)


def kept(tmp_path, measured):
    stage = Stage(tmp_path)
    write_losses(stage.losses_file, measured.losses)
    stage.finish({"state": "done", "metrics": measured.metrics})
    return stage


def ratio(units):
    return math.fsum(sum_ for sum_, _ in units.values()) / math.fsum(weight for _, weight in units.values())


def assert_all_made_of_units(stage, prefix=""):
    """Of every metric that is a loss; returns how many."""
    checked = 0
    for name, value in stage.result()["metrics"].items():
        units = units_of(stage, name)
        if units is not None:
            expected = math.log(value) if name.endswith("perplexity") else value
            assert ratio(units) == pytest.approx(expected, rel=1e-12), name
            checked += 1
    return checked


# --- documents of windows ------------------------------------------------------------------------------------------


def test_a_token_belongs_to_the_document_whose_end_comes_next(tmp_path, monkeypatch):
    """a b ■ | ■ | c d e ■ | f: document 1 is empty; the pass over the split goes in pieces of two tokens."""
    ids = np.array([5, 6, EOD, EOD, 7, 8, 9, EOD, 4], dtype=np.uint16)
    (tmp_path / "00000.test.bin").write_bytes(ids.tobytes())
    shards = Shards(tmp_path, "test", [len(ids)], np.uint16)
    expected = np.array([0, 0, 0, 1, 2, 2, 2, 2, 3])
    monkeypatch.setattr(window_documents, "_CHUNK", 2)
    starts = np.array([0, 2, 3, 4, 6])
    windows = shards.read(starts, 3)
    assert documents_of(shards, starts, windows).tolist() == [expected[start : start + 3].tolist() for start in starts]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_nats_of_a_window_are_added_to_the_documents_of_its_targets(data, family, split):
    """Every window alone, by a full forward pass and torch's cross-entropy; its second half, token by token."""
    model, source = model_of(family), data.sources[0]
    text = data.open(source, split).read(np.array([0]), source.count(split))[0]
    document = np.concatenate([[0], np.cumsum(text == EOD)[:-1]])
    expected, tokens, sizes = {}, {}, {}
    for start in range(0, len(text) - 31, 32):
        window = text[start : start + 32]
        for nats, place in zip(plain_nats(model, window[:16], window[16:]), range(start + 16, start + 32), strict=True):
            number = int(document[place])
            expected[number] = expected.get(number, 0.0) + float(nats)
            tokens[number] = tokens.get(number, 0) + 1
            sizes[number] = sizes.get(number, 0) + (text[place] != EOD)  # a byte a token, none for an end
    (found,) = final(model, data, split=split).losses
    assert (found.split, found.metric, found.source, found.weight) == (split, "target_nll", "", 1.0)
    assert len(found.units) > 10
    assert dict(zip(found.units, found.nats, strict=True)) == pytest.approx(expected, abs=1e-5)
    assert dict(zip(found.units, found.tokens, strict=True)) == tokens
    assert dict(zip(found.units, found.bytes, strict=True)) == sizes


def test_a_masked_token_counts_for_its_own_document(data):
    """Of an encoder-only model the hidden tokens count; they lie anywhere in a window."""
    model = build_model(load_experiment("modernbert-tiny").model).eval()
    validation = Validation(ValidationConfig(), data, MaskedLM(), "encoder_only", MasksConfig(), "test", True)
    measured, source = validation.measured(model), data.sources[0]
    windows = Windows(data, source, "test")
    text = windows.tokens.read(np.array([0]), windows.count * 32)[0]
    document = np.concatenate([[0], np.cumsum(text == EOD)[:-1]]).reshape(-1, 32)
    hidden = torch.cat([batch.weights for batch in validation.sources[0].target_batches]).bool().numpy()
    (found,) = measured.losses
    numbers, counts = np.unique(document[hidden], return_counts=True)
    assert (found.metric, list(found.units), list(found.tokens)) == ("masked_nll", numbers.tolist(), counts.tolist())
    assert found.bytes is None
    assert set(measured.metrics) == {"test/masked_nll", "test/objective_loss"}


# --- metrics are sums over units -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_units_of_windows_make_up_every_metric_of_both_splits(data, family, tmp_path):
    model = model_of(family)
    both = FinalEvaluation(
        data.held_out_splits, lambda split, model, told: final(model, data, CausalLM(), split), lambda *_: None
    )
    metrics = both(model)
    stage = Stage(tmp_path)
    write_losses(stage.losses_file, both.losses)
    stage.finish({"metrics": metrics})
    kinds = ("target_nll", "perplexity", "bits_per_byte", "objective_loss")
    assert set(metrics) == {f"{begin}{kind}" for begin in ("val/", "test/") for kind in kinds}
    assert assert_all_made_of_units(stage) == 6
    for name in ("val/objective_loss", "test/masked_nll", "val/bits_per_byte/other", "throughput/tokens_per_second"):
        assert units_of(stage, name) is None
    assert units_of(stage, "val/target_nll").keys() != units_of(stage, "test/target_nll").keys()
    assert units_of(Stage(tmp_path / "older"), "val/target_nll") is None


def test_units_of_a_mixture_weigh_as_their_sources_do(tmp_path, prepared, write):
    """Two sources in shares of 3 to 1, of lengths that have nothing to do with the shares."""
    draw = np.random.default_rng(0)
    sources = {}
    for name, letters, count, weight in (("low", "abc", 40, 3), ("high", "ABC", 25, 1)):
        texts = {f"{n:02}.txt": "".join(draw.choice(list(letters), 200)) for n in range(count)}
        sources[name] = {"corpus": {"kind": "text", "files": [f"{write(texts)}/*.txt"]}, "weight": weight}
    data, model = prepared({"kind": "mixture", "sources": sources}, fraction=0.3, test=0.3), model_of("decllm")
    stage = kept(tmp_path, final(model, data))
    metrics = stage.result()["metrics"]
    assert assert_all_made_of_units(stage) == len(metrics) - 1 == 7, "all but the objective's"
    units = units_of(stage, "val/target_nll")
    share = math.fsum(weight for unit, (_, weight) in units.items() if unit.startswith("low/")) / math.fsum(
        weight for _, weight in units.values()
    )
    assert share == pytest.approx(0.75, rel=1e-12)
    of_low = units_of(stage, "val/bits_per_byte/low")
    assert of_low.keys() == {unit for unit in units if unit.startswith("low/")}


def test_the_last_evaluation_reads_more_windows_and_the_objective_stays_that_of_those_before(data):
    model = model_of("decllm")
    during = Validation(ValidationConfig(sequences=3), data, CausalLM(), "decoder", MasksConfig())(model)
    few = final(model, data, CausalLM(), sequences=3, final_sequences=5)
    every = final(model, data, CausalLM(), sequences=3, final_sequences=10_000)
    count = Windows(data, data.sources[0], "validation").count
    assert count > 5
    assert [sum(found.losses[0].tokens) for found in (few, every)] == [16 * 5, 16 * count]
    assert few.metrics["val/objective_loss"] == every.metrics["val/objective_loss"] == during["val/objective_loss"]
    assert during["val/target_nll"] not in (few.metrics["val/target_nll"], every.metrics["val/target_nll"])
    at_least = final(model, data, CausalLM(), sequences=6, final_sequences=2)
    assert sum(at_least.losses[0].tokens) == 16 * 6


def test_units_of_likelihood_and_examples_make_up_every_metric(data, tmp_path, write, prepared):
    """Records of evaluations: by document, of other texts too, and by example, of two tasks."""
    folder = write({f"{n}.txt": f"other text number {n} " * 3 for n in range(4)})
    config = LikelihoodConfig.model_validate(
        {"corpora": {name: {"kind": "text", "files": [f"{folder}/{n}.txt"]} for n, name in enumerate("pq")}}
    )
    model = model_of("decllm")
    found = likelihood(model, config, data, MasksConfig(), batch_tokens=500)
    stage = recorded(tmp_path / "likelihood", found)
    counts = {name for name in found.metrics if "/documents" in name or "/skipped" in name}
    assert assert_all_made_of_units(stage) == len(found.metrics) - len(counts)
    assert {"likelihood/nll/p", "likelihood/bits_per_byte/q", "likelihood/mean_over_corpora"} < set(found.metrics)
    assert len(units_of(stage, "likelihood/nll")) == found.metrics["likelihood/documents"]

    rows = [
        {"example": n, "task": "even" if n % 2 else "odd", "tokens": 1 + n % 3, "bytes": 2 + n, "nats": 1.5 * n**0.5}
        for n in range(9)
    ]
    found = type(found)({f"examples/{name}": value for name, value in summary(rows).items()}, rows)
    stage = recorded(tmp_path / "examples", found)
    assert assert_all_made_of_units(stage) == len(found.metrics) == 6
    assert set(units_of(stage, "examples/nll/odd")) == {f"odd/{n}" for n in range(0, 9, 2)}


def recorded(folder, found):
    stage = Stage(folder)
    folder.mkdir()
    stage.rows_file.write_text("".join(json.dumps(row) + "\n" for row in found.rows))
    stage.finish({"metrics": found.metrics})
    return stage


def test_units_of_a_task_are_its_questions_under_one_filter(tmp_path):
    rows = [
        {"task": task, "question": n, "filter": way, "acc": float(n < right), "f1": [n, 1]}
        for task, way, right in (("a", "none", 3), ("b", "strict", 1), ("b", "flexible", 4))
        for n in range(5)
    ]
    metrics = {"tasks/a/acc": 0.6, "tasks/b/acc/strict": 0.2, "tasks/b/acc/flexible": 0.8, "tasks/a/f1": 0.4}
    stage = recorded(tmp_path / "tasks", type("Found", (), {"rows": rows, "metrics": metrics}))
    assert ratio(units_of(stage, "tasks/b/acc/strict")) == 0.2
    assert ratio(units_of(stage, "tasks/b/acc/flexible")) == 0.8
    assert units_of(stage, "tasks/a/acc") == {str(n): (float(n < 3), 1.0) for n in range(5)}
    assert units_of(stage, "tasks/a/f1") is None, "no mean of one number for each question"
    assert units_of(stage, "tasks/a/questions") is None


def test_examples_of_the_instruction_data_keep_their_losses(tmp_path):
    class Two:
        tasks = ("copy", "sum")
        lost_bytes = 0
        pairs = tuple((np.array([5, 6]), np.array([7 + n, EOD])) for n in range(6))

        def count(self, split):
            return {"validation": 6, "test": 4}[split]

        def read(self, split, place):
            return self.pairs[place]

        def task_of(self, split):
            return np.arange(self.count(split)) % 2

    held_out = HeldOutExamples(Two(), 100, MasksConfig(), np.ones(BYTES, dtype=int), "test")
    measured = held_out.measured(model_of("redllm"), 100)
    stage = kept(tmp_path, measured)
    names = {"target_nll", "target_nll/copy", "target_nll/sum", "perplexity", "bits_per_byte", "mean_over_tasks"}
    assert set(measured.metrics) == {f"test/{name}" for name in names}
    assert assert_all_made_of_units(stage) == 6
    assert [losses.units for losses in measured.losses] == [[0, 2], [1, 3]]


# --- the file ------------------------------------------------------------------------------------------------------


def test_losses_come_back_as_they_were_and_one_split_is_read_alone(tmp_path):
    one = UnitLosses("a", [0, 7], [0.1, 1 / 3], [1, 2], [3, 4], 0.25, "validation", "target_nll")
    other = UnitLosses("a", ["x"], [2.0], [5], None, 1.0, "test", "masked_nll", "example")
    file = tmp_path / "losses.jsonl"
    write_losses(file, [one, other])
    assert read_losses(file, "validation") == [one]
    assert read_losses(file, "test") == [other]
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:40])  # of the other split nothing is parsed
    assert read_losses(file, "validation") == [one]


RANK = """
import sys, torch.distributed as dist, torch
from lit_llm.evaluation.likelihood import nats_by_place, sum_of_nats
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.set_num_threads(1)
model, batches, places, count = torch.load(f"{folder}/given.pt", weights_only=False)
found = nats_by_place(model, batches, places, count), sum_of_nats(model, batches)
torch.save(found, f"{folder}/found-{rank}.pt")
dist.destroy_process_group()  # else gloo's threads may end a process by SIGABRT
"""


@pytest.mark.slow
def test_two_devices_share_the_windows_and_have_all_sums(data, tmp_path):
    """Three batches, so that one of the two has less to do."""
    model = model_of("redllm")
    config = ValidationConfig(final_sequences=5, sequences=5)
    (source,) = Validation(config, data, PrefixLM(), "encoder_decoder", MasksConfig(), "test", True).sources
    batches, places = source.target_batches, source.places
    assert len(batches) == 3
    torch.save((model, batches, places, len(source.documents)), tmp_path / "given.pt")
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [rank.wait(timeout=400) for rank in ranks] == [0, 0]
    alone = nats_by_place(model, batches, places, len(source.documents))
    for rank in range(2):
        by_document, (nats, tokens) = torch.load(tmp_path / f"found-{rank}.pt")
        assert by_document == pytest.approx(alone, rel=1e-12)
        assert (nats, tokens) == (pytest.approx(math.fsum(alone), rel=1e-12), 5 * 16)
