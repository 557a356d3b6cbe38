"""Arms that are compared with one another along a chain, and studies that are like another."""

import pytest

from lit_llm.config.problems import InputError
from lit_llm.experiment.cost import cost_of
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.run_results import RunResult
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.load import is_study, load_study
from tests.equal_budgets import budgets_allowed, others

HEAD = "study: s\nquestion: Does it?\nextends: redllm-tiny\n"
NORM = "model.attention.output_norm"
STEPS = "pretrain.training.max_steps"
LADDER = """
extends: decllm-tiny
arms:
  dec: {}
  prefix: {baseline: dec, pretrain: {objective: prefix_lm}}
  red: {extends: redllm-tiny, baseline: prefix}
"""


def refused(path):
    with pytest.raises(InputError) as caught:
        load_study(path)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


@pytest.fixture
def write(tmp_path):
    def write(text, name="s.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def baselines(ablation):
    return {arm.name: arm.baseline for arm in ablation.arms}


# --- against -------------------------------------------------------------------------------------------------------


def test_each_rung_is_compared_with_the_one_that_it_names(write):
    ablation = load_study(write(f"study: s\nquestion: Does it?\n{LADDER}"))
    assert baselines(ablation) == {"dec": "dec", "prefix": "dec", "red": "prefix"}


def test_a_rung_of_a_grid_is_compared_at_its_own_level(write):
    lr = "pretrain.training.optimizer.lr"
    grid = f"grid: {{design: factorial, factors: {{{lr}: [1e-3, 1e-2]}}}}\ncompare: {{stratify_by: [{lr}]}}"
    ablation = load_study(write(f"study: s\nquestion: Does it?\n{LADDER}{grid}"))
    assert baselines(ablation) == {
        "dec": "dec",
        "dec/lr=0.01": "dec/lr=0.01",
        "prefix": "dec",
        "prefix/lr=0.01": "dec/lr=0.01",
        "red": "prefix",
        "red/lr=0.01": "prefix/lr=0.01",
    }


def test_an_arm_against_itself_is_a_baseline_of_its_own(write):
    arms = "arms: {red: {}, dec: {extends: decllm-tiny, baseline: dec}}\n"
    ablation = load_study(write(f"{HEAD}{arms}grid: {{factors: {{{NORM}: [head, none]}}}}"))
    assert baselines(ablation) == {
        "red": "red",
        "red/output_norm=none": "red",
        "dec": "dec",
        "dec/output_norm=none": "dec",
    }


def test_along_a_ladder_every_rung_is_matched_with_the_first(write):
    """Each within half a step of the foot's FLOPs, however many rungs lie between."""
    ablation = load_study(write(f"study: s\nquestion: Does it?\n{LADDER}match: {{by: train_flops}}"))
    flops = {arm.name: cost_of(arm.experiment).train_flops for arm in ablation.arms}
    for arm in ablation.arms[1:]:
        half_a_step = 0.5 * flops[arm.name] / arm.experiment.pretrain.training.max_steps
        assert abs(flops[arm.name] - flops["dec"]) <= half_a_step
        assert arm.residual == pytest.approx(flops[arm.name] / flops["dec"] - 1)


def refusals(ablation):
    """(arm, key) of what is refused, but for budgets."""
    found = others(audit(ablation, built=False))
    return {(finding.arm, finding.key) for finding in found if finding.kind == "refused"}


def test_matching_excuses_what_it_moved_and_nothing_that_differed_before(write):
    """`prefix` warms up for longer than `dec` by itself; that matching then scales its warm-up makes it no fairer."""
    by = "match: {by: train_flops}"
    assert refusals(load_study(write(f"study: s\nquestion: Does it?\n{LADDER}{by}"))) == set()
    longer = "pretrain: {objective: prefix_lm, training: {schedule: {warmup_steps: 150}}}"
    own = LADDER.replace("pretrain: {objective: prefix_lm}", longer)
    found = refusals(load_study(write(f"study: s\nquestion: Does it?\n{own}{by}")))
    assert found == {(arm, "pretrain.training.schedule.warmup_steps") for arm in ("prefix", "red")}


def test_a_rung_that_did_not_have_to_move_is_fair_against_one_that_was_moved(write):
    rung = "  causal: {baseline: prefix, model: {attention: {output_norm: head}}}\n"
    ablation = load_study(write(f"study: s\nquestion: Does it?\n{LADDER}{rung}match: {{by: train_flops}}"))
    steps = [ablation.arm(name).experiment.pretrain.training.max_steps for name in ("prefix", "causal")]
    assert steps[0] != steps[1]
    assert refusals(ablation) == set()


def test_a_factor_excuses_nothing_against_a_baseline_outside_the_grid(write):
    lr = "pretrain.training.optimizer.lr"
    arms = "arms: {dec: {extends: decllm-tiny, grid: false}, red: {}}"
    ablation = load_study(write(f"{HEAD}{arms}\ngrid: {{factors: {{{lr}: [3e-3, 1e-2]}}}}"))
    assert refusals(ablation) == {("red/lr=0.01", lr)}


@pytest.mark.parametrize(
    ("by", "bundle", "moves"),
    [
        ("parameters", "model.feed_forward: {d_ff: 128}", "model.feed_forward.d_ff"),
        ("tokens", "pretrain.training: {max_steps: 50}", STEPS),
    ],
)
def test_matching_does_not_undo_a_factor_that_is_a_bundle(write, by, bundle, moves):
    path = write(
        f"{HEAD}grid: {{factors: {{size: {{a: {{model.attention.heads: 2}}, b: {{{bundle}}}}}}}}}\nmatch: {{by: {by}}}"
    )
    assert refused(path) == [f"s.yaml:5: match.by: {by} moves {moves}, which is a factor of the study too"]


def test_a_circle_of_baselines_is_refused(write):
    path = write(f"{HEAD}arms:\n  a: {{}}\n  b: {{baseline: c}}\n  c: {{baseline: b}}")
    assert refused(path) == ["s.yaml:6: arms.b.baseline: is compared with itself in a circle: b -> c -> b"]


def test_an_arm_against_one_that_is_not_there_is_refused(write):
    path = write(f"{HEAD}arms:\n  red: {{}}\n  dec: {{extends: decllm-tiny, baseline: rad}}")
    assert refused(path) == ["s.yaml:6: arms.dec.baseline: there is no arm 'rad' - did you mean 'red'?"]


def test_an_arm_that_ends_two_paths_is_a_note_and_within_one_path_a_no_op(write):
    second = "  normed: {extends: redllm-tiny, baseline: dec}\n  again: {extends: redllm-tiny, baseline: prefix}\n"
    ablation = load_study(write(budgets_allowed(f"study: s\nquestion: Does it?\n{LADDER}{second}")))
    kinds = {(finding.arm, finding.kind) for finding in audit(ablation) if "same computation" in finding.message}
    assert kinds == {("normed", "note"), ("again", "no_op")}


def test_the_difference_of_a_rung_is_from_the_rung_below_it():
    """1.0, 1.5, 1.2: the second rung gains 0.5, the third loses 0.3 of it, whatever the foot is."""
    rungs = {"foot": ("foot", 1.0), "middle": ("foot", 1.5), "top": ("middle", 1.2)}
    runs = [
        RunResult(arm, below, seed, "done", {"metrics": {"m": value + 0.1 * seed}, "flops": 1, "parameters": 1})
        for arm, (below, value) in rungs.items()
        for seed in (0, 1)
    ]
    found = {row.arm: row.difference for row in compare(runs, "m").rows}
    assert found["foot"] is None
    assert found["middle"].mean == pytest.approx(0.5)
    assert found["top"].mean == pytest.approx(-0.3)


# --- like ----------------------------------------------------------------------------------------------------------

PARENT = f"""{HEAD}base:
  pretrain: {{data: {{batch_size: 8}}, training: {{max_steps: 50}}}}
arms: {{red: {{}}, dec: {{extends: decllm-tiny, model: {{d_model: 32}}}}}}
grid: {{design: factorial, factors: {{{NORM}: [head, none], {STEPS}: [50, 60]}}}}
seeds: [0, 1]
"""


def test_a_study_like_another_is_that_study(write):
    parent = load_study(write(PARENT))
    child = load_study(write("study: child\nextends_study: s.yaml\n", "child.yaml"))
    assert child.study.study == "child"
    assert child.arms == parent.arms
    assert child.study.seeds == parent.study.seeds


def test_what_it_says_itself_replaces_the_base_and_a_factors_levels_and_merges_the_rest(write):
    write(PARENT)
    own = "study: child\nextends_study: s.yaml\nbase: {}\narms: {dec: {extends: decllm-150m}}\n"
    child = load_study(write(f"{own}grid: {{factors: {{{STEPS}: [4000, 5000]}}}}", "child.yaml"))
    ends = [f"{norm}{steps}" for norm in ("", "/output_norm=none") for steps in ("", "/max_steps=5000")]
    assert baselines(child).keys() == {f"{arm}{end}" for arm in ("red", "dec") for end in ends}
    red, dec = child.arm("red").experiment, child.arm("dec").experiment
    assert red.pretrain.data.batch_size == 16  # the preset's: the base is gone
    assert red.pretrain.training.max_steps == 4000
    assert dec.model.feed_forward.d_ff == 4096  # the other preset
    assert dec.model.d_model == 32  # what the arm said besides


def test_it_has_a_name_of_its_own(write):
    write(PARENT)
    child = write("extends_study: s.yaml\nseeds: [7]\n", "child.yaml")
    assert is_study(str(child))
    assert refused(child) == ["child.yaml:1: study: is needed, and there is no default"]


def test_named_levels_are_replaced_too(write):
    factor = "grid: {factors: {width: {a: {model.d_model: 64}, b: {model.d_model: 32}}}}"
    write(f"{HEAD}{factor}")
    own = (
        "study: child\nextends_study: s.yaml\ngrid: {factors: {width: {c: {model.d_model: 16}, d: {model.d_model: 8}}}}"
    )
    assert baselines(load_study(write(own, "child.yaml"))).keys() == {"baseline", "baseline/width=d"}


def test_a_mistake_is_shown_in_the_file_that_made_it(write):
    write(PARENT.replace("batch_size", "batch_sise"))
    child = write("study: child\nextends_study: s.yaml\nseeds: []\n", "child.yaml")
    assert refused(child) == [
        "child.yaml:3: seeds: needs at least one seed, for example [0, 1, 2]",
        "s.yaml:5: pretrain.data.batch_sise: unknown key - did you mean 'batch_size'?",
    ]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("t.yaml", "there is no study 't.yaml' in the same folder - did you mean 's.yaml'?"),
        ("../s.yaml", "there is no study '../s.yaml' in the same folder - did you mean 's.yaml'?"),
        ("child.yaml", "extends itself: child.yaml -> child.yaml"),
    ],
)
def test_a_study_that_extends_nothing_is_refused(write, other, said):
    write(PARENT)
    assert refused(write(f"study: child\nextends_study: {other}\n", "child.yaml")) == [
        f"child.yaml:2: extends_study: {said}"
    ]


def test_matching_goes_with_a_factor_that_arm_and_baseline_share(write):
    """Two sizes at two budgets: each arm has its baseline's FLOPs at its own level, and the levels stay apart."""
    sizes = "arms: {one: {}, half: {model: {d_model: 32, attention: {heads: 2}, feed_forward: {d_ff: 128}}}}"
    bundles = "short: {pretrain.training.max_steps: 60}, long: {pretrain.training.max_steps: 240}"
    path = write(
        f"{HEAD}{sizes}\ngrid: {{factors: {{budget: {{{bundles}}}}}}}\n"
        "match: {by: train_flops}\ncompare: {stratify_by: [budget]}"
    )
    ablation = load_study(path)
    flops = {arm.name: cost_of(arm.experiment).train_flops for arm in ablation.arms}
    assert flops["half"] == pytest.approx(flops["one"], rel=0.01)
    assert flops["half/budget=long"] == pytest.approx(flops["one/budget=long"], rel=0.01)
    assert flops["one/budget=long"] == pytest.approx(4 * flops["one"])
    assert refusals(ablation) == set()
