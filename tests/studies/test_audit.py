"""Is the comparison fair? Between an arm and its baseline only what was declared may differ."""

import json

import pytest

from lit_llm.config.problems import InputError
from lit_llm.studies.audit.differing_keys import audit, differs, under
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from tests.equal_budgets import budgets_allowed, others


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"{number} some words " * 20)
    return folder


@pytest.fixture
def study(tmp_path, text):
    """study(text, *overrides): a study of tiny models on three small documents."""

    def load(body, *overrides):
        path = tmp_path / "s.yaml"
        data = f"{{corpus: {{kind: text, files: ['{text}/*.txt']}}, tokenizer: bytes}}"
        base = f"base: {{model: {{vocabulary: 280}}, pretrain: {{data: {data}}}}}"
        path.write_text(budgets_allowed(f"study: s\nquestion: q\nextends: redllm-tiny\n{base}\n{body}\n"))
        return load_study(path, overrides)

    return load


@pytest.fixture
def findings(study):
    """{(kind, arm, key)} of a study's findings, those of budgets left out."""

    def of(body, *overrides):
        found = others(audit(study(body, *overrides)))
        assert len({(f.kind, f.arm, f.key) for f in found}) == len(found)
        return {(f.kind, f.arm, f.key) for f in found}

    return of


OBJECTIVE = ("note", "dec", "pretrain.objective")
LR = "pretrain.training.optimizer.lr"
NORM = "model.attention.output_norm"
LENGTH = "pretrain.data.sequence_length"


def test_a_preset_of_its_own_may_bring_another_model_and_objective(findings):
    assert findings("arms: {red: {}, dec: {extends: decllm-tiny}}") == {OBJECTIVE}


def test_an_open_prefix_is_an_intervention_too(findings):
    open_prefix = "extends: decllm-tiny, pretrain: {objective: prefix_lm, masks: {prefix: bidirectional}}"
    assert findings(f"arms: {{red: {{}}, dec: {{{open_prefix}}}}}") == set()  # both are prefix LMs


def test_separate_documents_are_an_intervention_whose_flops_are_known_as_a_bound_only(findings):
    """How many pairs the borders leave visible is known when the text is read, not when the plan is made."""
    separate = "extends: decllm-tiny, pretrain: {objective: prefix_lm, masks: {intra_document: true}}"
    assert findings(f"arms: {{red: {{}}, dec: {{{separate}}}}}") == {("note", "dec", "pretrain.masks.intra_document")}
    both = findings("arms: {red: {}, b: {model: {feed_forward: {d_ff: 64}}}}", "pretrain.masks.intra_document=true")
    assert both == {("note", arm, "pretrain.masks.intra_document") for arm in ("red", "b")}


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ("training: {optimizer: {lr: 1e-2}}", LR),
        ("training: {max_steps: 200}", "pretrain.training.max_steps"),
        ("training: {clip_norm: null}", "pretrain.training.clip_norm"),
        ("training: {precision: bf16}", "pretrain.training.precision"),
        ("training: {execution: {threads: 2}}", "pretrain.training.execution.threads"),
        ("data: {batch_size: 8}", "pretrain.data.batch_size"),
        ("data: {sequence_length: 64}", LENGTH),
        ("data: {validation_fraction: 0.3}", "pretrain.data.validation_fraction"),
        ("data: {tokenizer: {kind: bpe, vocabulary: 280}}", "pretrain.data.tokenizer.kind"),
        ("validation: {sequences: 8}", "pretrain.validation.sequences"),
    ],
)
def test_anything_else_that_an_arm_changes_is_refused_unless_it_is_allowed_with_a_reason(findings, keys, key):
    arms = f"arms: {{red: {{}}, dec: {{extends: decllm-tiny, pretrain: {{{keys}}}}}}}"
    arms += "\ncompare: {metric: val/bits_per_byte}"  # which another tokenizer asks for
    refused = {(kind, arm, found) for kind, arm, found in findings(arms) if kind == "refused"}
    assert ("refused", "dec", key) in refused
    assert all(under(found, key, key.rpartition(".")[0]) for _, _, found in refused)
    allow = "allow: [" + ", ".join(f"{{key: {found}, because: we ask}}" for _, _, found in refused) + "]"
    assert {kind for kind, _, _ in findings(f"{arms}\n{allow}")} == {"allowed", "note"}


def test_the_arms_without_a_preset_of_their_own_are_held_to_the_same_rule(findings):
    arms = "arms: {red: {}, own: {model: {attention: {output_norm: none}}, pretrain: {training: {max_steps: 40}}}}"
    assert findings(arms) == {("refused", "own", "pretrain.training.max_steps")}


def test_a_reason_is_shown_and_a_prefix_of_keys_is_allowed_whole_but_for_what_the_metric_is_measured_on(study):
    arms = "arms: {red: {}, dec: {extends: decllm-tiny, pretrain: {data: {batch_size: 8, sequence_length: 64}}}}"
    found = others(audit(study(f"{arms}\nallow: [{{key: pretrain.data, because: the budget is equal}}]")))
    assert [(finding.kind, finding.key) for finding in found if finding.kind != "note"] == [
        ("refused", LENGTH),
        ("allowed", "pretrain.data.batch_size"),
    ]
    assert "because the budget is equal" in found[1].message
    both = f"{arms}\nallow: [{{key: pretrain.data, because: a}}, {{key: {LENGTH}, because: b}}]"
    assert {finding.kind for finding in others(audit(study(both)))} == {"allowed", "note"}
    narrow = audit(study(f"{arms}\nallow: [{{key: pretrain.data.batch, because: a part of a word is no key}}]"))
    assert {finding.kind for finding in others(narrow)} == {"refused", "note"}


def test_the_message_says_both_values_and_what_can_be_done(study):
    (finding,) = others(audit(study("arms: {red: {}, b: {pretrain: {data: {batch_size: 8}}}}")))
    assert "16 in red, 8 here" in finding.message
    assert "make it equal, a factor, or `allow` it" in finding.message


def test_a_factor_is_declared_and_so_is_what_a_bundle_sets(findings):
    assert findings(f"grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}") == set()
    bundle = "grid: {factors: {size: {s: {pretrain.data.batch_size: 8}, l: {pretrain.training.clip_norm: 2}}}}"
    assert findings(bundle) == set()


def test_an_arm_meets_the_baseline_of_its_level_so_that_only_the_rest_differs(study):
    body = f"""
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}
grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}
compare: {{stratify_by: [{LR}]}}
"""
    ablation = study(body)
    changed = differs(ablation.arm("dec/lr=0.01"), ablation.arm("red/lr=0.01"))
    assert LR not in changed
    assert changed["model.family"] == ["encoder_decoder", "decoder"]


def test_differs_shows_both_sides_and_none_for_a_key_that_only_one_has(study):
    ablation = study("arms: {red: {}, dec: {extends: decllm-tiny}}")
    changed = differs(ablation.arm("dec"), ablation.arm("red"))
    assert changed["model.encoder.layers"] == [2, None]
    assert changed["model.decoder.layers"] == [2, 4]
    assert changed["pretrain.objective.split"] == ["half", None]
    assert "seed" not in changed


@pytest.mark.parametrize(
    "body",
    [
        "arms: {red: {}, same: {}}",
        "arms: {red: {}, same: {model: {attention: {kv_heads: 4}}}}",
        "arms: {red: {model: {attention: {qkv_norm: [q, k, v]}}}, same: {model: {attention: {qkv_norm: [v, k, q]}}}}",
        "arms: {red: {model: {decoder: {cross_attention: {rope: none}}}}, "
        "same: {model: {decoder: {layer_ranges: {0-1: {cross_attention: {rope: none}}}}}}}",
        "arms: {dec: {extends: decllm-tiny}, same: {extends: decllm-tiny, model: {attention: {rope: restart}}}}",
        "arms: {dec: {extends: decllm-tiny}, "
        "same: {extends: decllm-tiny, model: {attention: {output_norm_scale: true}}}}",
    ],
)
def test_an_arm_that_computes_the_same_as_its_baseline_is_a_no_op(findings, body):
    assert [kind for kind, _, _ in findings(body)] == ["no_op"]


def test_a_scale_or_a_mask_that_does_something_is_no_no_op(findings):
    scaled = "scaled: {extends: decllm-tiny, model: {attention: {qkv_norm_scale: true}}}"
    assert findings(f"arms: {{dec: {{extends: decllm-tiny}}, {scaled}}}") == {("note", "scaled", "parameters")}


def test_the_objectives_own_loss_is_not_compared_across_objectives(findings):
    body = "arms: {red: {}, dec: {extends: decllm-tiny}}\ncompare: {metric: val/objective_loss}"
    assert findings(body) == {("refused", "dec", "compare.metric"), OBJECTIVE}
    factor = "grid: {factors: {pretrain.objective.split: [half, random]}}\ncompare: {metric: val/objective_loss}"
    kinds = {(kind, key) for kind, _, key in findings(factor)}
    assert ("refused", "compare.metric") in kinds
    same = f"grid: {{factors: {{{NORM}: [head, none]}}}}\ncompare: {{metric: val/objective_loss}}"
    assert findings(same) == set()


@pytest.mark.parametrize(
    "factor",
    [
        f"{LENGTH}: [128, 64]",
        "pretrain.data.validation_fraction: [0.1, 0.3]",
        "pretrain.data.tokenizer: [bytes, {kind: bpe, vocabulary: 280}]",
        "pretrain.validation.prefix_length: [64, 32]",
        "pretrain.validation.sequences: [64, 32]",
        "pretrain.data: [{sequence_length: 128}, {sequence_length: 64}]",
    ],
)
def test_a_factor_that_moves_the_primary_metric_is_refused_for_a_metric_of_validation(findings, factor):
    """Another length, split or tokenizer: other target tokens, so val/ numbers do not compare."""
    kinds = {kind for kind, _, _ in findings(f"grid: {{factors: {{{factor}}}}}")}
    assert kinds == {"refused"}
    other = f"grid: {{factors: {{{factor}}}}}\ncompare: {{metric: throughput/tokens_per_second}}"
    assert findings(other) == set()


def test_a_moved_primary_metric_may_be_allowed_with_a_reason(findings):
    body = f"grid: {{factors: {{{LENGTH}: [128, 64]}}}}\nallow: [{{key: {LENGTH}, because: bits per byte}}]"
    assert findings(body) == {("allowed", "baseline/sequence_length=64", LENGTH)}


def test_a_refused_study_is_stopped_with_every_refusal(study):
    body = "arms: {red: {}, b: {extends: decllm-tiny, pretrain: {data: {batch_size: 8}, training: {max_steps: 40}}}}"
    with pytest.raises(InputError) as caught:
        plan(study(body)).check()
    assert [problem.key for problem in caught.value.problems] == [
        "pretrain.data.batch_size",
        "pretrain.training.max_steps",
    ]
    plan(study("arms: {red: {}, dec: {extends: decllm-tiny}}")).check()


def test_under_means_the_key_itself_or_below_it():
    assert under("a.b.c", "x", "a.b")
    assert under("a.b", "a.b")
    assert not under("a.bc", "a.b")
    assert not under("a", "a.b")
    assert not under("a")


def test_an_arm_outside_the_grid_has_no_level_that_would_excuse_its_value(findings):
    arms = "arms: {red: {}, dec: {extends: decllm-tiny, grid: false, pretrain: {training: {optimizer: {lr: 1e-2}}}}}"
    body = f"{arms}\ngrid: {{factors: {{{LR}: [1e-3, 3e-3]}}}}"
    assert ("refused", "dec", LR) in findings(body)


def test_an_arm_that_differs_in_itself_and_in_a_factor_is_noted(findings):
    body = f"arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}\ngrid: {{factors: {{{LR}: [1e-3, 3e-3]}}}}"
    assert ("note", "dec/lr=0.003", "compare") in findings(body)
    assert ("note", "dec/lr=0.003", "compare") not in findings(body + f"\ncompare: {{stratify_by: [{LR}]}}")


def test_two_arms_of_one_computation_are_reported_though_neither_is_the_baseline(findings):
    without = "{model: {attention: {output_norm: none}}}"
    same = "{model: {attention: {output_norm: none, output_norm_scale: true}}}"
    assert ("no_op", "b", "") in findings(f"arms: {{red: {{}}, a: {without}, b: {same}}}")


@pytest.mark.parametrize("metric", ["val/traget_nll", "train/loss"])
def test_a_metric_that_is_none_or_depends_on_the_objective_is_refused(study, metric):
    with pytest.raises(InputError, match="compare.metric"):
        study(f"arms: {{red: {{}}}}\ncompare: {{metric: {metric}}}")


def test_the_loss_on_one_source_can_be_compared_where_every_arm_reads_it(study, tmp_path):
    for name in ("web", "books"):
        (tmp_path / f"{name}.txt").write_text(name)
    sources = {name: {"corpus": {"kind": "text", "files": [f"{tmp_path}/{name}.txt"]}} for name in ("web", "books")}
    mixture = json.dumps({"pretrain": {"data": {"corpus": {"kind": "mixture", "sources": sources}}}})
    both, one = f"arms: {{red: {mixture}, other: {mixture}}}", f"arms: {{red: {mixture}, other: {{}}}}"

    def compared(arms, metric):
        return study(f"{arms}\ncompare: {{metric: {metric}}}").study.compare.metric

    assert compared(both, "val/target_nll/books") == "val/target_nll/books"
    with pytest.raises(InputError, match="compare.metric: red: its corpus has no source 'boks' - did you mean 'books'"):
        compared(both, "val/target_nll/boks")
    with pytest.raises(InputError, match="compare.metric: other: its corpus has no source 'books'"):
        compared(one, "val/target_nll/books")
    with pytest.raises(InputError, match="compare.metric: .* is not possible - did you mean 'val/target_nll'"):
        compared(both, "val/target_nl")


def test_compiled_and_eager_arms_are_no_comparison(study, monkeypatch):
    """Retention is not compiled for rows of other lengths, and the arm without it is."""
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: "")
    tuned = (
        "finetune={data: {examples: {kind: jsonl, files: [a]}, input_length: 8, target_length: 4, batch_size: 4}, "
        "training: {max_steps: 2, schedule: constant, execution: {kernels: KERNELS}}}"
    )
    arms = "arms: {dec: {extends: decllm-tiny}, kept: {extends: decllm-tiny, model: {decoder: {retention: {}}}}}"
    key = "finetune.training.execution.kernels"
    for kernels, refused in (("compiled", ["kept"]), ("auto", [])):
        found = audit(study(arms, tuned.replace("KERNELS", kernels)), built=False)
        assert [each.arm for each in found if (each.kind, each.key) == ("refused", key)] == refused
        assert all("retention" in each.message for each in found if each.key == key)
