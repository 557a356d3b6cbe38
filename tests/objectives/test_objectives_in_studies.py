"""Objectives as arms of a study: what is compared, what is refused, what is the same."""

import io

import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import preset_names
from lit_llm.report.tables.plan import render_plan
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.audit.no_ops import probe
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.sweeps.sweep import load_sweep
from tests.equal_budgets import others

ROOM = "model.vocabulary=300"


@pytest.fixture
def study(write_study):
    """study(rest): a small study of encoder-decoders with room for the extra ids."""
    return lambda rest, *overrides, **options: load_study(
        write_study("objectives", rest, **options), [ROOM, *overrides]
    )


def arms(**objectives):
    return f"arms: {{{', '.join(f'{name}: {{pretrain: {{objective: {of}}}}}' for name, of in objectives.items())}}}"


def kinds(findings):
    return {(finding.kind, finding.arm, finding.key) for finding in others(findings)}


def test_objectives_are_an_intervention_that_the_primary_metric_compares(study):
    found = plan(study(arms(prefix="prefix_lm", spans="span_corruption", ul2="ul2"))).findings
    assert kinds(found) == {("note", arm, "pretrain.objective") for arm in ("spans", "ul2")}


def test_the_loss_on_spans_is_compared_with_no_other_objectives(study):
    refused = {("refused", "spans", "compare.metric")}
    metric = "\ncompare: {metric: val/objective_loss}"
    assert refused <= kinds(audit(study(arms(ul2="ul2", spans="span_corruption") + metric)))
    longer = "{kind: span_corruption, mean_span: 8}"
    assert refused <= kinds(audit(study(arms(short="span_corruption", spans=longer) + metric)))
    same = "\ngrid: {factors: {model.attention.output_norm: [head, none]}}"
    assert kinds(plan(study(arms(one="ul2") + same + metric)).findings) == set()


def test_mixtures_of_other_shares_are_told_apart_though_few_windows_may_draw_the_same(study):
    close = "\ngrid: {factors: {pretrain.objective.modes.s: [0.2, 0.2001]}}"
    found = probe(study(arms(one="{kind: ul2, modes: {r: 0.4, s: 0.2, x: 0.4}}") + close))
    assert not [finding for finding in found if finding.kind == "no_op"]


def test_mixtures_that_are_one_are_a_no_op(study):
    listed = "{kind: ul2, mix: [{mode: s, corruption: 0.25}]}"
    found = probe(study(arms(one="{kind: ul2, modes: {s: 1}}", other=listed)))
    assert [(finding.kind, finding.arm) for finding in found] == [("no_op", "other")]


@pytest.mark.parametrize("objective", ["ul2", "{kind: ul2, mix: t5gemma2}", "span_corruption"])
def test_factors_of_the_network_are_told_apart_on_the_small_models_too(study, objective):
    """Whose vocabularies are small, and have room for the objective's own ids."""
    factors = "model.attention.output_norm: [head, none, concat], model.attention.rope_theta: [1e4, 1e2]"
    grid = f"\ngrid: {{design: one_at_a_time, factors: {{{factors}}}}}"
    for length in (32, 128):
        planned = study(arms(one=objective) + grid, f"pretrain.data.sequence_length={length}")
        assert kinds(probe(planned)) == set()


def test_the_plan_counts_the_targets_of_each_objective(study):
    """12 steps of 4 windows of 32 bytes. Spans: 5 tokens, round(32 · 0.15), in 2 spans with an end: 8 targets.

    T5Gemma 2: (3, .15) as above; (12, .5) 16 in 1 span; (32, .15) 5 in 1; (32, .5) 16 in 1; three quarters, 24.
    """
    planned = plan(study(arms(prefix="prefix_lm", spans="span_corruption", gemma="{kind: ul2, mix: t5gemma2}")))
    found = {arm["name"]: arm["loss_tokens"] for arm in planned.as_json()["arms"]}
    mean = (8 + 18 + 7 + 18 + 4 * 24) / 8
    assert found == {"prefix": 12 * 4 * 16, "spans": 12 * 4 * 8, "gemma": round(12 * 4 * mean)}


ENCODER = """
extends: [_paper, _tiny]
base:
  model: {family: encoder_only, encoder: {layers: 2}, embedding: {norm: true}}
  pretrain: {objective: masked_lm, data: {tokenizer: bytes}}
grid: {factors: {pretrain.objective.rate: [0.3, 0.15]}}
"""


@pytest.mark.parametrize("metric", ["val/target_nll", "val/perplexity", "val/bits_per_byte", "val/masked_nll"])
def test_a_model_that_continues_nothing_is_compared_by_what_it_says_of_hidden_tokens(study, metric):
    ablation = study(f"{ENCODER}compare: {{metric: {metric}}}", extends=None)
    refused = [finding for finding in audit(ablation, built=False) if finding.kind == "refused"]
    assert bool(refused) == (metric != "val/masked_nll")
    assert all(finding.key == "compare.metric" for finding in refused)


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_fair_study_of_one_arm(preset, tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    corpus = f'pretrain.data.corpus={{kind: text, files: ["{tmp_path}/*.txt"]}}'
    found = audit(load_study(preset, [corpus]), built=False)
    assert [finding for finding in found if finding.kind == "refused"] == []


def test_an_encoder_only_model_has_no_cache_in_the_plan(study):
    ablation = study(f"{ENCODER}compare: {{metric: val/masked_nll}}", extends=None)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan(plan(ablation), 200))
    shown = console.export_text()
    assert "1000 generated" not in shown
    assert "0 B" not in shown


@pytest.mark.parametrize(("text", "writes"), [(ENCODER + "compare: {metric: val/masked_nll}", False), ("", True)])
def test_programs_are_told_no_number_of_what_a_model_does_not_do(study, text, writes):
    """An encoder-only model decodes nothing and keeps no cache: null, never a zero that would win a comparison."""
    ablation = study(text, extends=None) if text else study(arms(one="causal_lm"))
    for arm in plan(ablation).as_json()["arms"]:
        cache = arm["kv_cache_bytes"]
        figures = [arm["flops_per_token"]["decode"], cache["per_generated_token"], cache["total_at"]["bytes"]]
        assert all(figure > 0 if writes else figure is None for figure in figures)
        assert (cache["per_source_token"] is None) == (not writes)
        assert arm["flops_per_token"]["prefill"] > 0
        assert cache["total_at"]["prompt"] == cache["total_at"]["generate"] == 1000


@pytest.mark.parametrize("figure", ["decode_flops_per_token", "kv_cache_bytes"])
def test_an_encoder_only_model_is_not_searched_by_what_it_does_not_do(tmp_path, figure):
    path = tmp_path / "masked.yaml"
    arms_of = ENCODER[: ENCODER.index("grid")].replace("base:", "arms: {one: {}}\nbase:")
    space = "space: {pretrain.objective.rate: {uniform: [0.1, 0.5]}}\ntrials: 2\n"
    said = f"an encoder_only model, as one is, has no {figure}"
    constrained = f"constraints: [{figure} <= 1e9]\noptimize: [{{metric: val/masked_nll}}]\n"
    for rest, key in ((constrained, "constraints"), (f"optimize: [{{metric: {figure}}}]\n", "optimize")):
        path.write_text(f"sweep: masked{arms_of}{space}{rest}")
        with pytest.raises(InputError) as caught:
            load_sweep(path, [ROOM])
        (problem,) = caught.value.problems
        assert problem.key == key
        assert said in problem.message


def test_encoder_only_models_are_searched_by_what_they_say_of_hidden_tokens(tmp_path):
    path = tmp_path / "masked.yaml"
    goal = "optimize: [{metric: val/masked_nll}]"
    arms_of = ENCODER[: ENCODER.index("grid")].replace("base:", "arms: {one: {}}\nbase:")
    path.write_text(
        f"sweep: masked{arms_of}space: {{pretrain.objective.rate: {{uniform: [0.1, 0.5]}}}}\n{goal}\ntrials: 2\n"
    )
    search = load_sweep(path, [ROOM])
    assert not [finding for finding in audit(search.ablation, built=False) if finding.kind == "refused"]


def test_hidden_tokens_are_no_primary_metric_of_models_that_go_on(study):
    found = audit(study(arms(one="causal_lm", two="prefix_lm") + "\ncompare: {metric: val/masked_nll}"), built=False)
    assert ("refused", "one", "compare.metric") in kinds(found)


def test_a_mixture_is_searched_like_any_key(write_sweep):
    space = "space: {pretrain.objective.modes.s: {uniform: [0.1, 2]}}"
    objective = "arms: {one: {pretrain: {objective: {kind: ul2, modes: {r: 1, s: 1, x: 1}}}}}"
    assert load_sweep(write_sweep("mixed", f"{objective}\n{space}"), [ROOM])
    with pytest.raises(InputError, match="another quantity"):
        load_sweep(write_sweep("mixed", f"{objective}\n{space}\noptimize: [{{metric: val/objective_loss}}]"), [ROOM])
