"""Paired and fractional designs of a study: which arms there are, what they are compared with, what is refused."""

from __future__ import annotations

import itertools
import re

import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.config.tree import leaves
from lit_llm.report.pages.study import markdown_of
from lit_llm.report.tables.comparison import render_comparison
from lit_llm.report.tables.plan import render_plan
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan

NORM, ROPE, Z = "model.attention.output_norm", "model.decoder.cross_attention.rope", "pretrain.training.z_loss"
LR, CLIP, KV = "pretrain.training.optimizer.lr", "pretrain.training.clip_norm", "model.attention.kv_heads"
SPLIT = "split"
LEVELS = {
    NORM: "[head, none]",
    ROPE: "[continuous, none]",
    Z: "[1e-4, 0.0]",
    LR: "[1e-3, 1e-2]",
    CLIP: "[1.0, null]",
    KV: "[4, 2]",
    SPLIT: "{2/2: {model.encoder.layers: 2, model.decoder.layers: 2}, "
    "3/1: {model.encoder.layers: 3, model.decoder.layers: 1}}",
}


def grid(design: str, *factors: str, rest: str = "", **levels: str) -> str:
    lines = [f"    {name}: {LEVELS[name]}" for name in factors] + [
        f"    {name}: {text}" for name, text in levels.items()
    ]
    return "\n".join(["grid:", f"  design: {design}", *([f"  {rest}"] if rest else []), "  factors:", *lines, ""])


@pytest.fixture
def study(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "s.yaml"
        path.write_text(f"study: s\nquestion: q\nextends: redllm-tiny\nseeds: [0, 1]\n{text}")
        return load_study(path, overrides)

    return load


@pytest.fixture
def refused(study, tmp_path):
    def messages(text):
        with pytest.raises(InputError) as caught:
            study(text)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return messages


def names(ablation):
    return [arm.name for arm in ablation.arms]


def value(ablation, arm, key):
    return dict(leaves(ablation.arm(arm).flat))[key]


# --- paired --------------------------------------------------------------------------------------------------------


def test_paired_takes_the_ith_level_of_every_factor_keys_and_bundles_alike(study):
    three = "{2/2: {model.encoder.layers: 2}, 3/2: {model.encoder.layers: 3}, 4/2: {model.encoder.layers: 4}}"
    ablation = study(grid("paired", **{LR: "[1e-3, 3e-3, 1e-2]", NORM: "[head, none, concat]", SPLIT: three}))
    assert names(ablation) == [
        "baseline",
        "baseline/lr=0.003/output_norm=none/split=3/2",
        "baseline/lr=0.01/output_norm=concat/split=4/2",
    ]
    assert [[value(ablation, arm, key) for key in (LR, NORM, "model.encoder.layers")] for arm in names(ablation)] == [
        [0.001, "head", 2],
        [0.003, "none", 3],
        [0.01, "concat", 4],
    ]
    assert {arm.baseline for arm in ablation.arms} == {"baseline"}


def test_a_paired_factor_may_stay_while_others_move(study):
    ablation = study(grid("paired", **{NORM: "[head, head, none]", LR: "[1e-3, 1e-2, 1e-2]"}))
    assert names(ablation) == ["baseline", "baseline/lr=0.01", "baseline/output_norm=none/lr=0.01"]


def test_paired_factors_with_unequal_numbers_of_levels_are_refused_with_the_numbers(refused):
    text = grid("paired", NORM, SPLIT, **{LR: "[1e-3, 3e-3, 1e-2]"})
    assert refused(text) == [
        f"s.yaml:7: grid.factors: paired factors need equally many levels, and {NORM} has 2, split has 2 bundles, "
        f"{LR} has 3"
    ]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            grid("paired", **{NORM: "[head, none, none]", ROPE: "[continuous, none, none]"}),
            ["s.yaml:7: grid.factors: the levels number 2 and 3 of all factors are the same; leave one out"],
        ),
        (
            grid("paired", ROPE, **{NORM: "[head, head]"}),
            [f"s.yaml:9: grid.factors.{NORM}: has one level, so nothing is switched; set it in `base` instead"],
        ),
        (
            grid("paired", **{"model.attention.qkv_norm": "[[q], [], none]", LR: "[1e-3, 1e-2, 3e-2]"}),
            ["s.yaml:8: grid.factors.model.attention.qkv_norm: two levels are called 'none'; name them"],
        ),
        (
            grid("paired", NORM, ROPE, rest=f"exclude: [{{{NORM}: head}}]"),
            [
                "s.yaml:7: grid.exclude: paired levels stand in the file one by one; take the level out of every "
                "factor instead"
            ],
        ),
        (
            grid("paired", NORM, ROPE) + f"compare: {{stratify_by: [{NORM}]}}",
            [
                "s.yaml:10: compare.stratify_by: paired factors move together: with several named arms, "
                "`stratify_by` may name all of them, else none"
            ],
        ),
    ],
)
def test_paired_levels_that_make_no_pairs_are_refused(refused, text, messages):
    assert refused(text) == messages


def test_named_arms_meet_within_all_paired_factors_at_the_same_pair(study):
    text = "arms: {red: {}, dec: {extends: decllm-tiny}}\n" + grid("paired", NORM, LR)
    assert {arm.baseline for arm in study(text).arms} == {"red"}
    within = study(text + f"compare: {{stratify_by: [{LR}, {NORM}]}}")
    assert {arm.name: arm.baseline for arm in within.arms} == {
        "red": "red",
        "red/output_norm=none/lr=0.01": "red/output_norm=none/lr=0.01",
        "dec": "red",
        "dec/output_norm=none/lr=0.01": "red/output_norm=none/lr=0.01",
    }


# --- fractions -----------------------------------------------------------------------------------------------------


def test_a_fraction_holds_the_baseline_and_every_pair_of_levels_equally_often(study):
    """Resolution IV: any three factors make a whole factorial, so each of 8 triples of levels comes 16 / 8 times."""
    ablation = study(grid("fractional_factorial", *LEVELS))
    assert len(ablation.arms) == 16
    assert names(ablation)[0] == "baseline"
    assert all(labels[0] == ablation.factors[name][0] for name, labels in ablation.factors.items())
    for three in itertools.combinations(LEVELS, 3):
        found = [tuple(arm.levels[name] for name in three) for arm in ablation.arms]
        assert {found.count(levels) for levels in itertools.product(*(ablation.factors[n] for n in three))} == {2}


def test_an_arm_of_a_fraction_is_called_by_the_letters_of_the_factors_that_it_switches(study):
    ablation = study(grid("fractional_factorial", *LEVELS))
    for arm in ablation.arms:
        moved = [name for name, labels in ablation.factors.items() if arm.levels[name] != labels[0]]
        letters = "".join("ABCDEFG"[list(LEVELS).index(name)] for name in moved)
        assert arm.name == ("baseline/" + letters if letters else "baseline")
        layers = (arm.experiment.model.encoder.layers, arm.experiment.model.decoder.layers)
        assert layers == ((3, 1) if "G" in letters else (2, 2))
        assert arm.experiment.pretrain.training.optimizer.lr == (0.01 if "D" in letters else 0.001)


def test_each_named_arm_gets_the_fraction_and_one_may_stay_out(study):
    arms = "arms: {red: {}, wide: {model: {d_model: 32}}, alone: {grid: false, model: {d_model: 128}}}\n"
    ablation = study(arms + grid("fractional_factorial", NORM, ROPE, Z, rest="resolution: 3"))
    cells = ["", "/BC", "/AC", "/AB"]
    assert names(ablation) == [f"{arm}{cell}" for arm in ("red", "wide") for cell in cells] + ["alone"]
    assert {arm.baseline for arm in ablation.arms} == {"red"}
    notes = [(f.arm, f.message) for f in plan(ablation).findings if f.key == "compare"]
    assert [arm for arm, _ in notes] == ["wide"]  # once, not for every combination
    assert "effects" in notes[0][1]


def test_a_wanted_interaction_gets_a_fraction_in_which_it_is_clear(study):
    wanted = f"[{LR}, {SPLIT}]"
    text = grid("fractional_factorial", *LEVELS, rest=f"combinations: 32\n  interactions: [{wanted}]")
    design = plan(study(text)).as_json()["design"]
    assert design["combinations"] == 32
    assert design["interactions"] == [[LR, SPLIT]]
    (told,) = [entry for entry in design["aliases"] if entry["requested"]]
    assert (told["effect"], told["aliases"], told["further"]) == ([LR, SPLIT], [], 3)
    # Without being asked for, the fraction of 32 confounds one triple of interactions with another.
    plain = plan(study(grid("fractional_factorial", *LEVELS, rest="combinations: 32"))).as_json()["design"]
    assert sum(bool(entry["aliases"]) for entry in plain["aliases"]) == 6


FF = "fractional_factorial"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            grid(FF, *LEVELS, rest=f"interactions: [[{NORM}, {ROPE}]]"),
            [
                f"s.yaml:7: grid.interactions: 16 combinations cannot tell all of them apart: {NORM} × {ROPE} is "
                f"confounded with {Z} × {CLIP} and {LR} × {KV}; use `combinations: 32` or `resolution: 5` "
                "(64 combinations)"
            ],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR, rest=f"interactions: [[{NORM}, {ROPE}]]"),
            [
                f"s.yaml:7: grid.interactions: 8 combinations cannot tell all of them apart: {NORM} × {ROPE} is "
                f"confounded with {Z} × {LR}; use `design: factorial` (16 combinations)"
            ],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR, CLIP, rest=f"resolution: 3\n  interactions: [[{NORM}, {ROPE}]]"),
            [
                f"s.yaml:8: grid.interactions: 8 combinations cannot tell all of them apart: {NORM} × {ROPE} is "
                f"confounded with {CLIP} and {Z} × {LR}; use `combinations: 16` or `resolution: 5` (16 combinations)"
            ],
        ),
        (
            grid(FF, NORM, SPLIT, **{LR: "[1e-3, 1e-2, 3e-2]", "s": "{a: {}, b: {}, c: {}}"}),
            [
                f"s.yaml:10: grid.factors.{LR}: has 3 levels; a fractional_factorial takes two of each factor, the "
                "baseline's first",
                "s.yaml:11: grid.factors.s: has 3 bundles; a fractional_factorial takes two of each factor, the "
                "baseline's first",
            ],
        ),
        (
            grid(FF, *LEVELS, rest="combinations: 8"),
            [
                "s.yaml:7: grid.combinations: no fraction of 8 combinations of 7 factors has resolution 4; use "
                "`combinations: 16` or `resolution: 3`"
            ],
        ),
        (
            grid(FF, *LEVELS, rest="combinations: 12"),
            ["s.yaml:7: grid.combinations: a fraction of 7 factors has 4, 8, 16, 32, 64, not 12"],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR, rest="resolution: 5"),
            [
                "s.yaml:7: grid.resolution: no fraction of 4 factors has resolution 5; use `resolution: 4` or "
                "`design: factorial` (16 combinations)"
            ],
        ),
        (
            grid(FF, NORM, ROPE),
            ["s.yaml:7: grid.factors: a fractional_factorial takes 3 to 15 factors, and there are 2"],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR, rest=f"exclude: [{{{NORM}: none}}]"),
            [
                "s.yaml:7: grid.exclude: a fraction that lacks a combination cannot tell its effects apart; leave the "
                "factor out"
            ],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR) + f"compare: {{stratify_by: [{LR}]}}",
            [
                "s.yaml:12: compare.stratify_by: a fraction does not hold the baseline at every arm's own level; its "
                "effects tell the factors apart"
            ],
        ),
        (
            grid(FF, NORM, ROPE, Z, LR, rest=f"interactions: [[{NORM}], [{NORM}, {NORM}], [{NORM}, {LR}s]]"),
            [
                "s.yaml:7: grid.interactions.0: an interaction is of two different factors: [one, other]",
                "s.yaml:7: grid.interactions.1: an interaction is of two different factors: [one, other]",
                f"s.yaml:7: grid.interactions.2: '{LR}s' is not a factor of the grid - did you mean '{LR}'?",
            ],
        ),
        (
            grid("factorial", NORM, ROPE, rest="resolution: 4\n  combinations: 8"),
            [
                "s.yaml:7: grid.resolution: belongs to `design: fractional_factorial`, and this one is factorial",
                "s.yaml:8: grid.combinations: belongs to `design: fractional_factorial`, and this one is factorial",
            ],
        ),
    ],
)
def test_a_fraction_that_cannot_be_is_refused_with_what_would_do(refused, text, messages):
    assert refused(text) == messages


def test_what_a_refusal_proposes_is_accepted(study, refused):
    for rest in (f"interactions: [[{NORM}, {ROPE}]]", "combinations: 8"):
        (message,) = refused(grid(FF, *LEVELS, rest=rest))
        for remedy in re.findall(r"`(\w+: \d+)`", message):
            kept = "" if remedy.split(":")[0] in rest else f"\n  {rest}"
            assert len(study(grid(FF, *LEVELS, rest=remedy + kept)).arms) in (8, 16, 32, 64)


# --- what people see -----------------------------------------------------------------------------------------------


def shown(renderable, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_plan_shows_at_80_columns_what_a_fraction_of_seven_factors_confounds(study):
    text = shown(render_plan(plan(study(grid(FF, *LEVELS)))), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "design: 16 of 128 combinations, resolution 4" in text
    for letter, label in zip(
        "ABCDEFG", ("output_norm", "rope", "z_loss", "lr", "clip_norm", "kv_heads", "split"), strict=True
    ):
        assert re.search(rf"^{letter}  {label} .* → .* \.\.\. *$", text, re.MULTILINE)
    chains = re.search(r"not told apart: (.*?)\.", " ".join(text.split()))
    assert chains is not None
    found = [set(stage_graph.split("=")) for stage_graph in chains[1].split("; ")]
    assert sorted(map(len, found)) == [3] * 7
    assert set.union(*found) == {"".join(pair) for pair in itertools.combinations("ABCDEFG", 2)}
    assert all(
        len(set("".join(stage_graph))) == 6 for stage_graph in found
    )  # in one of resolution IV they share no factor


def test_the_plan_shows_signs_and_what_else_differs(study):
    arms = "arms: {red: {}, wide: {model: {d_model: 32}}}\n"
    text = shown(render_plan(plan(study(arms + grid(FF, NORM, ROPE, Z, rest="resolution: 3")))), 80)
    assert re.search(r"^A  output_norm +head → none +−BC *$", text, re.MULTILINE)
    assert re.search(r"^wide/AB +model.d_model: 64 → 32", text, re.MULTILINE)
    assert "red/AB  " not in text.partition("what differs")[2]


def test_the_json_of_a_plan_names_the_design(study):
    assert plan(study("")).as_json()["design"] is None
    factorial = plan(study(grid("factorial", NORM, SPLIT))).as_json()["design"]
    assert factorial == {"kind": "factorial", "factors": {NORM: ["head", "none"], SPLIT: ["2/2", "3/1"]}}
    design = plan(study(grid(FF, NORM, ROPE, Z, rest="resolution: 3"))).as_json()["design"]
    assert (design["kind"], design["combinations"], design["of"], design["resolution"]) == (FF, 4, 8, 3)
    assert design["generators"] == [{"word": [NORM, ROPE, Z], "sign": -1}]
    assert design["aliases"][0] == {
        "effect": [NORM],
        "requested": False,
        "aliases": [{"effect": [ROPE, Z], "sign": -1}],
        "further": 0,
    }


def test_a_fraction_that_has_run_is_shown_by_its_effects(write_study, store):
    """Every number judged against the means of the runs' own results."""
    from lit_llm.studies.run import Observer, run_study

    grid_of_three = (
        f"grid: {{design: {FF}, resolution: 3, factors: {{{NORM}: [head, none], {ROPE}: [continuous, none], "
    )
    path = write_study("fraction", grid_of_three + f"{LR}: [1e-3, 1e-2]}}}}", seeds=[900, 901])
    finished = run_study(load_study(path), store, observer=Observer(), max_parallel=2)
    ended = {run.name: run.last.result()["metrics"]["test/target_nll"] for run in finished.runs}
    (found,) = finished.comparison.as_json()["effects"]
    assert found["seeds"] == (900, 901)
    for letter, row in zip("ABC", found["rows"], strict=True):
        high = [nll for name, nll in ended.items() if letter in name.split("/")[1]]
        low = [nll for name, nll in ended.items() if letter not in name.split("/")[1]]
        assert (len(high), len(low)) == (4, 4)
        assert row["effect"]["mean"] == pytest.approx(sum(high) / 4 - sum(low) / 4)
    text = shown(render_comparison(finished.comparison, 80), 80)
    assert re.search(r"^A  output_norm: head → none +[+-]\d\.\d{3} \[.*\] +−BC *$", text, re.MULTILINE)
    markdown = markdown_of(finished.plan.ablation, finished.comparison)
    assert "## effects on test/target_nll: second level minus first, 4 arms, 2 seeds" in markdown
    assert re.search(r"^\| C \| lr: 0.001 → 0.01 \| [+-].* \| −AB \|$", markdown, re.MULTILINE)
