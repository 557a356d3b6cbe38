"""Unfair studies: each is refused, or what is unfair about it is named in the plan before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lit_llm.config.problems import InputError
from lit_llm.data.prepare import prepare
from lit_llm.experiment.cost import COST_FIGURES
from lit_llm.store.store import Store
from lit_llm.studies.audit.budgets import LARGEST, TOLERANCE
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.audit.ineffective_settings import LOG_NORMALISER, ROUNDING
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.plan import Plan, plan
from lit_llm.sweeps.sweep import load_sweep

Write = Callable[..., Path]
LR = "pretrain.training.optimizer.lr"
STEPS = "pretrain.training.max_steps"
TOKENIZER = "pretrain.data.tokenizer"


@pytest.fixture
def planned(write_study: Write) -> Callable[..., Plan]:
    """The plan of a small study (12 steps of 4 windows of 32 bytes) as it stands, its budgets included."""

    def of(rest: str, *overrides: str, extends: str = "redllm-tiny", built: bool = False) -> Plan:
        path = write_study("unfair", rest, extends=extends, allow_budgets=False)
        return plan(load_study(path, overrides), built=built)

    return of


def found(result: Plan, kind: str) -> dict[tuple[str, str], str]:
    """{(arm, key): message} of the findings of one kind."""
    return {(finding.arm, finding.key): finding.message for finding in result.findings if finding.kind == kind}


def ratio(result: Plan, figure: str, arm: int = 1, baseline: int = 0) -> float:
    """A figure of an arm of the plan over the same of its baseline."""
    costs = [COST_FIGURES[figure](result.arms[number].cost) for number in (arm, baseline)]
    return costs[0] / costs[1]


def grid(factor: str) -> str:
    return f"grid: {{factors: {{{factor}}}}}"


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_eight_times_the_tokens_of_a_batch_eight_times_as_large_are_refused_by_their_ratio(planned) -> None:
    result = planned(grid("pretrain.data.batch_size: [8, 64]"))
    refused = found(result, "refused")
    assert refused.keys() == {("baseline/batch_size=64", "budget.tokens")}
    message = refused["baseline/batch_size=64", "budget.tokens"]
    assert message.startswith("8.0 times the tokens (loss tokens and training FLOPs alike) of baseline")
    assert "`match: {by: tokens}`" in message
    assert "`allow: [{key: budget.tokens, because: ...}]`" in message
    with pytest.raises(InputError, match=r"8\.0 times the tokens"):
        result.check()


def test_a_named_arm_with_twenty_times_the_parameters_is_refused(planned) -> None:
    wide = "{model: {d_model: 80, attention: {heads: 2}, feed_forward: {d_ff: 320}}}"
    result = planned(f"arms: {{base: {{}}, wide: {wide}}}")
    times = ratio(result, "parameters")
    assert times > 15
    assert found(result, "refused")["wide", "budget.parameters"].startswith(f"{times:.1f} times the parameters of base")


@pytest.mark.parametrize("factor", ["model.d_model: [16, 32]", "model.decoder.layers: [2, 6]"])
def test_a_factor_that_is_a_size_is_no_excuse_for_it(planned, factor: str) -> None:
    assert {key for _, key in found(planned(grid(factor)), "refused")} >= {"budget.parameters"}
    allowed = planned(f"{grid(factor)}\nallow: [{{key: budget, because: the size is the question}}]")
    assert not allowed.refused
    said = [message for (_, key), message in found(allowed, "allowed").items() if key == "budget.parameters"]
    assert said[0].startswith(f"{ratio(allowed, 'parameters'):.1f} times the parameters of baseline")
    assert said[0].endswith("allowed because the size is the question")


def test_a_matched_budget_is_no_finding_and_less_than_a_tenth_is_none_either(planned) -> None:
    """Twice the batch for half of the steps; 11 steps for 12 are 8% fewer, 10 are 17% fewer."""
    matched = planned(f"{grid('pretrain.data.batch_size: [4, 8]')}\nmatch: {{by: tokens}}", f"{STEPS}=200")
    assert [finding.key for finding in matched.findings if finding.key.startswith("budget")] == ["budget.memory"]
    assert not planned(grid(f"{STEPS}: [12, 11]")).refused
    assert {key for _, key in found(planned(grid(f"{STEPS}: [12, 10]")), "refused")} == {"budget.tokens"}
    assert ratio(planned(grid(f"{STEPS}: [12, 11]")), "tokens") > 1 / (1 + TOLERANCE)


def test_a_family_that_reads_as_much_for_other_flops_is_refused_until_flops_are_matched(planned) -> None:
    two = (
        "arms: {red: {}, dec: {extends: decllm-tiny, model: {decoder: {layers: 5}}, pretrain: {objective: prefix_lm}}}"
    )
    assert ("dec", "budget.train_flops") in found(planned(two), "refused")
    matched = planned(f"{two}\nmatch: {{by: train_flops}}", f"{STEPS}=600")
    assert not matched.refused
    said = found(matched, "note")["dec", "budget.tokens"]
    assert (
        said
        == f"{ratio(matched, 'tokens'):.2g} times the tokens (loss tokens alike) of red: training FLOPs are matched"
    )


def test_loss_tokens_that_follow_from_the_objective_are_a_note_with_their_ratio(planned) -> None:
    two = "arms: {prefix: {pretrain: {objective: prefix_lm}}, causal: {}}"
    result = planned(two, "model.feed_forward.d_ff=256", extends="decllm-tiny")
    assert not result.refused
    assert found(result, "note")["causal", "pretrain.objective"].startswith(
        "the loss is computed on 2.0 times the tokens"
    )


def test_memory_and_the_cost_of_decoding_are_notes(planned) -> None:
    """Half of the key-value heads: half of the cache, nothing that a model learns from."""
    result = planned(grid("model.attention.kv_heads: [2, 1]"), "model.feed_forward.d_ff=512", "model.vocabulary=320")
    assert not result.refused
    (message,) = (text for (_, key), text in found(result, "note").items() if key.startswith("budget"))
    assert "0.5 times the key-value cache of baseline" in message


def test_a_finetuning_of_another_length_is_refused(write_study: Write) -> None:
    tuned = (
        "base: {finetune: {data: {examples: {kind: jsonl, files: [x.jsonl]}, input_length: 8, target_length: 4, "
        "batch_size: 4}, training: {max_steps: 10}}}"
    )
    path = write_study("tuned", f"{tuned}\n{grid('finetune.training.max_steps: [10, 30]')}", extends=None)
    text = path.read_text()
    path.write_text(text.replace("base: {", "extends: redllm-tiny\nbase: {"))
    ablation = load_study(path)

    refused = {finding.key: finding.message for finding in audit(ablation, built=False) if finding.kind == "allowed"}
    assert refused["budget.finetune_tokens"].startswith("3.0 times the finetuning tokens of baseline")


# --- studies of scaling ----------------------------------------------------------------------------------------------


def sizes(*widths: int) -> str:
    return grid(f"model.d_model: [{', '.join(map(str, widths))}]")


@pytest.mark.parametrize(
    ("law", "needed"),
    [
        ("scaling: {x: train_flops}", 4),
        ("scaling: {x: parameters}", 4),
        ("scaling: {x: parameters, irreducible: false}", 3),
        ("gate: {}", 3),
        ("gate: {irreducible: true}", 4),
    ],
)
def test_sizes_on_which_a_law_stands_are_no_unequal_budget(planned, law: str, needed: int) -> None:
    """A law has two numbers, and three with E: any two, or three, sizes lie on one."""
    widths, head = (16, 32, 64, 128), "model.attention.head_dim=8"
    result = planned(f"{sizes(*widths[:needed])}\ncompare: {{{law}}}", head)
    assert not result.refused
    said = [text for text in found(result, "note").values() if "the study compares across" in text]
    assert len(said) == needed - 1
    assert f"{ratio(result, 'parameters'):.1f} times the parameters" in said[0]
    lacking = planned(f"{sizes(*widths[: needed - 1])}\ncompare: {{{law}}}", head)
    assert {key for _, key in found(lacking, "refused")} >= {"budget.parameters"}


@pytest.mark.parametrize(
    ("law", "name", "needed"),
    [
        ("scaling: {x: train_flops}", "scaling", 4),
        ("scaling: {irreducible: false}", "scaling", 3),
        ("gate: {project: 1e14}", "gate", 3),
    ],
)
def test_a_batch_size_is_no_series_of_sizes(planned, law: str, name: str, needed: int) -> None:
    """One group and two sizes, through which a law always goes."""
    rest = f"{grid('pretrain.data.batch_size: [8, 64]')}\ncompare: {{{law}}}"
    message = found(planned(rest), "refused")["baseline/batch_size=64", "budget.tokens"]
    assert message.startswith("8.0 times the tokens")
    assert message.endswith(
        f"`compare.{name}` excuses it where a group has {needed} sizes or more, within the training FLOPs of the "
        "baseline's"
    )


def test_a_law_of_parameters_excuses_no_other_tokens(planned) -> None:
    rest = f"{sizes(16, 32, 64)[:-2]}, pretrain.data.batch_size: [8, 64]}}}}"
    law = "compare: {scaling: {x: parameters, irreducible: false}}"
    refused = found(planned(f"{rest}\n{law}", "model.attention.head_dim=8"), "refused")
    assert {key for _, key in refused} == {"budget.tokens"}
    assert all(message.startswith("8.0 times the tokens") for message in refused.values())


@pytest.mark.parametrize("lengths", ["[12, 13]", "[12, 14, 16]"])
def test_an_arm_beyond_all_sizes_of_the_baseline_is_excused_by_no_gate(planned, lengths: str) -> None:
    """Two lengths carry no law, and three carry none as far as many times their FLOPs."""
    arms = "arms: {small: {}, large: {model: {d_model: 256, feed_forward: {d_ff: 2048}}}}"
    rest = f"{arms}\n{grid(f'{STEPS}: {lengths}')}\ncompare: {{baseline: small, gate: {{}}}}"
    refused = found(planned(rest), "refused")
    assert "times the parameters" in refused["large", "budget.parameters"]


def test_a_law_excuses_no_finetuning_of_another_length(write_study: Write) -> None:
    tuned = (
        "base: {finetune: {data: {examples: {kind: jsonl, files: [x.jsonl]}, input_length: 8, target_length: 4, "
        "batch_size: 4}, training: {max_steps: 10}}}"
    )
    rest = grid(f"{STEPS}: [60, 120, 240], finetune.training.max_steps: [10, 30]")
    path = write_study("tuned", f"{tuned}\n{rest}\ncompare: {{gate: {{}}}}", extends=None)
    path.write_text(path.read_text().replace("base: {", "extends: redllm-tiny\nbase: {"))

    keys = {finding.key for finding in audit(load_study(path), built=False) if finding.kind == "allowed"}
    assert "budget.finetune_tokens" in keys
    assert "budget.tokens" not in keys


def test_a_group_of_too_few_sizes_is_excused_by_no_law_of_another(planned) -> None:
    """A gate measures single sizes against the law of the baseline's; scaling laws are one for each group."""
    arms = ", ".join(f"d{width}: {{model: {{d_model: {width}}}}}" for width in (16, 32, 64, 128))
    arms = f"arms: {{{arms}, dec: {{extends: decllm-tiny, model: {{d_model: 64, attention: {{heads: 2}}}}}}}}"
    rest = f"{arms}\nallow: [{{key: pretrain.objective, because: we ask}}]\ncompare: "
    scaling = found(planned(f"{rest}{{scaling: {{by: family}}}}", "model.attention.head_dim=8"), "refused")
    assert {arm for arm, key in scaling if key == "budget.parameters"} == {"dec"}
    gate = found(planned(f"{rest}{{gate: {{by: family}}}}", "model.attention.head_dim=8"), "refused")
    assert not {arm for arm, key in gate if key.startswith("budget")}


@pytest.mark.parametrize("law", ["scaling", "gate"])
def test_a_length_of_training_is_a_size_of_its_own(planned, law: str) -> None:
    result = planned(f"{grid(f'{STEPS}: [12, 60, 300, 1500]')}\ncompare: {{{law}: {{}}}}")
    assert not result.refused


def test_at_one_size_a_study_of_scaling_over_parameters_compares_equal_tokens(planned) -> None:
    """Two groups at four sizes, one with three times the steps: refused at each, against the other of that size."""
    named = "arms: {a: {}, b: {model: {attention: {output_norm: none}}, pretrain: {training: {max_steps: 36}}}}"
    rest = f"{named}\n{sizes(16, 32, 64, 128)}\nallow: [{{key: {STEPS}, because: longer}}]"
    scaling = "compare: {baseline: a, scaling: {x: %s, by: arm}}"
    head = "model.attention.head_dim=8"
    refused = found(planned(f"{rest}\n{scaling % 'parameters'}", head), "refused")
    levels = ("/d_model=32", "/d_model=64", "/d_model=128")
    assert refused.keys() == {("b" + level, "budget.tokens") for level in ("", *levels)}
    assert refused["b", "budget.tokens"].startswith("3.0 times the tokens (loss tokens and training FLOPs alike) of a,")
    assert " of a/d_model=32, of as many parameters" in refused["b/d_model=32", "budget.tokens"]
    assert not planned(f"{rest}\n{scaling % 'train_flops'}", head).refused


# --- matching --------------------------------------------------------------------------------------------------------


def test_matching_loss_tokens_may_not_cost_many_times_the_flops(planned) -> None:
    """Five of a hundred tokens are corrupted, so equal loss tokens take many times the reading."""
    spans = "{pretrain: {objective: {kind: span_corruption, corruption: 0.05}}}"
    arms = f"arms: {{causal: {{pretrain: {{objective: causal_lm}}}}, spans: {spans}}}\nmatch: {{by: loss_tokens}}"
    result = planned(
        arms, f"{STEPS}=600", "model.vocabulary=300", "pretrain.data.sequence_length=128", extends="decllm-tiny"
    )
    assert ratio(result, "train_flops") > LARGEST
    message = found(result, "refused")["spans", "budget.tokens"]
    assert message.startswith(f"{ratio(result, 'tokens'):.1f} times the tokens")


def test_matching_may_not_leave_a_training_of_few_steps_without_warm_up(planned) -> None:
    large = "{model: {d_model: 128, attention: {heads: 2}, feed_forward: {d_ff: 512}}}"
    rest = f"arms: {{base: {{}}, large: {large}}}\nmatch: {{by: train_flops}}\n"
    result = planned(rest, f"{STEPS}=300", "pretrain.training.schedule.warmup_steps=6")
    steps = result.arms[1].arm.experiment.pretrain.training.max_steps
    assert steps < 30
    refused = found(result, "refused")
    assert refused["large", "budget.steps"].startswith(f"takes {steps} steps")
    assert refused["large", "budget.warmup"].startswith("is left no warm-up by matching, of 6 steps before")
    assert ("large", "budget.parameters") in refused
    allowed = planned(f"{rest}allow: [{{key: budget, because: we ask}}]", f"{STEPS}=300")
    assert not [finding for finding in allowed.refused if finding.key != "match.by"]


# --- vocabulary ------------------------------------------------------------------------------------------------------


def test_rows_that_no_token_uses_are_named_and_refused_where_one_arm_alone_has_them(planned) -> None:
    """Bytes are 258 ids."""
    alone = found(planned("arms: {one: {}}", "model.vocabulary=2064"), "note")
    assert alone["one", "model.vocabulary"].startswith("1806 of 2064 rows are never used")
    result = planned(f"{grid('model.vocabulary: [258, 2064]')}\nallow: [{{key: budget, because: we ask}}]")
    assert found(result, "refused")["baseline/vocabulary=2064", "model.vocabulary"].startswith(
        "1806 rows beyond the ids of the tokenizer and the objective, 0 in baseline"
    )
    assert not planned(grid("model.vocabulary: [258, 264]")).refused


def test_rows_that_an_objective_needs_are_not_beyond_its_ids(planned) -> None:
    """Half of 128 bytes in spans of one are 64 sentinels: 322 ids, beside 258 of an arm without."""
    spans = "{model: {vocabulary: %d}, pretrain: {objective: {kind: span_corruption, corruption: 0.5, mean_span: 1.0}}}"
    rest = f"arms: {{prefix: {{}}, spans: {spans}}}\nallow: [{{key: budget, because: we ask}}]"
    long = "pretrain.data.sequence_length=128"
    assert ("spans", "model.vocabulary") not in found(planned(rest % 322, long), "refused")
    refused = found(planned(rest % 400, long), "refused")
    assert refused["spans", "model.vocabulary"].startswith(
        "78 rows beyond the ids of the tokenizer and the objective, 0"
    )


# --- what the metric is measured on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ("data: {tokenizer: {kind: bpe, vocabulary: 258}}", f"{TOKENIZER}.kind"),
        ("data: {sequence_length: 64, batch_size: 2}", "pretrain.data.sequence_length"),
        ("data: {validation_fraction: 0.3}", "pretrain.data.validation_fraction"),
        ("validation: {prefix_length: 5}", "pretrain.validation.prefix_length"),
        ("training: {precision: bf16}", "pretrain.training.precision"),
    ],
)
@pytest.mark.parametrize("prefix", ["pretrain", "pretrain.data", "pretrain.validation", "pretrain.training"])
def test_no_rule_for_many_keys_lets_another_primary_metric_through(planned, keys: str, key: str, prefix: str) -> None:
    arms = f"arms: {{a: {{}}, b: {{pretrain: {{{keys}}}}}}}\n"
    result = planned(f"{arms}allow: [{{key: {prefix}, because: all the same to me}}]")
    message = found(result, "refused")["b", key]
    if key.startswith(prefix):
        name = TOKENIZER if key.startswith(TOKENIZER) else key
        assert f"`{prefix}` does not allow it" in message
        assert f"`allow: [{{key: {name}, because: ...}}]`" in message


def test_the_length_of_training_is_a_budget_that_no_rule_for_its_section_allows(planned) -> None:
    rest = "arms: {a: {}, b: {pretrain: {training: {max_steps: 48}}}}\nallow: [{key: pretrain, because: we ask}]"
    assert found(planned(rest), "refused").keys() == {("b", "budget.tokens")}


def test_another_tokenizer_goes_by_its_name_and_is_compared_in_bits_per_byte(planned) -> None:
    bpe = "pretrain: {data: {tokenizer: {kind: bpe, vocabulary: 258}}}"
    rest = f"arms: {{a: {{}}, b: {{{bpe}}}}}\nallow: [{{key: {TOKENIZER}, because: the tokenizer is the question}}]\n"
    refused = found(planned(rest), "refused")
    assert refused.keys() == {("b", "compare.metric")}
    assert refused["b", "compare.metric"].endswith("compare `metric: test/bits_per_byte`")
    assert not planned(f"{rest}compare: {{metric: test/bits_per_byte}}").refused


@pytest.mark.parametrize(
    ("metric", "instead"),
    [
        ("val/perplexity", "compare `metric: val/bits_per_byte`"),
        ("eval/likelihood/nll", "compare `metric: eval/likelihood/bits_per_byte`"),
        ("eval/extrapolation/nll/prefix_half/length_1x", "so make the tokenizers equal"),
    ],
)
def test_a_metric_per_token_has_a_counterpart_per_byte_or_none(planned, metric: str, instead: str) -> None:
    rest = f"{grid(f'{TOKENIZER}: [bytes, {{kind: bpe, vocabulary: 258}}]')}\ncompare: {{metric: {metric}}}"
    evaluate = "evaluate={likelihood: {}, extrapolation: {lengths: [1]}}"
    refused = found(planned(rest, evaluate), "refused")
    assert next(message for (_, key), message in refused.items() if key == "compare.metric").endswith(instead)


def test_a_tokenizer_of_equal_settings_trained_on_other_text_is_another_one(
    write_study: Write, tmp_path: Path, store: Store
) -> None:
    """Until both are trained and hold the same tokens: 258 are the bytes and two special ones alone."""
    data = "tokenizer: {kind: bpe, vocabulary: 258}, test_fraction: 0.3, corpus: {kind: text, files: [%s/*.txt]}"
    arms = ", ".join(f"{name}: {{pretrain: {{data: {{{data % (tmp_path / name)}}}}}}}" for name in "ab")
    allow = "[{key: pretrain.data.corpus, because: the text is the question}]"
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(99):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number} " * 20)
    ablation = load_study(write_study("other", f"arms: {{{arms}}}\nallow: {allow}", allow_budgets=False))
    refused = found(plan(ablation, built=False, store=store), "refused")
    assert refused.keys() == {("b", "compare.metric")}
    assert "of the same settings but trained on other text" in refused["b", "compare.metric"]
    assert refused["b", "compare.metric"].endswith("/bits_per_byte`")
    for arm in ablation.arms:
        prepare(arm.experiment.pretrain.data, store.data)
    assert not plan(ablation, built=False, store=store).refused


# --- learning rates --------------------------------------------------------------------------------------------------


def test_one_learning_rate_for_networks_that_differ_is_said_once(planned) -> None:
    norm = grid("model.attention.output_norm: [head, none, after_out]")
    said = [key for key in found(planned(norm), "note") if key[1] == LR]
    assert said == [("all arms", LR)]
    assert "one learning rate (0.003) for all arms" in found(planned(norm), "note")["all arms", LR]


@pytest.mark.parametrize(
    "rest",
    [
        grid(f"{LR}: [1e-3, 1e-2], model.attention.output_norm: [head, none]"),
        "arms: {a: {}, b: {model: {attention: {output_norm: none}}, pretrain: {training: {optimizer: {lr: 1e-2}}}}}",
        grid("pretrain.training.optimizer.weight_decay: [0.0, 0.1]"),
    ],
    ids=["a factor", "one each", "one network"],
)
def test_where_rates_are_varied_or_networks_equal_nothing_is_said_of_them(planned, rest: str) -> None:
    assert ("all arms", LR) not in found(planned(rest), "note")


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(write_sweep: Write) -> Callable[[str], Plan]:
    """The plan of the arms of a small sweep as it stands."""

    def of(rest: str) -> Plan:
        return plan(load_sweep(write_sweep("unfair", rest, allow_budgets=False)).ablation, built=False)

    return of


TWO = "arms: {red: {}, plain: {model: {attention: {output_norm: none}}}}\n"


def test_a_learning_rate_that_is_searched_in_one_arm_alone_is_refused(searched) -> None:
    space = f"space: {{{LR}: {{log_uniform: [1e-4, 1e-1], when: {{model.attention.output_norm: none}}}}}}"
    result = searched(TWO + space)
    assert found(result, "refused").keys() == {("plain", LR)}
    assert "is searched here alone" in found(result, "refused")["plain", LR]
    allowed = searched(f"{TWO}{space}\nallow: [{{key: {LR}, because: the other one is tuned already}}]")
    assert not allowed.refused
    assert not searched(f"{TWO}space: {{{LR}: {{log_uniform: [1e-4, 1e-1]}}}}").findings


def test_other_ranges_for_each_arm_are_named(searched) -> None:
    ranges = ", ".join(
        f"lr_{name}: {{key: {LR}, log_uniform: [1e-4, {high}], when: {{model.attention.output_norm: {name}}}}}"
        for name, high in (("head", "1e-1"), ("none", "4e-3"))
    )
    result = searched(f"{TWO}space: {{{ranges}}}")
    assert not result.refused
    assert found(result, "note")["plain", LR] == (
        "is searched over log_uniform [0.0001, 0.004], and over log_uniform [0.0001, 0.1] in red"
    )


@pytest.mark.parametrize(
    ("key", "values", "budget", "sentence"),
    [
        (STEPS, "{int: [6, 24]}", "tokens", "2.0 times the tokens"),
        ("pretrain.data.batch_size", "{choice: [4, 16]}", "tokens", "4.0 times the tokens"),
        ("model.decoder.layers", "{int: [1, 6]}", "parameters", "times the parameters"),
    ],
)
def test_a_searched_budget_is_refused_unless_it_is_bounded_or_allowed(
    searched, key: str, values: str, budget: str, sentence: str
) -> None:
    rest = f"arms: {{red: {{}}}}\nspace: {{{key}: {values}}}"
    message = found(searched(rest), "refused")["red", f"budget.{budget}"]
    assert message.startswith(f"searching {key} reaches ")
    assert sentence in message
    for loose in (f"{budget} >= 1", f"{budget} <= 1e9", "train_flops <= 1e30"):
        assert ("red", f"budget.{budget}") in found(searched(f"{rest}\nconstraints: ['{loose}']"), "refused")
    advised = message.partition("constraints: [")[2].partition("]")[0]
    assert not searched(f"{rest}\nconstraints: ['{advised}']").refused
    assert not searched(f"{rest}\nallow: [{{key: budget, because: it is the question}}]").refused


@pytest.mark.parametrize(("most", "times"), [(1.05, None), (1.5, "1.5 times"), (2.5, "2.5 times")])
def test_the_last_value_that_a_constraint_permits_is_judged_not_the_end_of_the_range(
    searched, most: float, times: str | None
) -> None:
    """From 12 steps, of which the file permits so many times as many, in a range up to 1200."""
    rest = f"arms: {{red: {{}}}}\nspace: {{{STEPS}: {{int: [6, 1200]}}}}\nconstraints: ['{STEPS} <= {12 * most}']"
    refused = found(searched(rest), "refused")
    assert bool(refused) == (times is not None)
    if times is not None:
        assert f"reaches {times} the tokens" in refused["red", "budget.tokens"]


def test_a_search_of_smaller_budgets_alone_lets_no_trial_win_by_them(searched) -> None:
    assert not searched(f"arms: {{red: {{}}}}\nspace: {{{STEPS}: {{int: [6, 12]}}}}").refused


def test_a_cost_that_is_a_goal_may_be_searched(searched) -> None:
    goals = "optimize: [{metric: val/target_nll}, {metric: decode_flops_per_token}]"
    assert not searched(f"arms: {{red: {{}}}}\nspace: {{model.decoder.layers: {{int: [1, 6]}}}}\n{goals}").refused


# --- settings without effect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "why"),
    [
        ("pretrain.training.clip_norm: [null, 1e9]", "clip_norm of 1e+09 never clips"),
        ("pretrain.training.z_loss: [0.0, 1e-30]", "z_loss of 1e-30 is lost in rounding"),
        ("pretrain.training.dropout: [0.0, 1e-12]", "dropout of 1e-12 drops fewer than one entry in ten million"),
        ("pretrain.training.attention_dropout: [0.0, 1e-12]", "attention_dropout of 1e-12 drops fewer than one"),
        ("pretrain.training.optimizer.weight_decay: [0.0, 1e-6]", "takes 3e-09 of a weight in a step"),
        ("model.attention.softcap: [null, 1e6]", "softcap of 1e+06 bends no score"),
        ("model.output.softcap: [null, 1e6]", "softcap of 1e+06 bends no logit"),
        (
            "pretrain.training.schedule: [{kind: constant}, {kind: constant, warmup_steps: 1}]",
            "the learning rate is the same in every step",
        ),
        (
            "pretrain.training.schedule: [{kind: constant}, {kind: cosine, final_fraction: 1.0, warmup_steps: 0}]",
            "the learning rate is the same in every step",
        ),
        (
            "pretrain.training.weight_averaging: [{decay: 0.99}, {decay: 0.999}]",
            "weight_averaging.decay of 0.999 is not reached in 12 steps: its warm-up ends at 0.5909",
        ),
        ("pretrain.training.weight_averaging: [{decay: 0.2}, {decay: 0.2, warmup: false}]", "the same in effect"),
        ("pretrain.training.optimizer.lr_groups: [{}, {embeddings: 1.0}]", "lr_groups.embeddings of 1 changes nothing"),
        (
            "pretrain.training.optimizer.lr_groups: [{attention: 0.5}, {self_attention: 0.5, cross_attention: 0.5}]",
            "the same in effect",
        ),
        (
            "pretrain.training.optimizer.weight_decay_groups: [{}, {embeddings: 0.5}]",
            "embeddings of 0.5 multiplies a weight decay of 0",
        ),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_a_factor_whose_values_do_nothing_makes_no_op_arms(planned, factor: str, why: str, built: bool) -> None:
    """Said once, whether or not the small networks that a plan builds show it too."""
    result = planned(grid(factor), built=built)
    said = [finding for finding in result.findings if finding.kind == "no_op"]
    assert len(said) == 1
    assert why in said[0].message
    assert "baseline" in said[0].message


@pytest.mark.parametrize("extends", ["redllm-tiny", "decllm-tiny", "yoco-tiny"])
def test_a_window_wider_than_the_text_is_a_no_op_arm_and_named(planned, extends: str) -> None:
    """Texts of 32 tokens."""
    result = planned(grid("model.attention.window: [32, 1000]"), extends=extends, built=True)
    assert [finding.arm for finding in result.findings if finding.kind == "no_op"] == ["baseline/window=1000"]
    assert (
        "1000 is no window: the longest text has 32"
        in found(result, "note")["baseline/window=1000", "model.attention.window"]
    )
    longer = planned("", "model.attention.window=40", "evaluate={extrapolation: {lengths: [1, 2]}}", extends=extends)
    assert not [finding for finding in longer.findings if finding.key == "model.attention.window"]


@pytest.mark.parametrize(
    "factor",
    [
        "pretrain.training.clip_norm: [null, 1.0]",
        "pretrain.training.clip_norm: [1.0, 1e9]",
        "pretrain.training.z_loss: [0.0, 1e-6]",
        "pretrain.training.dropout: [0.0, 1e-3]",
        "pretrain.training.feed_forward_dropout: [0.0, 1e-3]",
        "pretrain.training.weight_averaging: [null, ema]",
        "pretrain.training.weight_averaging: [{decay: 0.5}, {decay: 0.9}]",
        "pretrain.training.weight_averaging: [{kind: last_k, k: 3, every: 1}, {kind: last_k, k: 3, every: 2}]",
        "pretrain.training.optimizer.lr_groups: [{}, {embeddings: 0.5}]",
        "pretrain.training.optimizer.lr_groups: [{attention: 0.5}, {attention: 0.5, cross_attention: 1.0}]",
        "pretrain.training.optimizer: [{weight_decay: 1}, {weight_decay: 1, weight_decay_groups: {embeddings: 0.5}}]",
        "pretrain.training.optimizer.weight_decay: [0.0, 1e-3]",
        "model.attention.softcap: [null, 50.0]",
        "pretrain.training.schedule: [{kind: cosine, warmup_steps: 0}, {kind: cosine, warmup_steps: 2}]",
        "pretrain.training.schedule: [{kind: linear}, {kind: cosine}]",
    ],
)
def test_a_factor_that_does_something_makes_none(planned, factor: str) -> None:
    assert not [finding for finding in planned(grid(factor)).findings if finding.kind == "no_op"]


def test_an_idle_setting_that_all_arms_share_is_a_note(planned) -> None:
    notes = found(planned(grid(f"{LR}: [1e-3, 1e-2]"), "pretrain.training.clip_norm=5000"), "note")
    assert {arm for arm, key in notes if key == "pretrain.training.clip_norm"} == {"baseline", "baseline/lr=0.01"}


def test_an_arm_that_differs_in_more_than_idle_settings_is_no_no_op(planned) -> None:
    """Two learning rates crossed with a clip that never clips: each rate has a no-op of its own."""
    factors = f"grid: {{design: factorial, factors: {{{LR}: [1e-3, 1e-2], pretrain.training.clip_norm: [null, 1e9]}}}}"
    said = [finding for finding in planned(factors).findings if finding.kind == "no_op"]
    assert [finding.message.split(",")[0] for finding in said] == [
        "trains as baseline does",
        "trains as baseline/lr=0.01 does",
    ]


def test_an_override_with_false_is_no_no_op_beside_an_idle_setting_of_another_arm(planned) -> None:
    """The base scales queries, keys and values by learned numbers; the encoder of one arm does not."""
    arms = (
        "arms: {baseline: {}, unscaled: {model: {encoder: {attention: {qkv_norm_scale: false}}}}, "
        "clipped: {pretrain: {training: {clip_norm: 1e5}}}}"
    )
    norms = (
        "model.attention.qkv_norm=[q, k, v]",
        "model.attention.qkv_norm_scale=true",
        "pretrain.training.clip_norm=null",
    )
    said = [finding for finding in planned(arms, *norms).findings if finding.kind == "no_op"]
    assert "unscaled" not in [finding.arm for finding in said]


def test_the_thresholds_are_those_of_float32() -> None:
    """A z-loss and a decay just below them leave every bit of loss, gradient and weight; ten times as much does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 300, generator=generator) + LOG_NORMALISER - 6
    targets = torch.randint(300, (64,), generator=generator)

    def step(z_loss: float) -> torch.Tensor:
        given = logits.clone().requires_grad_()
        normaliser = given.logsumexp(-1)
        loss = (F.cross_entropy(given, targets, reduction="none") + z_loss * normaliser**2).sum()
        (gradient,) = torch.autograd.grad(loss, given)
        return gradient

    idle = 0.99 * ROUNDING / (2 * LOG_NORMALISER)
    plain = step(0.0)
    changed = [(step(z) - plain).abs().max() / plain.abs().max() for z in (idle, 1e4 * idle)]
    assert changed[0] < 2 * ROUNDING * 2
    assert changed[1] > 100 * ROUNDING

    weights = torch.randn(10_000, generator=generator)
    assert torch.equal(weights * (1 - 0.99 * ROUNDING), weights)
    assert not torch.equal(weights * (1 - 4 * ROUNDING), weights)


# --- what it costs to know -------------------------------------------------------------------------------------------


def test_costs_are_computed_once_for_each_arm(write_study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_llm.studies import plan as planning
    from lit_llm.studies.audit import differing_keys

    calls: list[object] = []
    original = planning.cost_of
    monkeypatch.setattr(planning, "cost_of", lambda *given: calls.append(given) or original(*given))
    monkeypatch.setattr(differing_keys, "cost_of", lambda *given: pytest.fail("the plan has computed it already"))
    ablation: Ablation = load_study(write_study("once", grid(f"{LR}: [1e-3, 3e-3, 1e-2]")))
    findings: tuple[Finding, ...] = planning.plan(ablation, built=False).findings
    assert len(calls) == 3
    assert not [finding for finding in findings if finding.kind == "refused"]
