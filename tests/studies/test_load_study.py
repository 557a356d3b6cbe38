"""From a study file to its arms: every point once, named by what is switched, or every mistake at once."""

import pytest

from lit_llm.config.problems import InputError
from lit_llm.config.tree import leaves
from lit_llm.experiment.load import PRESETS, load_experiment
from lit_llm.studies.design.factors import label_of
from lit_llm.studies.load import load_study

HEAD = "study: s\nquestion: Does it?\n"


@pytest.fixture
def study(tmp_path):
    """study(text, *overrides) loads a study that extends redllm-tiny; the text begins in its line 4."""

    def load(text="", *overrides, extends="redllm-tiny"):
        path = tmp_path / "s.yaml"
        path.write_text(f"{HEAD}extends: {extends}\n{text}\n")
        return load_study(path, overrides)

    return load


@pytest.fixture
def refused(study, tmp_path):
    """The messages that a study is refused with, without the folder of the file."""

    def messages(text="", *overrides, **options):
        with pytest.raises(InputError) as caught:
            study(text, *overrides, **options)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return messages


def names(ablation):
    return [arm.name for arm in ablation.arms]


def baselines(ablation):
    return {arm.name: arm.baseline for arm in ablation.arms}


def value(ablation, arm, key):
    return dict(leaves(ablation.arm(arm).flat))[key]


LR = "pretrain.training.optimizer.lr"
NORM = "model.attention.output_norm"
STEPS = "pretrain.training.max_steps"


# --- precedence ----------------------------------------------------------------------------------------------------


def test_each_layer_wins_over_the_one_before(study, tmp_path):
    """defaults < extends < base < arm < factors and -o, seen on six keys of which each layer sets one less."""
    keys = ["z_loss", "clip_norm", "max_steps", "schedule.warmup_steps", "stability.spike_window"]
    keys = [f"pretrain.training.{key}" for key in keys]

    below = "{z_loss: 11.0, clip_norm: 11.0, max_steps: 11, schedule: {warmup_steps: 1}}"
    (tmp_path / "below.yaml").write_text(f"extends: redllm-tiny\npretrain: {{training: {below}}}")
    text = f"""
base: {{pretrain: {{training: {{clip_norm: 22.0, max_steps: 22, schedule: {{warmup_steps: 2}}}}}}}}
arms: {{a: {{pretrain: {{training: {{max_steps: 33, schedule: {{warmup_steps: 3}}}}}}}}}}
grid: {{factors: {{{keys[3]}: [4, 5]}}}}
"""
    ablation = study(text, extends="below.yaml")
    found = [value(ablation, "a", key) for key in keys]
    assert found == [11, 22, 33, 4, 20]  # the last is the default
    assert value(ablation, "a/warmup_steps=5", keys[3]) == 5
    changed = study(text, f"{keys[2]}=66", f"{keys[0]}=7.0", extends="below.yaml")
    assert [value(changed, arm, keys[2]) for arm in names(changed)] == [66, 66]
    assert value(changed, "a", keys[0]) == 7


@pytest.mark.parametrize("key", [LR, "pretrain.training.optimizer", "pretrain.training"])
def test_an_override_of_what_a_factor_sets_is_refused(refused, key):
    """Its arms would no longer be what they are called."""
    value = {LR: "1", "pretrain.training.optimizer": "{lr: 1}", "pretrain.training": "{optimizer: {lr: 1}}"}[key]
    assert refused(f"grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}", f"{key}={value}") == [
        f"-o {key}={value}: {LR}: is set by the factor '{LR}'; change its levels in the study, or choose arms by --only"
    ]


def test_an_override_beside_what_a_bundle_sets_is_none_of_a_factor(study):
    factor = "grid: {factors: {model.attention: [{heads: 4}, {heads: 2}]}}"
    ablation = study(factor, "model.attention.kv_heads=2")
    assert [value(ablation, arm, "model.attention.kv_heads") for arm in names(ablation)] == [2, 2]


def test_an_arms_extends_replaces_that_of_the_study_and_base_still_applies(study):
    ablation = study("base: {pretrain: {training: {max_steps: 77}}}\narms: {red: {}, dec: {extends: decllm-tiny}}")
    dec = ablation.arm("dec").experiment
    assert dec.model.family == "decoder"
    assert dec.pretrain.objective.kind == "causal_lm"
    assert (value(ablation, "red", STEPS), value(ablation, "dec", STEPS)) == (77, 77)
    expected = load_experiment("decllm-tiny", [f"{STEPS}=77"])
    assert dec == expected


def test_an_arm_may_extend_several_files_relative_to_the_study(study, tmp_path, monkeypatch):
    (tmp_path / "more.yaml").write_text("pretrain: {training: {max_steps: 44}}")
    monkeypatch.chdir("/")
    assert value(study("arms: {a: {extends: [decllm-tiny, more.yaml]}}"), "a", STEPS) == 44


def test_a_study_whose_arms_all_extend_needs_no_preset_of_its_own(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(f"{HEAD}arms: {{red: {{extends: redllm-tiny}}, dec: {{extends: decllm-tiny}}}}")
    assert names(load_study(path)) == ["red", "dec"]


def test_base_wins_over_another_kind_that_was_extended(study):
    text = """
base: {pretrain: {training: {schedule: constant}}}
arms: {a: {pretrain: {training: {schedule: {warmup_steps: 7}}}}}
"""
    schedule = study(text).arm("a").experiment.pretrain.training.schedule
    assert (schedule.kind, schedule.warmup_steps) == ("constant", 7)


# --- the grid ------------------------------------------------------------------------------------------------------


def test_without_arms_and_grid_there_is_the_baseline(study):
    ablation = study()
    assert baselines(ablation) == {"baseline": "baseline"}
    assert ablation.arms[0].experiment == load_experiment("redllm-tiny")


def test_factorial_is_every_combination_and_names_what_is_not_at_its_first_level(study):
    text = f"grid: {{design: factorial, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2, 3e-2]}}}}"
    ablation = study(text)
    assert names(ablation) == [
        "baseline",
        "baseline/lr=0.01",
        "baseline/lr=0.03",
        "baseline/output_norm=none",
        "baseline/output_norm=none/lr=0.01",
        "baseline/output_norm=none/lr=0.03",
    ]
    assert set(baselines(ablation).values()) == {"baseline"}
    assert value(ablation, "baseline/output_norm=none/lr=0.03", LR) == 0.03
    assert ablation.arm("baseline").intervened_keys == {NORM, LR}


def test_one_at_a_time_switches_each_level_alone(study):
    text = f"grid: {{design: one_at_a_time, factors: {{{NORM}: [head, none, concat], {LR}: [1e-3, 1e-2]}}}}"
    ablation = study(text)
    assert names(ablation) == [
        "baseline",
        "baseline/output_norm=none",
        "baseline/output_norm=concat",
        "baseline/lr=0.01",
    ]
    assert value(ablation, "baseline/lr=0.01", NORM) == "head"


def test_one_at_a_time_is_the_default_design(study):
    assert len(study(f"grid: {{factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}}}").arms) == 3


def test_arms_times_grid_but_an_arm_may_opt_out(study):
    text = f"""
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}, alone: {{grid: false, model: {{attention: {{rope: none}}}}}}}}
grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}
"""
    ablation = study(text)
    assert names(ablation) == ["red", "red/lr=0.01", "dec", "dec/lr=0.01", "alone"]
    assert value(ablation, "alone", LR) == 3e-3
    assert (ablation.arm("alone").levels, ablation.arm("alone").intervened_keys) == ({}, frozenset())
    assert ablation.arm("dec/lr=0.01").levels == {LR: "0.01"}


def test_an_exclusion_leaves_out_the_combinations_that_it_names(study):
    text = f"""
grid:
  design: factorial
  factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}
  exclude: [{{{NORM}: none, {LR}: 0.01}}]
"""
    assert names(study(text)) == ["baseline", "baseline/lr=0.01", "baseline/output_norm=none"]


def test_an_exclusion_may_name_a_list_a_bundle_or_one_factor_alone(study):
    text = """
grid:
  design: factorial
  factors:
    model.attention.qkv_norm: [[q, k, v], [], [q]]
    split: {2/2: {model.encoder.layers: 2}, 3/2: {model.encoder.layers: 3}}
  exclude: [{model.attention.qkv_norm: [], split: 3/2}, {model.attention.qkv_norm: [q]}]
"""
    assert names(study(text)) == ["baseline", "baseline/split=3/2", "baseline/qkv_norm=none"]


def test_a_bundle_sets_several_keys_and_declares_them(study):
    text = """
grid:
  factors:
    split:
      2/2: {model.encoder.layers: 2, model.decoder.layers: 2}
      3/1: {model.encoder.layers: 3, model.decoder.layers: 1}
"""
    ablation = study(text)
    assert names(ablation) == ["baseline", "baseline/split=3/1"]
    model = ablation.arm("baseline/split=3/1").experiment.model
    assert (model.encoder.layers, model.decoder.layers) == (3, 1)
    assert ablation.arm("baseline/split=3/1").intervened_keys == {"model.encoder.layers", "model.decoder.layers"}


def test_a_level_may_be_a_variant_with_keys_of_its_own(study):
    text = """
grid:
  factors:
    pretrain.training.schedule: [{kind: cosine, warmup_steps: 3}, constant, {kind: constant, warmup_steps: 5}]
"""
    ablation = study(text)
    schedules = [arm.experiment.pretrain.training.schedule for arm in ablation.arms]
    assert [(s.kind, s.warmup_steps) for s in schedules] == [("cosine", 3), ("constant", 0), ("constant", 5)]
    assert names(ablation)[1:] == ["baseline/schedule=constant", "baseline/schedule=kind=constant,warmup_steps=5"]


def test_factors_with_the_same_last_word_get_names_that_tell_them_apart(study):
    text = """
grid: {factors: {model.encoder.layers: [2, 3], model.decoder.layers: [2, 3], pretrain.training.max_steps: [40, 50]}}
"""
    assert names(study(text))[1:] == ["baseline/encoder.layers=3", "baseline/decoder.layers=3", "baseline/max_steps=50"]


@pytest.mark.parametrize(
    ("level", "label"),
    [
        (1e-3, "0.001"),
        (1e-6, "1e-06"),
        (0.1, "0.1"),
        (1.0000001, "1.0000001"),
        (3, "3"),
        (True, "true"),
        (None, "null"),
        ([], "none"),
        (["q", "k"], "q+k"),
        ({"kind": "x", "a": [1, 2]}, "kind=x,a=1+2"),
        ("word", "word"),
    ],
)
def test_a_level_is_called_what_people_would_call_it(level, label):
    assert label_of(level) == label


def test_the_first_level_of_a_factor_may_repeat_what_holds(study):
    text = "grid: {factors: {model.decoder.cross_attention.rope: [continuous, restart, none]}}"
    assert len(study(text).arms) == 3


def test_seeds_are_those_of_the_study_and_not_of_the_arms(study):
    ablation = study("seeds: [3, 5]")
    assert ablation.study.seeds == (3, 5)
    assert [ablation.arms[0].seeded(seed).seed for seed in ablation.study.seeds] == [3, 5]
    assert "seed" not in ablation.arms[0].flat


# --- baselines -----------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_first_arm_or_the_one_that_compare_names(study):
    arms = "arms: {red: {}, dec: {extends: decllm-tiny}}"
    assert baselines(study(arms)) == {"red": "red", "dec": "red"}
    assert baselines(study(f"{arms}\ncompare: {{baseline: dec}}")) == {"red": "dec", "dec": "dec"}


def test_within_a_factor_each_arm_meets_the_baseline_of_its_own_level(study):
    text = f"""
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}, alone: {{grid: false, model: {{attention: {{rope: none}}}}}}}}
grid: {{design: factorial, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}}}
compare: {{baseline: red, stratify_by: [{LR}]}}
"""
    assert baselines(study(text)) == {
        "red": "red",
        "red/lr=0.01": "red/lr=0.01",
        "red/output_norm=none": "red",
        "red/output_norm=none/lr=0.01": "red/lr=0.01",
        "dec": "red",
        "dec/lr=0.01": "red/lr=0.01",
        "dec/output_norm=none": "red",
        "dec/output_norm=none/lr=0.01": "red/lr=0.01",
        "alone": "red",
    }


def test_a_baseline_outside_the_grid_is_everyones(study):
    text = f"""
arms: {{red: {{grid: false}}, dec: {{extends: decllm-tiny}}}}
grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}
compare: {{stratify_by: [{LR}]}}
"""
    assert baselines(study(text)) == {"red": "red", "dec": "red", "dec/lr=0.01": "red"}


def test_a_baseline_that_is_excluded_is_refused_with_the_arms_that_need_it(refused):
    text = f"grid:\n  design: factorial\n  factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}\n  exclude: "
    said = "would be compared with an arm that is excluded"
    assert refused(f"{text}[{{{NORM}: head, {LR}: 1e-3}}]") == [
        "s.yaml:7: grid.exclude: baseline/lr=0.01, baseline/output_norm=none, baseline/output_norm=none/lr=0.01 " + said
    ]
    within = f"[{{{NORM}: head, {LR}: 1e-2}}]\ncompare: {{stratify_by: [{LR}]}}"
    assert refused(text + within) == [f"s.yaml:7: grid.exclude: baseline/output_norm=none/lr=0.01 {said}"]


# --- what is wrong with a study ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("grid: {factors: {}}", ["s.yaml:4: grid.factors: needs at least 1 of them, has 0"]),
        ("grid: {}", ["s.yaml:4: grid.factors: is needed, and there is no default"]),
        (
            f"grid:\n  factors:\n    {NORM}: []\n    {LR}: [1e-3]\n    {STEPS}: [3, 3]",
            [
                f"s.yaml:6: grid.factors.{NORM}: has no levels; give at least two, the baseline's first",
                f"s.yaml:7: grid.factors.{LR}: has one level, so nothing is switched; set it in `base` instead",
                f"s.yaml:8: grid.factors.{STEPS}: has the same level twice",
            ],
        ),
        (
            f"grid: {{factors: {{{LR}: [1e-3, 0.001]}}}}",
            [f"s.yaml:4: grid.factors.{LR}: has the same level twice"],
        ),
        (
            "grid: {factors: {model.attention.qkv_norm: [[], none]}}",
            ["s.yaml:4: grid.factors.model.attention.qkv_norm: two levels are called 'none'; name them"],
        ),
        (
            f"grid: {{factors: {{{NORM}: [head, none]}}, exclude: [{{{NORM}: nome}}, {{{LR}: 1}}]}}",
            [
                f"s.yaml:4: grid.exclude.{NORM}: 'nome' is not a level of it - did you mean 'none'?",
                f"s.yaml:4: grid.exclude.{LR}: unknown factor - allowed here: {NORM}",
            ],
        ),
        (
            f"grid: {{factors: {{{NORM}: [head, none]}}, exclude: [{{{NORM}: head}}, {{{NORM}: none}}]}}",
            ["s.yaml:4: grid.exclude: every combination is excluded"],
        ),
        (
            "grid:\n  factors:\n    a: {x: {model.encoder.layers: 2}, y: {model.encoder.layers: 3}}\n"
            "    model.encoder.layers: [2, 3]\n    model.encoder: [{layers: 1}, {layers: 2}]",
            [
                "s.yaml:7: grid.factors.model.encoder.layers: the factors 'a' and 'model.encoder.layers' both set "
                "model.encoder.layers",
                "s.yaml:8: grid.factors.model.encoder: the factors 'a' and 'model.encoder' both set model.encoder",
            ],
        ),
        (
            "grid: {factors: {a: {x: {}, y: 3}}}",
            [
                "s.yaml:4: grid.factors.a.x: a named level is a mapping of keys to values",
                "s.yaml:4: grid.factors.a.y: a named level is a mapping of keys to values",
            ],
        ),
        ("arms: {red: {grid: maybe}}", ["s.yaml:4: arms.red.grid: should be true or false"]),
        (
            "arms: {a/b: {}}",
            ["s.yaml:4: arms.a/b: 'a/b' is not a plain name: letters, digits, '-', '_' and '.', no path"],
        ),
        (
            "arms: {red: {}}\ncompare: {baseline: rde}",
            ["s.yaml:5: compare.baseline: there is no arm 'rde' - did you mean 'red'?"],
        ),
        ("like: other.yaml", ["s.yaml:4: like: unknown key - it is called 'extends_study' now"]),
        (
            "base: {pretrain: {masks: {documents: separate}}}",
            [
                "s.yaml:4: pretrain.masks.documents: unknown key - it is called 'intra_document' now "
                "(true for separate, false for joined)"
            ],
        ),
        ("compare: {within: [lr]}", ["s.yaml:4: compare.within: unknown key - it is called 'stratify_by' now"]),
        (
            "arms: {red: {}, dec: {against: red}}",
            ["s.yaml:4: arms.dec.against: unknown key - it is called 'baseline' now"],
        ),
        (
            "arms: {red: {model: {decoder: {cross: merged}}}}",
            ["s.yaml:4: model.decoder.cross: unknown key - it is called 'cross_attention_mode' now"],
        ),
        ("compare: {stratify_by: [lr]}", ["s.yaml:4: compare.stratify_by: 'lr' is not a factor of the grid"]),
        (
            f"grid: {{factors: {{{NORM}: [head, none]}}}}\ncompare: {{stratify_by: [model.attention.output]}}",
            [
                "s.yaml:5: compare.stratify_by: 'model.attention.output' is not a factor of the grid"
                f" - did you mean '{NORM}'?"
            ],
        ),
        ("seeds: []", ["s.yaml:4: seeds: needs at least one seed, for example [0, 1, 2]"]),
        ("seeds: [1, 2, 1]", ["s.yaml:4: seeds: a seed is there twice"]),
        ("seeds: 3", ["s.yaml:4: seeds: should be a list, not 3 - write [3]"]),
        (
            "base: {seed: 1}\narms:\n  red: {}\n  dec:\n    seed: 2\ngrid: {factors: {seed: [1, 2]}}",
            [
                "s.yaml:4: base.seed: seeds are the study's: write `seeds: [0, 1, 2]`",
                "s.yaml:8: arms.dec.seed: seeds are the study's: write `seeds: [0, 1, 2]`",
                "s.yaml:9: grid.factors.seed: seeds are the study's: write `seeds: [0, 1, 2]`",
            ],
        ),
        ("allow: [{key: pretrain.data}]", ["s.yaml:4: allow.0.because: is needed, and there is no default"]),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_at_its_line(refused, text, messages):
    assert refused(text) == messages


@pytest.mark.parametrize("name", ["../x", "a/b", "''", ".", "..", "/tmp/x", "a b", "-x", ".hidden", "~"])
def test_a_name_that_is_no_folder_of_the_store_is_refused(tmp_path, name):
    path = tmp_path / "s.yaml"
    path.write_text(f"study: {name}\nquestion: q\nextends: redllm-tiny\n")
    with pytest.raises(InputError) as caught:
        load_study(path)
    (problem,) = caught.value.problems
    assert (problem.key, problem.location.line) == ("study", 1)


# --- what is wrong with its arms -----------------------------------------------------------------------------------


def test_mistakes_of_several_arms_are_told_at_once_each_with_its_arm(refused):
    text = """
arms:
  red: {model: {atention: {heads: 4}}}
  dec: {extends: decllm-tiny, pretrain: {training: {max_stepz: 1, lr: 2}}}
  far: {extends: redllm-tyni}
  odd: {foo: 1}
"""
    assert refused(text) == [
        "s.yaml:8: extends: there is no preset and no file 'redllm-tyni' - did you mean 'redllm-tiny'?",
        "s.yaml:6: model.atention: unknown key - did you mean 'attention'? (in arm red)",
        "s.yaml:7: pretrain.training.max_stepz: unknown key - did you mean 'max_steps'? (in arm dec)",
        "s.yaml:7: pretrain.training.lr: unknown key - allowed here: attention_dropout, batch_warmup, clip_norm, "
        "dropout, execution, feed_forward_dropout, max_steps, optimizer, precision, schedule, sequence_warmup, "
        "stability, weight_averaging, z_loss (in arm dec)",
        "s.yaml:9: foo: unknown key - allowed here: adapt, evaluate, finetune, model, pretrain, seed (in arm odd)",
    ]


def test_a_mistake_that_all_arms_share_is_told_once(refused):
    text = f"""
base:
  pretrain: {{training: {{max_stepz: 1}}}}
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}
grid: {{design: factorial, factors: {{{NORM}: [head, none], {LR}: [1e-3, 1e-2]}}}}
"""
    assert refused(text) == ["s.yaml:6: pretrain.training.max_stepz: unknown key - did you mean 'max_steps'?"]


def test_mistakes_of_the_study_and_of_its_arms_are_told_together(refused):
    text = "seeds: []\nsedes: [1]\nquestionn: x\narms: {red: {foo: 1}}\ncompare: {baseline: rde}"
    assert refused(text) == [
        "s.yaml:5: sedes: unknown key - did you mean 'seeds'?",
        "s.yaml:6: questionn: unknown key - did you mean 'question'?",
        "s.yaml:4: seeds: needs at least one seed, for example [0, 1, 2]",
        "s.yaml:8: compare.baseline: there is no arm 'rde' - did you mean 'red'?",
        "s.yaml:7: foo: unknown key - allowed here: adapt, evaluate, finetune, model, pretrain, seed",
    ]


def test_a_mistake_that_may_decide_what_the_arms_are_is_told_alone(refused):
    """Without `base` or `extends` every arm would seem wrong."""
    assert refused("bas: {}\narms: {red: {foo: 1}}") == ["s.yaml:4: bas: unknown key - did you mean 'base'?"]
    assert refused("arms: {red: {foo: 1}}", extends="3") == ["s.yaml:3: extends: should be a string or a list, not 3"]


def test_a_mistake_of_the_factors_does_not_hide_one_of_the_arms(refused):
    text = f"arms: {{red: {{foo: 1}}}}\ngrid: {{factors: {{{NORM}: [head, none]}}, exclude: [{{x: 1}}]}}"
    assert refused(text) == [
        f"s.yaml:5: grid.exclude.x: unknown factor - allowed here: {NORM}",
        "s.yaml:4: foo: unknown key - allowed here: adapt, evaluate, finetune, model, pretrain, seed",
    ]


def test_a_wrong_key_in_a_layer_is_told_at_that_layers_file_and_line(refused, tmp_path):
    (tmp_path / "below.yaml").write_text("extends: redllm-tiny\n\nmodel: {x1: 1}")
    (tmp_path / "armfile.yaml").write_text("extends: decllm-tiny\nmodel:\n  x2: 1")
    text = """base:
  model:
    x3: 1
arms:
  red:
    model: {x4: 1}
  dec:
    extends: armfile.yaml
grid:
  factors:
    model.x5:
      - 1
      - 2
"""
    messages = refused(text, "model.x6=1", extends="below.yaml")
    assert sorted({tuple(message.split(": ")[1::-1]) for message in messages}) == [
        ("model.x1", "below.yaml:3"),
        ("model.x2", "armfile.yaml:3"),
        ("model.x3", "s.yaml:6"),
        ("model.x4", "s.yaml:9"),
        ("model.x5", "s.yaml:15"),
        ("model.x5", "s.yaml:16"),
        ("model.x6", "-o model.x6=1"),
    ]
    assert all("unknown key" in message for message in messages)


def test_a_value_of_a_preset_that_an_arm_makes_impossible_is_told_at_the_preset_with_the_arm(refused):
    assert refused("arms: {red: {}, short: {pretrain: {training: {max_steps: 20}}}}") == [
        f"{PRESETS}/_tiny.yaml:12: pretrain.training.schedule.warmup_steps: "
        "30 are more than max_steps 20 (in arm short)"
    ]


def test_a_factor_whose_key_an_arm_does_not_have_is_refused_with_the_arm(refused):
    text = "arms: {red: {}, dec: {extends: decllm-tiny}}\ngrid:\n  factors:\n    model.encoder.layers: [2, 3]"
    (message,) = refused(text)
    assert message.startswith("s.yaml:7: model.encoder.layers: a factor that the arm dec does not have")
    assert "grid: false" in message
    assert refused("grid:\n  factors:\n    model.attention.output_nrom: [head, none]") == [
        "s.yaml:6: model.attention.output_nrom: unknown key - did you mean 'output_norm'?"
    ]


def test_a_wrong_level_is_told_once_at_its_line_however_many_arms_have_it(refused):
    text = f"""
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}
grid:
  design: factorial
  factors:
    {NORM}:
      - head
      - haed
    {LR}: [1e-3, fast]
"""
    assert refused(text) == [
        "s.yaml:12: pretrain.training.optimizer.lr: should be a number, not 'fast'",
        "s.yaml:11: model.attention.output_norm: 'haed' is not possible - did you mean 'head'?",
    ]


def test_levels_that_do_not_fit_together_are_told_with_the_arms_where_they_meet(refused):
    text = """
grid:
  design: factorial
  factors:
    model.attention.heads: [4, 2]
    model.attention.kv_heads: [2, 4]
"""
    (message,) = refused(text)
    assert message.endswith("kv_heads 4 does not divide heads 2 (in arm baseline/heads=2/kv_heads=4)")


def test_what_a_factor_completes_may_be_missing_before(study):
    """Only the arms have to be whole: here the prefix fits one length, and each level brings both."""
    text = """
base: {pretrain: {objective: {split: 200}}}
grid:
  factors:
    length:
      long: {pretrain.data.sequence_length: 256}
      longer: {pretrain.data.sequence_length: 512}
"""
    assert len(study(text).arms) == 2


# --- overrides that change nothing ---------------------------------------------------------------------------------

IDLE = "changes nothing in the resolved model"


def test_an_idle_key_of_base_or_of_an_arm_is_refused_at_its_line(refused):
    text = """
base: {model: {decoder: {cross_attention: {rope: continuous}}}}
arms:
  red: {}
  own: {model: {encoder: {attention: {kv_heads: 4}}}}
"""
    base, arm = refused(text)
    assert base.startswith(f"s.yaml:5: model.decoder.cross_attention.rope: {IDLE}")
    assert arm.startswith(f"s.yaml:8: model.encoder.attention.kv_heads: {IDLE}")
    assert arm.endswith("(in arm own)")


def test_an_idle_override_of_the_command_line_is_refused_in_a_study_too(refused):
    option = "model.decoder.cross_attention.rope=continuous"
    for text in ("", "arms: {red: {}, wide: {model: {d_model: 32}}}", f"grid: {{factors: {{{LR}: [1e-3, 1e-2]}}}}"):
        (message,) = refused(text, option, "model.d_model=128")
        assert message.startswith(f"-o {option}: model.decoder.cross_attention.rope: {IDLE}")


def test_a_key_that_holds_one_place_while_a_factor_switches_the_rest_is_not_idle(study):
    text = """
base: {model: {decoder: {cross_attention: {rope: continuous}}}}
grid: {factors: {model.attention.rope: [continuous, none]}}
"""
    switched = study(text).arm("baseline/rope=none").experiment.model
    assert switched.decoder.cross_attention.rope == "continuous"
    assert switched.attention.rope == "none"


def test_a_key_that_is_idle_at_every_level_is_refused(refused):
    text = f"""
base: {{model: {{decoder: {{cross_attention: {{rope: continuous}}}}}}}}
grid: {{factors: {{{NORM}: [head, none]}}}}
"""
    (message,) = refused(text)
    assert message.startswith(f"s.yaml:5: model.decoder.cross_attention.rope: {IDLE}")


# --- the command line, and studies of one arm ----------------------------------------------------------------------


def test_overrides_that_are_wrong_are_told_together(refused):
    messages = refused("", "nonsense", "seed=3", "model.attention.heads=x")
    assert messages[0].startswith("-o nonsense: an override is")
    assert messages[1:] == [
        "-o seed=3: seed: seeds are the study's, change them there",
        "-o model.attention.heads=x: model.attention.heads: should be an integer, not 'x'",
    ]


def test_a_preset_and_an_experiment_file_are_studies_of_one_arm(tmp_path):
    preset = load_study("redllm-tiny", ["seed=7"])
    assert (names(preset), preset.study.study, preset.study.seeds) == (["redllm-tiny"], "redllm-tiny", (7,))
    path = tmp_path / "my own (2).yaml"
    path.write_text("extends: decllm-tiny\nseed: 4")
    single = load_study(path)
    assert (names(single), single.study.study, single.study.seeds) == (["my-own-2-"], "my-own-2-", (4,))
    assert single.arms[0].experiment == load_experiment(path)


@pytest.mark.parametrize("source", ["redllm-tyni", "nowhere.yaml", "", "x" * 5000])
def test_a_study_that_is_not_there_is_one_message(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no preset and no file"):
        load_study(source)


@pytest.mark.parametrize("text", ["", "a: 1", "question: x\narms: {}"])
def test_a_file_that_is_neither_a_study_nor_an_experiment_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="is neither a study"):
        load_study(path)
