"""What is wrong with a sweep file: every mistake at its file and line, all of them at once, before anything starts."""

from __future__ import annotations

import pytest

from lit_llm.config.problems import InputError
from lit_llm.sweeps.samplers import make_sampler
from lit_llm.sweeps.sweep import is_sweep, load_sweep

LR, HEADS, KV = "pretrain.training.optimizer.lr", "model.attention.heads", "model.attention.kv_heads"
LAYERS, DROPOUT = "model.encoder.layers", "pretrain.training.dropout"
RATES = f"space: {{{LR}: {{log_uniform: [1e-4, 3e-2]}}}}\n"
"""One line, the fifth of the file."""
ARMS = "arms: {red: {}, dec: {extends: decllm-tiny}}\n"
KINDS = "uniform, log_uniform, int, log_int, choice"


def space(**parameters: str) -> str:
    """One line each, from the sixth of the file on."""
    return "\n".join(["space:", *(f"  {name}: {text}" for name, text in parameters.items()), ""])


@pytest.fixture
def sweep(tmp_path):
    def load(text, *overrides, head="sweep: s\nquestion: q\nextends: redllm-tiny\ntrials: 4\n"):
        path = tmp_path / "s.yaml"
        path.write_text(head + text)
        return load_sweep(path, overrides)

    return load


@pytest.fixture
def refused(sweep, tmp_path):
    def messages(text, *overrides, **changes):
        with pytest.raises(InputError) as caught:
            sweep(text, *overrides, **changes)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return messages


# --- the file ------------------------------------------------------------------------------------------------------


def test_unknown_keys_of_the_file_are_told_at_their_lines_with_what_was_meant(refused):
    assert sorted(refused(f"tirals: 3\n{RATES}sapce: {{}}\npruner: {{kind: median, bye: steps}}\n")) == [
        "s.yaml:5: tirals: unknown key - did you mean 'trials'?",
        "s.yaml:7: sapce: unknown key - did you mean 'space'?",
        "s.yaml:8: pruner.bye: unknown key - did you mean 'by'?",
    ]


@pytest.mark.parametrize(
    ("text", "head", "messages"),
    [
        ("", "sweep: s\ntrials: 4\n", ["s.yaml:1: space: is needed, and there is no default"]),
        (RATES, "sweep: s\n", ["s.yaml:1: trials: is needed, and there is no default"]),
        (RATES, "sweep: s\ntrials: 0\n", ["s.yaml:2: trials: should be greater than 0, not 0"]),
        ("space: {}\n", "sweep: s\ntrials: 4\n", ["s.yaml:3: space: needs at least 1 of them, has 0"]),
        (
            RATES,
            "sweep: ../s\ntrials: 4\n",
            ["s.yaml:1: sweep: '../s' is not a plain name: letters, digits, '-', '_' and '.', no path"],
        ),
    ],
)
def test_a_sweep_needs_a_name_a_space_and_a_number_of_trials(refused, text, head, messages):
    assert refused(text, head=head) == messages


@pytest.mark.parametrize("head", ["study: s\nquestion: q\nextends: redllm-tiny\n", "extends: redllm-tiny\n", ""])
def test_a_file_that_is_no_sweep_is_refused_with_the_command_that_takes_it(refused, tmp_path, head):
    assert refused("", head=head) == ["s.yaml:1: is no sweep (it has no `sweep`); `lit-llm run` takes a study"]
    assert not is_sweep(str(tmp_path / "s.yaml"))


def test_a_sweep_is_told_from_a_preset_a_study_and_nothing(sweep, tmp_path):
    sweep(RATES)
    assert is_sweep(str(tmp_path / "s.yaml"))
    assert not is_sweep("redllm-tiny")
    assert not is_sweep(str(tmp_path / "nowhere.yaml"))
    assert not is_sweep(str(tmp_path))


def test_a_sweep_that_is_not_there_is_one_message(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_sweep(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("seeds: []\n", ["s.yaml:6: seeds: needs at least one seed, for example [0]"]),
        ("seeds: [1, 2, 1]\n", ["s.yaml:6: seeds: a seed is there twice"]),
        (
            "seeds: [0, 5]\nwinners: {seeds: [4, 5]}\n",
            ["s.yaml:7: winners.seeds: the search has seen 5 already; fresh seeds are needed"],
        ),
        ("winners: {seeds: [5, 5]}\n", ["s.yaml:6: winners.seeds: a seed is there twice"]),
        ("optimize: []\n", ["s.yaml:6: optimize: needs at least 1 of them, has 0"]),
        (
            "optimize:\n  - {metric: parameters}\n  - {metric: parmeters}\n",
            ["s.yaml:8: optimize.1.metric: 'parmeters' is not possible - did you mean 'parameters'?"],
        ),
        (
            "optimize: [{metric: parameters}, {metric: parameters, direction: maximize}]\n",
            ["s.yaml:6: optimize: parameters is there twice"],
        ),
        ("sampler: tpee\n", ["s.yaml:6: sampler: 'tpee' is not possible - did you mean 'tpe'?"]),
        ("pruner: medium\n", ["s.yaml:6: pruner.kind: 'medium' is not possible - did you mean 'median'?"]),
    ],
)
def test_what_makes_no_search_is_refused_at_its_line(refused, text, messages):
    assert refused(RATES + text) == messages


# --- parameters by themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{uniform: [0.1, 0.01]}", ".uniform: the lowest, 0.1, is not below the highest, 0.01"),
        ("{log_uniform: [0.1, 0.1]}", ".log_uniform: the lowest, 0.1, is not below the highest, 0.1"),
        ("{int: [4, 4]}", ".int: the lowest, 4, is not below the highest, 4"),
        ("{log_int: [8, 4]}", ".log_int: the lowest, 8, is not below the highest, 4"),
        ("{log_uniform: [0, 0.1]}", ".log_uniform: a logarithmic range begins above 0, not at 0.0"),
        ("{log_uniform: [-1, 0.1]}", ".log_uniform: a logarithmic range begins above 0, not at -1.0"),
        ("{log_int: [0, 4]}", ".log_int: a logarithmic range begins above 0, not at 0"),
        ("{choice: [1, 2], step: 1}", ".step: belongs to uniform and int, and this one is choice"),
        ("{log_uniform: [1e-4, 1e-2], step: 1e-4}", ".step: belongs to uniform and int, and this one is log_uniform"),
        ("{log_int: [1, 8], step: 2}", ".step: belongs to uniform and int, and this one is log_int"),
        ("{int: [1, 8], step: 0.5}", ".step: of whole numbers is one, not 0.5"),
        ("{int: [1, 8], step: 0}", ".step: should be greater than 0, not 0"),
        ("{uniform: [0.0, 1.0], step: -0.1}", ".step: should be greater than 0, not -0.1"),
        ("{choice: [4]}", ".choice: needs two values at least; set a single one in `base` instead"),
        ("{choice: {a: {x: 1}}}", ".choice: needs two values at least; set a single one in `base` instead"),
        ("{}", f": has no values; give one of {KINDS}"),
        ("{uniform: [0.0, 1.0], int: [0, 1]}", f": has uniform and int at once; give one of {KINDS}"),
        ("{int: [1, 2, 3]}", ".int: takes at most 2 of them, has 3"),
        ("{int: [1]}", ".int: needs at least 2 of them, has 1"),
        ("{int: [1, 2.0]}", ".int.1: should be an integer, not 2.0 - write 2"),
        ("{log_uniform: [1e-4, .inf]}", ".log_uniform.1: should be a finite number, not inf"),
        ("{choice: {a: {x: 1}, b: {x: 2}}, key: y}", ".key: named bundles name their keys themselves"),
        ("{unifrom: [0, 1]}", ".unifrom: unknown key - did you mean 'uniform'?"),
    ],
)
def test_a_parameter_that_is_none_is_refused_at_its_line(refused, text, message):
    assert f"s.yaml:7: space.{LR}{message}" in refused(space(**{HEADS: "{choice: [2, 4]}", LR: text}))


def test_the_mistakes_of_all_parameters_are_told_at_once(refused):
    text = space(**{LR: "{uniform: [2, 1]}", HEADS: "{choice: [4]}", KV: "{log_int: [0, 4]}"})
    assert refused(text + "trils: 3\n") == [
        f"s.yaml:6: space.{LR}.uniform: the lowest, 2.0, is not below the highest, 1.0",
        f"s.yaml:7: space.{HEADS}.choice: needs two values at least; set a single one in `base` instead",
        f"s.yaml:8: space.{KV}.log_int: a logarithmic range begins above 0, not at 0",
        "s.yaml:9: trils: unknown key - did you mean 'trials'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{choice: [4, 2, 4]}", f"space.{HEADS}.choice: two values are called '4'; name them"),
        ("{choice: [4, '4']}", f"space.{HEADS}.choice: two values are called '4'; name them"),
        ("{choice: {a: {x: 1}, b: 3}}", f"space.{HEADS}.choice.b: a named level is a mapping of keys to values"),
    ],
)
def test_values_that_cannot_be_told_apart_are_refused(refused, text, message):
    assert refused(space(**{HEADS: text}))[0] == f"s.yaml:6: {message}"


# --- keys of the experiment ----------------------------------------------------------------------------------------


def test_a_key_that_does_not_exist_is_told_at_its_line_with_what_was_meant(refused):
    text = space(
        **{
            f"{LR}r": "{uniform: [0, 1]}",
            "model.attention.output_nrom": "{choice: [head, none]}",
            "split": "{choice: {a: {model.encoder.layer: 2}, b: {model.encoder.layer: 3}}}",
            "rate": f"{{key: {LR}x, int: [1, 2]}}",
        }
    )
    messages = refused(text)
    told = [
        (f"s.yaml:6: space.{LR}r: ", "unknown key - did you mean 'lr'?"),
        ("s.yaml:7: space.model.attention.output_nrom: ", "unknown key - did you mean 'output_norm'?"),
        ("s.yaml:8: space.split: ", "unknown key - did you mean 'layers'?"),
        ("s.yaml:9: space.rate: ", "unknown key - did you mean 'lr'?"),
    ]
    for begin, end in told:
        assert any(message.startswith(begin) and message.endswith(end) for message in messages), begin
    assert len({message.split(": ")[1] for message in messages}) == len(told)


def test_a_key_that_does_not_exist_is_told_once_and_no_value_of_it_is_blamed(refused):
    """Both ends of the range would be possible, were the key spelled right."""
    (message,) = refused(space(**{f"{LR}r": "{uniform: [0.25, 0.75]}"}))
    assert message.endswith("unknown key - did you mean 'lr'?")
    assert "0.25" not in message
    assert "0.75" not in message


@pytest.mark.parametrize(
    ("key", "text", "wrong"),
    [
        (DROPOUT, "{uniform: [0.0, 1.5]}", ["1.5 is not possible: PATH: should be less than 1, not 1.5"]),
        (LR, "{uniform: [-1.0, 0.1]}", ["-1.0 is not possible: PATH: should be greater than 0, not -1.0"]),
        (LAYERS, "{int: [0, 4]}", ["0 is not possible: PATH: should be greater than 0, not 0"]),
        (LAYERS, "{uniform: [1.0, 4.5]}", ["4.5 is not possible: PATH: should be an integer, not 4.5"]),
        (HEADS, "{choice: [4, four]}", ["'four' is not possible: PATH: should be an integer, not 'four'"]),
        (
            "model.attention.output_norm",
            "{choice: [none, head, nnone]}",
            ["'nnone' is not possible: PATH: 'nnone' is not possible - did you mean 'none'?"],
        ),
    ],
)
def test_a_value_outside_of_the_schemas_range_is_told_at_its_line(refused, key, text, wrong):
    messages = refused(space(**{"pretrain.training.z_loss": "{uniform: [0.0, 1e-3]}", key: text}))
    for message in wrong:
        assert f"s.yaml:7: space.{key}: {message.replace('PATH', key)}" in messages


def test_a_value_that_fits_with_some_value_of_another_parameter_is_possible(sweep, refused):
    """8 key heads divide no 4 heads; they divide 8."""
    kv = "{choice: [null, 8]}"
    assert refused(space(**{KV: kv}))[0].startswith(f"s.yaml:6: space.{KV}: '8' is not possible")
    assert set(sweep(space(**{KV: kv, HEADS: "{choice: [4, 8]}"})).sweep.space) == {KV, HEADS}


@pytest.mark.parametrize("listed", ["[4, 2]", "[2, 4]"])
def test_a_value_that_fits_under_one_of_its_listed_conditions_is_possible(sweep, listed):
    """4 key heads divide 4 heads and not 2: the point of 2 is infeasible, the value is not impossible."""
    text = space(**{HEADS: "{choice: [2, 4, 8]}", KV: f"{{choice: [null, 4], when: {{{HEADS}: {listed}}}}}"})
    points = sweep(text).spaces["baseline"].every_point(99)
    assert {HEADS: "4", KV: "4"} in points


def test_a_key_that_one_arm_lacks_is_refused_with_the_arm_and_a_when_cures_it(sweep, refused):
    assert refused(ARMS + space(**{LAYERS: "{int: [1, 4]}"})) == [
        f"s.yaml:7: space.{LAYERS}: a key that the arm dec does not have; add a `when` that holds in the others alone"
    ]
    cured = sweep(ARMS + space(**{LAYERS: "{int: [1, 4], when: {model.family: encoder_decoder}}"}))
    assert {arm: [d.name for d in found.dimensions] for arm, found in cured.spaces.items()} == {
        "red": [LAYERS],
        "dec": [],
    }


# --- conditions ----------------------------------------------------------------------------------------------------


def test_a_condition_on_a_key_that_no_arm_has_is_an_error_with_its_line(refused):
    text = space(
        **{HEADS: "{choice: [2, 4]}", KV: "{choice: [null, 1], when: {model.atention.heads: 4}}"},
    )
    assert refused(text) == [
        f"s.yaml:7: space.{KV}.when: 'model.atention.heads' is neither searched nor a key of an arm"
        f" - did you mean '{HEADS}'?"
    ]


def test_a_condition_on_a_key_of_one_arm_alone_is_possible(sweep):
    found = sweep(ARMS + space(**{LR: "{log_uniform: [1e-4, 3e-2], when: {model.encoder.layers: 2}}"}))
    assert [len(found.spaces[arm].dimensions) for arm in ("red", "dec")] == [1, 0]


def test_conditions_in_a_circle_are_refused_with_the_circle(refused):
    text = space(
        **{
            LR: f"{{choice: [1e-3, 3e-3], when: {{{KV}: 4}}}}",
            HEADS: f"{{choice: [2, 4], when: {{{LR}: 3e-3}}}}",
            KV: f"{{choice: [null, 4], when: {{{HEADS}: 4}}}}",
        }
    )
    (message,) = refused(text)
    where, _, circle = message.partition(": conditions in a circle: ")
    names = circle.split(" -> ")
    assert names[0] == names[-1]
    assert sorted(names[1:]) == sorted([LR, HEADS, KV])
    line = {LR: 6, HEADS: 7, KV: 8}[names[0]]
    assert where == f"s.yaml:{line}: space.{names[0]}.when"


@pytest.mark.parametrize("condition", [f"{{{LR}: 1e-3}}", f"{{{LR}: 3e-3}}", "{rate: 3e-3}"])
def test_a_parameter_that_waits_for_itself_is_a_circle(refused, condition):
    """It would never be searched, or always, whatever the condition says."""
    name = "rate" if "rate" in condition else LR
    messages = refused(space(**{name: f"{{key: {LR}, choice: [1e-3, 3e-3], when: {condition}}}"}))
    assert messages[0].startswith(f"s.yaml:6: space.{name}.when: ")


BUNDLES = "{choice: {2/2: {model.encoder.layers: 2}, 3/2: {model.encoder.layers: 3}}}"


@pytest.mark.parametrize(
    ("decider", "text", "condition"),
    [
        (HEADS, "{choice: [2, 4]}", f"{HEADS}: 3"),
        (HEADS, "{choice: [2, 4]}", f"{HEADS}: [3, 5]"),
        (HEADS, "{choice: [2, 4]}", f"{HEADS}: []"),
        (HEADS, "{int: [2, 4], step: 2}", f"{HEADS}: 8"),
        (HEADS, "{int: [2, 4], step: 2}", f"{HEADS}: 3"),
        (HEADS, "{int: [2, 4], step: 2}", f"{HEADS}: four"),
        (HEADS, "{int: [2, 4], step: 2}", f"{HEADS}: null"),
        ("split", BUNDLES, "split: 9/2"),
        ("split", BUNDLES, f"{LAYERS}: 9"),
    ],
)
def test_a_condition_on_a_value_that_the_other_parameter_cannot_have_is_refused(refused, decider, text, condition):
    """The parameter would never be searched, and nobody would hear of it."""
    messages = refused(space(**{decider: text, LR: f"{{log_uniform: [1e-4, 3e-2], when: {{{condition}}}}}"}))
    assert messages[0].startswith(f"s.yaml:7: space.{LR}.when: ")


def test_a_condition_that_holds_in_no_arm_is_refused(refused):
    """Nothing moves the number of heads, and it is 4."""
    text = space(**{HEADS: "{choice: [2, 4]}", LR: "{log_uniform: [1e-4, 3e-2], when: {model.d_model: 65}}"})
    assert refused(text)[0].startswith(f"s.yaml:7: space.{LR}.when: ")


def test_a_condition_may_ask_for_a_key_that_a_bundle_sets(sweep):
    found = sweep(space(split=BUNDLES, **{LR: f"{{choice: [1e-3, 3e-3], when: {{{LAYERS}: 3}}}}"}))
    points = found.spaces["baseline"].every_point(100)
    assert sorted(map(str, points)) == sorted(
        map(str, [{"split": "2/2"}, {"split": "3/2", LR: "0.001"}, {"split": "3/2", LR: "0.003"}])
    )


# --- two parameters of one key -------------------------------------------------------------------------------------

CLASH = f"space.fast: '{LR}' sets {LR} too; give each a `when` of its own, with values apart"


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ("", ""),
        (f", when: {{{HEADS}: 4}}", ""),
        ("", f", when: {{{HEADS}: 4}}"),
        (f", when: {{{HEADS}: 4}}", f", when: {{{HEADS}: 4}}"),
        (f", when: {{{HEADS}: [2, 4]}}", f", when: {{{HEADS}: [4, 8]}}"),
        (f", when: {{{HEADS}: 4}}", ", when: {model.d_model: 64}"),
        (f", when: {{{HEADS}: 4}}", f", when: {{{HEADS}: 4.0}}"),
    ],
)
def test_two_parameters_set_one_key_only_under_conditions_that_no_point_fulfils_both(refused, slow, fast):
    text = space(
        **{
            HEADS: "{choice: [2, 4, 8]}",
            LR: f"{{log_uniform: [1e-4, 3e-2]{slow}}}",
            "fast": f"{{key: {LR}, log_uniform: [1e-3, 3e-1]{fast}}}",
        }
    )
    assert refused(text) == [f"s.yaml:8: {CLASH}"]


def test_two_parameters_of_one_key_under_conditions_apart_are_one_each(sweep):
    text = space(
        **{
            HEADS: "{choice: [2, 4, 8]}",
            LR: f"{{choice: [1e-3, 3e-3], when: {{{HEADS}: [2, 4]}}}}",
            "fast": f"{{key: {LR}, choice: [1e-2, 3e-2], when: {{{HEADS}: 8}}}}",
        }
    )
    found = sweep(text).spaces["baseline"]
    rates = {(point[HEADS], found.experiment(point).pretrain.training.optimizer.lr) for point in found.every_point(99)}
    assert rates == {(h, lr) for h in "24" for lr in (1e-3, 3e-3)} | {("8", lr) for lr in (1e-2, 3e-2)}


def test_a_parameter_below_a_key_that_another_one_sets_is_a_clash(refused):
    text = space(
        **{LR: "{log_uniform: [1e-4, 3e-2]}", "pretrain.training.optimizer": "{choice: [{lr: 3e-3}, {lr: 1e-3}]}"}
    )
    (message,) = refused(text)
    assert message.startswith(f"s.yaml:7: space.pretrain.training.optimizer: '{LR}' sets ")


# --- what is always tried ------------------------------------------------------------------------------------------


def test_an_own_setting_outside_of_what_is_searched_is_refused_with_the_arm(refused):
    text = space(
        **{
            LR: "{log_uniform: [1e-2, 3e-2]}",
            HEADS: "{choice: [1, 2]}",
            "model.d_model": "{int: [60, 80], step: 8}",
            "pretrain.training.clip_norm": "{uniform: [0.5, 2.0]}",
        }
    )
    text = f"base: {{pretrain: {{training: {{clip_norm: null}}}}}}\n{text}"
    own = "in the arm baseline, whose default setting is always tried,"
    assert refused(text) == [
        f"s.yaml:7: space.{LR}: {own} 0.003 lies outside of 0.01 to 0.03; widen it or set `base`",
        f"s.yaml:8: space.{HEADS}: the default setting of the arm baseline is none of these; it is always tried, so "
        "add it",
        f"s.yaml:9: space.model.d_model: {own} 64 lies between two steps of 8 from 60; widen it or set `base`",
        f"s.yaml:10: space.pretrain.training.clip_norm: {own} it is not set; widen it or set `base`",
    ]


def test_first_settings_with_wrong_names_and_values_are_each_told_at_their_line(refused):
    searched = {LR: "{log_uniform: [1e-4, 3e-2]}", HEADS: "{choice: [2, 4]}", LAYERS: "{int: [1, 7], step: 2}"}
    text = f"""{space(**searched)}
base: {{model: {{encoder: {{layers: 3}}}}}}
first:
  - {{{LR}: 1.0}}
  - {{lr: 1e-3}}
  - {{{LR}: fast, {HEADS}: 3}}
  - {{{LR}: 1e-3, {HEADS}: 2}}
  - {{{LAYERS}: 4}}
  - {{{LAYERS}: true}}
"""
    assert refused(text) == [
        f"s.yaml:12: first.0: {LR}: 1.0 lies outside of 0.0001 to 0.03",
        f"s.yaml:13: first.1: 'lr' is not searched - allowed here: {HEADS}, {LAYERS}, {LR}",
        f"s.yaml:14: first.2: {LR}: 'fast' is no number",
        f"s.yaml:14: first.2: {HEADS}: '3' is none of its values - allowed here: 2, 4",
        f"s.yaml:16: first.4: {LAYERS}: 4 lies between two steps of 2 from 1",
        f"s.yaml:17: first.5: {LAYERS}: True is no number",
    ]


def test_a_first_setting_opens_conditions_that_need_a_value_too(sweep, refused):
    text = space(**{HEADS: "{choice: [4, 8]}", KV: f"{{choice: [1, 8], when: {{{HEADS}: 8}}}}"})
    assert refused(f"{text}first:\n  - {{{HEADS}: 8}}\n") == [
        f"s.yaml:9: first.0: needs a value of {KV}, which the arm baseline does not have by itself"
    ]
    whole = sweep(f"{text}first:\n  - {{{HEADS}: 8, {KV}: 1}}\n")
    assert whole.firsts["baseline"] == ({HEADS: "4"}, {HEADS: "8", KV: "1"})


def test_the_own_setting_comes_before_the_first_ones_which_leave_the_rest_as_it_is(sweep):
    text = space(**{LR: "{log_uniform: [1e-4, 3e-2]}", LAYERS: "{int: [1, 4]}"})
    found = sweep(f"{text}first: [{{{LR}: 1e-3}}, {{{LAYERS}: 4}}]\n")
    assert found.firsts["baseline"] == ({LR: 3e-3, LAYERS: 2}, {LR: 1e-3, LAYERS: 2}, {LR: 3e-3, LAYERS: 4})


# --- what no search may move ---------------------------------------------------------------------------------------

COMPARED = "decides what val/target_nll is measured on: trials would not be comparable"


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("pretrain.data.sequence_length", "{choice: [64, 128]}", f"KEY {COMPARED}"),
        ("pretrain.validation.sequences", "{int: [8, 1000]}", f"KEY {COMPARED}"),
        ("pretrain.validation", "{choice: [{times: 3}, {times: 4}]}", f"KEY {COMPARED}"),
        ("pretrain.data", "{choice: [{batch_size: 16}, {batch_size: 8}]}", f"KEY {COMPARED}"),
        ("pretrain.data.tokenizer", "{choice: [bytes, {kind: bpe, vocabulary: 1024}]}", f"KEY {COMPARED}"),
        (
            "pretrain.training.execution.threads",
            "{int: [1, 4]}",
            "KEY is how the machine does it, and changes no result",
        ),
        (
            "pretrain.training.execution",
            "{choice: [{threads: 1}, {threads: 2}]}",
            "KEY is how the machine does it, and changes no result",
        ),
        ("seed", "{int: [0, 4]}", "a seed is no setting; `seeds: [0, 1, 2]` runs each trial with all"),
    ],
)
def test_what_would_make_trials_incomparable_is_not_searched_and_the_reason_is_told(refused, key, text, reason):
    assert f"s.yaml:6: space.{key}: {reason.replace('KEY', key)}" in refused(space(**{key: text}))


def test_it_is_refused_under_another_name_and_in_a_bundle_too(refused):
    text = space(
        number="{key: seed, int: [0, 4]}",
        both="{choice: {a: {pretrain.training.execution.workers: 0}, b: {pretrain.data.sequence_length: 64}}}",
    )
    assert refused(text)[:3] == [
        "s.yaml:6: space.number: a seed is no setting; `seeds: [0, 1, 2]` runs each trial with all",
        "s.yaml:7: space.both: pretrain.training.execution.workers is how the machine does it, and changes no result",
        f"s.yaml:7: space.both: pretrain.data.sequence_length {COMPARED}",
    ]


def test_the_length_of_a_sequence_may_be_searched_where_nothing_is_measured(sweep):
    text = space(**{"pretrain.data.sequence_length": "{choice: [64, 128]}"})
    assert not sweep(f"{text}optimize: [{{metric: memory_bytes}}]\n").trains


def test_an_objective_of_its_own_is_no_goal_where_the_objective_is_searched(sweep, refused):
    text = space(**{"pretrain.objective": "{choice: [causal_lm, prefix_lm]}"})
    assert refused(f"{text}optimize: [{{metric: val/objective_loss}}]\n") == [
        "s.yaml:6: space.pretrain.objective: val/objective_loss of another objective is another quantity; "
        "use val/target_nll"
    ]
    sweep(text)


@pytest.mark.parametrize(
    ("key", "option"),
    [
        (LR, f"{LR}=1e-3"),
        (LR, "pretrain.training.optimizer={kind: adamw, lr: 1e-3}"),
        ("pretrain.training.optimizer", f"{LR}=1e-3"),
    ],
)
def test_an_override_of_what_is_searched_is_refused_at_the_option(refused, key, option):
    values = {LR: "{log_uniform: [1e-4, 3e-2]}", "pretrain.training.optimizer": "{choice: [{lr: 3e-3}, {lr: 1e-3}]}"}
    messages = refused(space(**{key: values[key]}), option)
    (told,) = [message for message in messages if "is searched" in message]
    assert told.startswith(f"-o {option}: ")
    assert told.endswith(f": is searched by the sweep; change `space.{key}` instead")


def test_an_override_of_another_key_is_one_of_every_arm(sweep):
    found = sweep(ARMS + RATES.replace("1e-4", "1e-5"), "model.d_model=32", "pretrain.training.z_loss=1e-3")
    for arm, searched in found.spaces.items():
        assert searched.experiment(found.firsts[arm][0]).model.d_model == 32
        assert searched.experiment({LR: 2e-5}).pretrain.training.z_loss == 1e-3


# --- samplers and pruners ------------------------------------------------------------------------------------------

CHOICE = space(**{HEADS: "{choice: [4, 8]}", KV: "{int: [1, 4], when: {model.attention.heads: 4}}"})
TWO = "optimize: [{metric: val/target_nll}, {metric: parameters}]\n"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            f"{RATES}{TWO}sampler: cma_es\n",
            ["s.yaml:7: sampler: cma_es has one goal; for several take tpe, nsga2, nsga3, gp, random or qmc"],
        ),
        (
            f"{RATES}{TWO}pruner: median\n",
            ["s.yaml:7: pruner: with several goals nothing can be pruned; leave it out"],
        ),
        (
            f"{RATES}pruner: wilcoxon\nseeds: [0, 1, 2]\n",
            [
                "s.yaml:6: pruner: wilcoxon tells nothing from fewer than 4 seeds, and there are 3; give 5 or more",
            ],
        ),
        (
            f"{RATES}pruner: hyperband\noptimize: [{{metric: parameters}}]\n",
            ["s.yaml:6: pruner: parameters is not validated during training; only val/ metrics are"],
        ),
        (
            f"{CHOICE}sampler: cma_es\n",
            [
                f"s.yaml:6: space.{HEADS}: cma_es takes numbers alone; use tpe for a choice",
                f"s.yaml:7: space.{KV}.when: cma_es takes no conditions: it would draw this key at random; use tpe",
            ],
        ),
        (
            f"{CHOICE}sampler: gp\n",
            [f"s.yaml:7: space.{KV}.when: gp takes no conditions: it would draw this key at random; use tpe"],
        ),
        (
            f"{CHOICE}sampler: qmc\n",
            [f"s.yaml:7: space.{KV}.when: qmc takes no conditions: it would draw this key at random; use tpe"],
        ),
        (
            f"{CHOICE}sampler: cma_es\npruner: wilcoxon\noptimize: [{{metric: parameters}}]\n",
            [
                "s.yaml:9: pruner: parameters is not validated during training; only val/ metrics are",
                "s.yaml:9: pruner: wilcoxon tells nothing from fewer than 4 seeds, and there are 1; give 5 or more",
                f"s.yaml:6: space.{HEADS}: cma_es takes numbers alone; use tpe for a choice",
                f"s.yaml:7: space.{KV}.when: cma_es takes no conditions: it would draw this key at random; use tpe",
            ],
        ),
    ],
)
def test_a_sampler_or_pruner_that_cannot_do_it_is_refused_with_one_that_can(refused, text, messages):
    assert refused(text) == messages


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3", "random"])
def test_the_samplers_that_the_refusals_propose_take_the_space(sweep, sampler):
    base = f"base: {{model: {{attention: {{kv_heads: 4}}}}}}\n{CHOICE}{TWO}"
    assert sweep(f"{base}sampler: {sampler}\n").sweep.sampler == sampler


# --- constraints ---------------------------------------------------------------------------------------------------


def test_a_constraint_that_an_arms_own_setting_breaks_is_refused_with_the_numbers(refused):
    text = f"""{ARMS}{space(**{LR: "{log_uniform: [1e-4, 3e-2]}"})}
constraints:
  - model.d_model >= 64
  - model.d_model > 64
  - model.decoder.layers * 16 <= 2 * model.d_model / 4
"""
    always = "whose default setting is always tried"
    assert refused(text) == [
        f"s.yaml:11: constraints: model.d_model > 64 does not hold for the arm red, {always}: model.d_model = 64",
        f"s.yaml:11: constraints: model.d_model > 64 does not hold for the arm dec, {always}: model.d_model = 64",
        "s.yaml:12: constraints: model.decoder.layers * 16 <= 2 * model.d_model / 4 does not hold for the arm dec, "
        f"{always}: model.decoder.layers = 4, model.d_model = 64",
    ]


def test_unknown_names_in_constraints_are_each_told_at_their_line(refused):
    text = f"""{RATES}constraints:
  - paramters <= 2e7
  - model.dmodel <= 128
  - model.family == 3
  - parameters / (model.d_model - 64) <= 3
  - parameters <= 2e7
"""
    first, second, third, fourth = refused(text)
    said = "is neither a figure nor a key with a number - did you mean"
    assert first == f"s.yaml:7: constraints: paramters <= 2e7: 'paramters' {said} 'parameters'?"
    assert second == f"s.yaml:8: constraints: model.dmodel <= 128: 'model.dmodel' {said} 'model.d_model'?"
    assert third.startswith("s.yaml:9: constraints: model.family == 3: 'model.family' is neither a figure nor a key")
    assert fourth.startswith("s.yaml:10: constraints: parameters / (model.d_model - 64) <= 3: ")
    assert "division by zero" in fourth


def test_constraints_outside_of_the_grammar_are_each_told_at_their_line(refused):
    text = f"""{RATES}constraints:
  - 1 < parameters < 3
  - parameters <= 2e7
  - abs(parameters) <= 3
"""
    assert refused(text) == [
        "s.yaml:7: constraints: '1 < parameters < 3' compares no two sides by one of <=, <, >=, >, ==",
        "s.yaml:9: constraints: 'abs(parameters)' is not possible; numbers, keys, figures and + - * / are",
    ]


def test_a_number_in_a_constraint_that_no_float_holds_is_an_error_of_the_file(refused):
    assert refused(f"{RATES}constraints:\n  - parameters <= 0x{'f' * 280}\n")[0].startswith("s.yaml:7: constraints: ")


# --- at once -------------------------------------------------------------------------------------------------------


def test_mistakes_of_the_space_the_constraints_and_the_arms_are_told_together(refused):
    text = f"""base: {{foo: 1}}
space:
  seed: {{int: [0, 3]}}
  {LR}: {{log_uniform: [1e-4, 3e-2]}}
  fast: {{key: {LR}, log_uniform: [1e-4, 3e-2]}}
constraints: [a < b < c]
"""
    assert refused(text, f"{LR}=3") == [
        f"s.yaml:9: {CLASH}",
        "s.yaml:7: space.seed: a seed is no setting; `seeds: [0, 1, 2]` runs each trial with all",
        f"-o {LR}=3: {LR}: is searched by the sweep; change `space.{LR}` instead",
        f"-o {LR}=3: {LR}: is searched by the sweep; change `space.fast` instead",
        "s.yaml:10: constraints: 'a < b < c' compares no two sides by one of <=, <, >=, >, ==",
        "s.yaml:5: foo: unknown key - allowed here: adapt, evaluate, finetune, model, pretrain, seed",
    ]


def test_a_mistake_of_the_file_does_not_hide_one_of_the_arms(refused):
    messages = refused(f"arms: {{red: {{foo: 1}}}}\n{RATES}tirals: 3\n")
    assert [message.split(": ")[:2] for message in messages] == [["s.yaml:7", "tirals"], ["s.yaml:5", "foo"]]


def test_a_mistake_of_a_constraint_does_not_hide_one_of_the_values(refused):
    messages = refused(f"{space(**{DROPOUT: '{uniform: [0.0, 1.5]}'})}constraints: [a < b < c, paramters < 3]\n")
    told = {tuple(message.split(": ")[:2]) for message in messages}
    assert told == {("s.yaml:6", f"space.{DROPOUT}"), ("s.yaml:7", "constraints")}
    assert any("paramters" in message for message in messages)
    assert any("a < b < c" in message for message in messages)


def test_a_mistake_of_a_first_setting_does_not_hide_a_constraint_that_does_not_hold(refused):
    messages = refused(f"{RATES}constraints: [parameters <= 10]\nfirst: [{{lr: 1}}]\n")
    assert sorted(message.split(": ")[1] for message in messages) == ["constraints", "first.0"]


@pytest.mark.parametrize("kind", ["hyperband", "successive_halving"])
def test_halving_takes_no_search_of_what_moves_the_validations(sweep, refused, kind):
    """Optuna fills a rung with the first report at or above it: at 4 of 9 where others were ranked at 1 of 9."""
    size, steps = "pretrain.data.batch_size", "pretrain.training.max_steps"
    sizes, lengths = space(**{size: "{choice: [8, 16, 32]}"}), space(**{steps: "{int: [100, 300]}"})
    by_tokens, by_steps = (f"pruner: {{kind: {kind}, by: {unit}}}\n" for unit in ("tokens", "steps"))
    ranks = f"{kind} ranks trials after equally many"
    assert refused(sizes + by_tokens) == [
        f"s.yaml:6: space.{size}: {ranks} tokens, and those of another {size} are validated after others; "
        "take the pruner median or `by: steps`"
    ]
    assert refused(lengths + by_steps) == [
        f"s.yaml:6: space.{steps}: {ranks} steps, and those of another {steps} are validated after others; "
        "take the pruner median"
    ]
    assert len(refused(lengths + by_tokens)) == 1
    sweep(sizes + by_steps)
    sweep(sizes + "pruner: {kind: median, by: tokens}\n")
    bundles = space(budget=f"{{choice: {{a: {{{steps}: 100}}, b: {{{steps}: 200}}}}}}")
    assert refused(bundles + by_steps)[0].startswith(f"s.yaml:6: space.budget: {ranks} steps")


def test_no_pruner_ranks_averages_against_current_weights(sweep, refused):
    """An exponential average is there from the first step on."""
    key = "pretrain.training.weight_averaging"
    averages = space(**{key: "{choice: [null, {kind: last_k, every: 1}]}"})
    assert refused(averages + "pruner: median\n") == [
        f"s.yaml:6: space.{key}: median ranks trials during the training, where some are validated with an average of "
        "the weights and some without; take the pruner none"
    ]
    sweep(averages)
    decays = space(**{f"{key}.decay": "{uniform: [0.9, 0.99]}"})
    sweep(decays + "base: {pretrain: {training: {weight_averaging: {decay: 0.95}}}}\npruner: median\n")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cma_es", "nsga2", "nsga3", "random", "qmc"])
def test_every_sampler_takes_every_seed_of_64_bits(write_sweep, sampler):
    """scipy's Sobol sequence, which qmc draws from, wants one of 32."""
    import optuna

    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}"
    path = write_sweep("seeds", f"{space}\nseeds: [{2**63 - 1}]\nsampler: {sampler}")
    sweep = load_sweep(path).sweep
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for number in range(3):
        study.sampler = make_sampler(sweep, number)
        trial = study.ask()
        assert 1e-4 <= trial.suggest_float("lr", 1e-4, 1e-1, log=True) <= 1e-1
        study.tell(trial, 1.0)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
@pytest.mark.parametrize(
    "space",
    [
        "pretrain.training.optimizer.lr: {{log_uniform: [1e-4, {0}]}}",
        "pretrain.training.optimizer.lr: {{uniform: [{0}, 1.0]}}",
        "pretrain.training.optimizer.lr: {{uniform: [1e-4, 1.0], step: {0}}}",
        "pretrain.training.optimizer.lr: {{choice: [{0}, 3e-3]}}",
        "lr: {{choice: {{a: {{pretrain.training.optimizer.lr: {0}}}, b: {{pretrain.training.optimizer.lr: 3e-3}}}}}}",
        "model.feed_forward.d_ff: {{int: [8, {0}]}}",
        "pretrain.training.optimizer.lr: {{log_uniform: [1e-4, 1.0], when: {{model.d_model: {0}}}}}",
    ],
)
def test_what_is_no_finite_number_is_refused_in_a_space(write_sweep, space, value):
    path = write_sweep("infinite", f"space:\n  {space.format(value)}")
    with pytest.raises(InputError) as error:
        load_sweep(path)
    assert all(problem.key.startswith("space") for problem in error.value.problems)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e999"])
def test_what_is_no_finite_number_is_refused_among_the_first_settings(write_sweep, value):
    lr = "pretrain.training.optimizer.lr"
    path = write_sweep("first", f"space: {{{lr}: {{log_uniform: [1e-4, 1.0]}}}}\nfirst: [{{{lr}: {value}}}]")
    with pytest.raises(InputError, match=r"first\.0"):
        load_sweep(path)
