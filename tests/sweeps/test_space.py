"""The space of an arm: which points it has, and the experiment that each of them stands for."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from fractions import Fraction

import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from lit_llm.config.problems import InputError
from lit_llm.config.tree import leaves
from lit_llm.experiment.load import load_experiment
from lit_llm.sweeps.sweep import load_sweep

LR, HEADS, KV = "pretrain.training.optimizer.lr", "model.attention.heads", "model.attention.kv_heads"
LAYERS, DROPOUT, D_FF = "model.encoder.layers", "pretrain.training.dropout", "model.feed_forward.d_ff"
OPTIMIZER, NORM = "pretrain.training.optimizer", "model.attention.qkv_norm"
SPLIT = (
    "{choice: {2/2: {model.encoder.layers: 2, model.decoder.layers: 2}, "
    "3/1: {model.encoder.layers: 3, model.decoder.layers: 1}}}"
)


def space(**parameters: str) -> str:
    return "\n".join(["space:", *(f"  {name}: {text}" for name, text in parameters.items()), ""])


@pytest.fixture
def spaces(tmp_path):
    """The spaces of all arms of a sweep, nothing of which would be trained."""

    def load(text, *overrides):
        path = tmp_path / "s.yaml"
        head = "sweep: s\nextends: redllm-tiny\ntrials: 4\noptimize: [{metric: parameters}]\n"
        path.write_text(head + text)
        return load_sweep(path, overrides).spaces

    return load


@pytest.fixture
def only(spaces):
    return lambda text, *overrides: spaces(text, *overrides)["baseline"]


def overridden(preset="redllm-tiny", **keys):
    """The experiment that the command line makes of these keys."""
    return load_experiment(preset, [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def as_set(points):
    """Points without an order, each once."""
    found = {frozenset(point.items()) for point in points}
    assert len(found) == len(points), "a point is there twice"
    return found


def values_of(experiment):
    return dict(leaves(experiment.model_dump(mode="json")))


# --- which points there are ----------------------------------------------------------------------------------------


def test_every_point_of_independent_parameters_is_their_product(only):
    text = space(**{HEADS: "{choice: [2, 4, 8]}", LAYERS: "{int: [1, 3]}", D_FF: "{int: [64, 256], step: 64}"})
    product = itertools.product("248", (1, 2, 3), (64, 128, 192, 256))
    points = only(text).every_point(1000)
    assert as_set(points) == {frozenset({HEADS: h, LAYERS: n, D_FF: d}.items()) for h, n, d in product}


def test_every_point_has_a_conditional_parameter_exactly_where_its_condition_holds(only):
    """Enumerated by hand: 4 heads bring 3 values of kv_heads, layers 1 and 3 bring 2 of d_ff."""
    text = space(
        **{
            D_FF: f"{{choice: [128, 256], when: {{{LAYERS}: [1, 3, 5]}}}}",
            KV: f"{{choice: [null, 1, 2], when: {{{HEADS}: 4}}}}",
            HEADS: "{choice: [2, 4, 8]}",
            LAYERS: "{int: [1, 3]}",
        }
    )
    expected = set()
    for heads, kv, layers, d_ff in itertools.product("248", ("null", "1", "2"), (1, 2, 3), ("128", "256")):
        point = {HEADS: heads, LAYERS: layers}
        point |= {KV: kv} if heads == "4" else {}
        point |= {D_FF: d_ff} if layers != 2 else {}
        expected.add(frozenset(point.items()))
    assert as_set(only(text).every_point(1000)) == expected
    assert len(expected) == (1 + 3 + 1) * (2 + 1 + 2)


def test_a_condition_on_a_parameter_that_is_not_drawn_is_one_on_the_arms_own_value(only):
    """Heads wait for 3 layers and kv_heads for 4 heads; with 2 layers the arm's own 4 heads stay."""
    text = space(
        **{
            KV: f"{{choice: [null, 2], when: {{{HEADS}: 4}}}}",
            HEADS: f"{{choice: [2, 4], when: {{{LAYERS}: 3}}}}",
            LAYERS: "{int: [2, 3]}",
        }
    )
    expected = [
        *({LAYERS: 2, KV: kv} for kv in ("null", "2")),
        {LAYERS: 3, HEADS: "2"},
        *({LAYERS: 3, HEADS: "4", KV: kv} for kv in ("null", "2")),
    ]
    assert as_set(only(text).every_point(1000)) == as_set(expected)


def test_two_conditions_of_a_parameter_have_to_hold_both(only):
    text = space(
        **{
            HEADS: "{choice: [2, 4]}",
            LAYERS: "{int: [1, 2]}",
            LR: f"{{choice: [1e-3, 3e-3], when: {{{HEADS}: 4, {LAYERS}: 1, model.d_model: 64}}}}",
        }
    )
    points = only(text).every_point(1000)
    assert {(p[HEADS], p[LAYERS]) for p in points if LR in p} == {("4", 1)}
    assert len(points) == 3 + 2


@pytest.mark.parametrize(("most", "found"), [(5, None), (6, 6), (100, 6)])
def test_more_points_than_asked_for_are_not_listed(only, most, found):
    points = only(space(**{HEADS: "{choice: [2, 4, 8]}", LAYERS: "{int: [1, 2]}"})).every_point(most)
    assert (points if points is None else len(points)) == found


@pytest.mark.parametrize("text", ["{uniform: [0.0, 0.5]}", "{int: [1, 1000000]}", "{log_int: [1, 1000000]}"])
def test_an_endless_range_is_not_listed(only, text):
    key = DROPOUT if "uniform" in text else D_FF
    assert only(space(**{HEADS: "{choice: [2, 4, 8]}", key: text})).every_point(20_000) is None


# --- conditions by arm ---------------------------------------------------------------------------------------------


def test_a_condition_on_what_an_arm_is_decides_for_the_whole_arm(spaces):
    text = "arms: {red: {}, dec: {extends: decllm-tiny}, wide: {model: {d_model: 128}}}\n" + space(
        **{
            LAYERS: "{int: [1, 3], when: {model.family: encoder_decoder}}",
            "depth": "{key: model.decoder.layers, int: [3, 5], when: {model.family: decoder}}",
            HEADS: "{choice: [4, 8], when: {model.d_model: [128, 256]}}",
            KV: f"{{choice: [null, 8], when: {{{HEADS}: 8}}}}",
        }
    )
    found = spaces(text)
    assert {arm: as_set(one.every_point(99)) for arm, one in found.items()} == {
        "red": as_set([{LAYERS: n} for n in (1, 2, 3)]),
        "dec": as_set([{"depth": n} for n in (3, 4, 5)]),
        "wide": as_set(
            [{LAYERS: n, HEADS: "4"} for n in (1, 2, 3)]
            + [{LAYERS: n, HEADS: "8", KV: kv} for n in (1, 2, 3) for kv in ("null", "8")]
        ),
    }
    assert found["dec"].experiment({"depth": 5}).model.decoder.layers == 5


# --- drawing -------------------------------------------------------------------------------------------------------


def test_only_parameters_whose_conditions_hold_are_drawn(only):
    """Judged by the experiment that comes out: its own keys say which conditions hold."""
    found = only(
        space(
            **{
                KV: f"{{choice: [null, 1], when: {{{HEADS}: [4, 8]}}}}",
                f"{OPTIMIZER}.momentum": f"{{uniform: [0.5, 0.9], when: {{{OPTIMIZER}.kind: muon}}}}",
                f"{OPTIMIZER}.kind": "{choice: [adamw, muon]}",
                HEADS: "{choice: [2, 4, 8]}",
                DROPOUT: "{uniform: [0.0, 0.5], when: {split: 3/1}}",
                "split": SPLIT,
            }
        )
    )
    draw, seen = random.Random(0), set()
    for _ in range(60):
        asked = []

        def suggest(dimension, asked=asked):
            asked.append(dimension.name)
            if dimension.levels:
                return draw.choice([level.label for level in dimension.levels])
            return draw.uniform(*dimension.bounds)

        point = found.draw(suggest)
        assert list(point) == asked
        experiment = found.experiment(point)
        model, training = experiment.model, experiment.pretrain.training
        assert set(point) - {"split", HEADS, f"{OPTIMIZER}.kind"} == {
            name
            for name, holds in {
                KV: model.attention.heads in (4, 8),
                f"{OPTIMIZER}.momentum": training.optimizer.kind == "muon",
                DROPOUT: (model.encoder.layers, model.decoder.layers) == (3, 1),
            }.items()
            if holds
        }
        if f"{OPTIMIZER}.momentum" in point:
            assert training.optimizer.momentum == point[f"{OPTIMIZER}.momentum"]
        seen.add(frozenset(point))
    assert len(seen) == 8


PARAMETERS = {
    KV: f"{{choice: [null, 1], when: {{{HEADS}: 4}}}}",
    HEADS: f"{{choice: [2, 4], when: {{{LAYERS}: [2, 3]}}}}",
    LAYERS: "{int: [1, 3]}",
    f"{OPTIMIZER}.momentum": f"{{choice: [0.5, 0.9], when: {{{OPTIMIZER}.kind: muon}}}}",
    f"{OPTIMIZER}.kind": "{choice: [adamw, muon]}",
}


def test_the_order_in_the_file_changes_neither_points_nor_experiments(only):
    whole = only(space(**PARAMETERS))
    points = as_set(whole.every_point(1000))
    # 3 layers; with 1 of them heads are the own 4, so kv_heads are drawn, with 2 and 3 those of 4 heads alone.
    assert len(points) == (2 + 2 * (1 + 2)) * (1 + 2)
    orders = list(itertools.permutations(PARAMETERS))
    for order in random.Random(0).sample(orders, 25):
        other = only(space(**{name: PARAMETERS[name] for name in order}))
        assert as_set(other.every_point(1000)) == points
        assert other.default_point == whole.default_point
    for point in map(dict, points):
        assert other.experiment(point) == whole.experiment(point)
        assert whole.experiment(dict(reversed(point.items()))) == whole.experiment(point)


# --- what a point stands for ---------------------------------------------------------------------------------------


def test_every_point_is_the_experiment_that_the_command_line_makes_of_its_keys(only):
    text = space(**{HEADS: "{choice: [2, 4]}", KV: "{choice: [null, 1]}", DROPOUT: "{uniform: [0.0, 0.5], step: 0.25}"})
    found = only(text)
    for point in found.every_point(100):
        kv = None if point[KV] == "null" else int(point[KV])
        assert found.experiment(point) == overridden(**{HEADS: int(point[HEADS]), KV: kv, DROPOUT: point[DROPOUT]})


@pytest.mark.parametrize("turned", [False, True])
def test_a_kind_is_set_before_the_other_keys_of_its_section(only, turned):
    """Set after them, muon would come with adamw's rate, or without the one that was drawn."""
    parameters = {
        LR: "{log_uniform: [1e-4, 1e-1]}",
        f"{OPTIMIZER}.momentum": f"{{uniform: [0.5, 0.9], when: {{{OPTIMIZER}.kind: muon}}}}",
        f"{OPTIMIZER}.kind": "{choice: [adamw, muon]}",
    }
    point = {LR: 0.02, f"{OPTIMIZER}.momentum": 0.6, f"{OPTIMIZER}.kind": "muon"}
    if turned:
        parameters, point = (dict(reversed(part.items())) for part in (parameters, point))
    found = only(space(**parameters))
    expected = overridden(**{f"{OPTIMIZER}.kind": "muon", f"{OPTIMIZER}.momentum": 0.6, LR: 0.02})
    assert found.experiment(point) == expected
    assert found.experiment({LR: 0.02, f"{OPTIMIZER}.kind": "adamw"}) == overridden(**{LR: 0.02})


def test_another_kind_takes_nothing_over_of_the_old_ones_section(only):
    """As in every file: a section of another kind replaces the old one, so its rate is its own default."""
    found = only(space(**{OPTIMIZER: "{choice: [adamw, muon, {kind: adafactor, lr: 1e-3}]}"}))
    assert [level.label for level in found.dimensions[0].levels] == ["adamw", "muon", "kind=adafactor,lr=0.001"]
    kinds = [found.experiment(point).pretrain.training.optimizer for point in found.every_point(9)]
    assert kinds == [
        overridden().pretrain.training.optimizer,
        overridden(**{OPTIMIZER: {"kind": "muon"}}).pretrain.training.optimizer,
        overridden(**{OPTIMIZER: {"kind": "adafactor", "lr": 1e-3}}).pretrain.training.optimizer,
    ]


def test_bundles_set_all_their_keys_and_are_stored_by_their_names(only):
    found = only(space(split=SPLIT, **{HEADS: "{choice: [2, 4]}"}))
    assert as_set(found.every_point(9)) == as_set([{"split": s, HEADS: h} for s in ("2/2", "3/1") for h in "24"])
    expected = overridden(**{LAYERS: 3, "model.decoder.layers": 1, HEADS: 2})
    assert found.experiment({"split": "3/1", HEADS: "2"}) == expected
    assert found.default_point == {"split": "2/2", HEADS: "4"}


def test_lists_and_nothing_and_sections_are_stored_by_labels_that_a_database_takes(only):
    found = only(
        space(
            **{
                NORM: "{choice: [[q, k, v], [], [q, k]]}",
                "pretrain.training.clip_norm": "{choice: [1.0, null, 0.5]}",
                "model.attention.qkv_norm_scale": "{choice: [false, true]}",
                "pretrain.training.schedule": "{choice: [{kind: cosine, final_fraction: 0.1}, {kind: constant}]}",
            }
        )
    )
    labels = [[level.label for level in dimension.levels] for dimension in found.dimensions]
    assert sorted(labels) == sorted(
        [
            ["q+k+v", "none", "q+k"],
            ["1", "null", "0.5"],
            ["false", "true"],
            ["kind=cosine,final_fraction=0.1", "kind=constant"],
        ]
    )
    points = found.every_point(1000)
    assert len(as_set(points)) == 3 * 3 * 2 * 2
    assert all(isinstance(value, str) for point in points for value in point.values())
    point = {
        NORM: "none",
        "pretrain.training.clip_norm": "null",
        "model.attention.qkv_norm_scale": "true",
        "pretrain.training.schedule": "kind=constant",
    }
    assert found.experiment(point) == overridden(
        **{
            NORM: [],
            "pretrain.training.clip_norm": None,
            "model.attention.qkv_norm_scale": True,
            "pretrain.training.schedule": {"kind": "constant"},
        }
    )


def test_a_condition_on_a_list_is_met_by_the_list_and_not_by_a_part_of_it(only):
    text = space(
        **{
            NORM: "{choice: [[q, k, v], [], [q]]}",
            "model.attention.qkv_norm_scale": f"{{choice: [false, true], when: {{{NORM}: [q, k, v]}}}}",
        }
    )
    points = only(text).every_point(99)
    assert {point[NORM] for point in points if len(point) == 2} == {"q+k+v"}
    assert len(points) == 2 + 1 + 1


def test_values_that_do_not_go_together_are_no_experiment(only):
    found = only(space(**{HEADS: "{choice: [2, 4]}", KV: "{choice: [null, 1, 4]}"}))
    with pytest.raises(InputError, match="kv_heads 4 does not divide heads 2"):
        found.experiment({HEADS: "2", KV: "4"})


# --- the own setting -----------------------------------------------------------------------------------------------


def test_the_own_point_is_the_arms_experiment_exactly(spaces):
    text = "arms: {red: {}, dec: {extends: decllm-tiny}, odd: {model: {attention: {kv_heads: 2, qkv_norm: [q]}}}}\n"
    text += space(
        **{
            LR: "{log_uniform: [1e-4, 3e-2]}",
            DROPOUT: "{uniform: [0.0, 0.5], step: 0.1}",
            "pretrain.training.z_loss": "{uniform: [0.0, 1e-3]}",
            "pretrain.training.max_steps": "{log_int: [100, 1000]}",
            KV: "{choice: [null, 2, 4]}",
            NORM: "{choice: [[], [q], [q, k, v]]}",
            "pretrain.training.schedule": "{choice: [constant, cosine]}",
            "depth": "{key: model.decoder.layers, int: [2, 8], step: 2}",
            LAYERS: "{int: [1, 4], when: {model.family: encoder_decoder}}",
            "shape": "{choice: {small: {model.d_model: 32, model.feed_forward.d_ff: 64}, tiny: {model.d_model: 64}}}",
        }
    )
    text = f"base: {{pretrain: {{training: {{schedule: {{kind: cosine, final_fraction: 0.0}}}}}}}}\n{text}"
    for found in spaces(text).values():
        assert found.experiment(found.default_point) == found.arm.experiment
        assert found.default_point["shape"] == "tiny"
        assert found.default_point[LR] == found.arm.experiment.pretrain.training.optimizer.lr


@pytest.mark.parametrize("own", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_the_own_point_of_a_grid_is_one_of_its_points(only, own):
    """Three steps of 0.1 are 0.30000000000000004 to a computer, which is the same trial as 0.3."""
    text = space(**{DROPOUT: "{uniform: [0.0, 0.5], step: 0.1}"})
    found = only(f"base: {{pretrain: {{training: {{dropout: {own}}}}}}}\n{text}")
    assert found.default_point in found.every_point(10)


# --- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "step"),
    [
        ("0.0", "0.5", "0.1"),
        ("0.0", "0.35", "0.1"),
        ("0.1", "0.7", "0.2"),
        ("0.0", "0.9", "0.3"),
        ("0.1", "0.8", "0.7"),
    ],
)
def test_a_grid_of_numbers_goes_from_the_lowest_by_steps_as_far_as_the_highest(only, low, high, step):
    """Counted in fractions, where 0.1 + 0.2 is 0.3. Optuna, which draws between these bounds, goes as far."""
    text = space(**{DROPOUT: f"{{uniform: [{low}, {high}], step: {step}}}"})
    found = only(f"base: {{pretrain: {{training: {{dropout: {low}}}}}}}\n{text}")
    count = (Fraction(high) - Fraction(low)) // Fraction(step) + 1
    expected = [float(Fraction(low) + n * Fraction(step)) for n in range(count)]
    assert [point[DROPOUT] for point in found.every_point(100)] == pytest.approx(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of bounds that are not on its grid, and moves them
        optuna = FloatDistribution(*found.dimensions[0].bounds, step=float(step))
    assert (optuna.low, optuna.high) == pytest.approx((expected[0], expected[-1]))


@pytest.mark.parametrize(("low", "high", "step"), [(1, 8, 1), (2, 8, 2), (1, 8, 3), (2, 9, 4), (2, 3, 5)])
def test_a_grid_of_whole_numbers_is_pythons_range(only, low, high, step):
    text = f"{{int: [{low}, {high}], step: {step}}}"
    found = only(f"base: {{model: {{encoder: {{layers: {low}}}}}}}\n{space(**{LAYERS: text})}")
    values = [point[LAYERS] for point in found.every_point(100)]
    assert values == list(range(low, high + 1, step))
    assert all(type(value) is int for value in values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optuna = IntDistribution(low, high, step=step)
    assert found.dimensions[0].bounds == (optuna.low, optuna.high)


def test_a_value_of_the_file_is_possible_exactly_where_the_grid_has_it(only):
    found = only(space(**{D_FF: "{int: [64, 256], step: 24}"})).dimensions[0]
    assert [n for n in range(400) if found.problem(n) is None] == list(range(64, 257, 24))
    rate = only(space(**{DROPOUT: "{uniform: [0.0, 0.9], step: 0.3}"})).dimensions[0]
    assert [n for n in range(-10, 110) if rate.problem(n / 100) is None] == [0, 30, 60, 90]


def test_a_default_that_a_dump_leaves_out_is_the_arms_setting(only):
    key = "pretrain.training.attention_dropout"
    assert only(space(**{key: "{uniform: [0.0, 0.3]}"})).default_point == {key: 0.0}
