"""The studies in `ablations/`: each runs, and a `-paper` sibling differs from its own in preset and budget alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_llm.config.section import validate
from lit_llm.config.tree import leaves, merge, read_file, tree
from lit_llm.experiment.schema import Experiment
from lit_llm.report.pages.study import write_report
from lit_llm.store.store import Store
from lit_llm.studies.audit.budgets import unused_rules
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.load import Ablation, Arm, load_study
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.schema import Allowed
from tests.instructions import write_instructions
from tests.pages import ReadPage

STUDIES = sorted((Path(__file__).parents[2] / "ablations").glob("*.yaml"))
SIBLINGS = [path for path in STUDIES if path.stem.endswith("-paper")]
QUICK = ("quickstart", "finetune_reversal", "scaling")
"""One study of one stage, one of two and one over sizes run in the fast suite."""
SMALL = [
    "pretrain.data.sequence_length=16",
    "pretrain.data.tokenizer=bytes",
    "model.vocabulary=320",
    "model.d_model=32",
    "model.feed_forward.d_ff=64",
    "model.attention={heads: 4, head_dim: 8}",
]
"""Narrow, so that the layers of an 8B model take no time; as many of them as the study says."""
SMALL_TASK = [override for override in SMALL if not override.startswith(("pretrain.data", "model.vocabulary"))]
"""The same for a study of a synthetic task, whose examples have lengths and symbols of their own."""
OF_STUDY = {
    "recall": SMALL_TASK,
    "experts": [*SMALL, "model.feed_forward.d_ff=256"],  # which its experts divide
}
"""{study: its overrides, where they are not SMALL}."""


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In place of files that a user makes or downloads."""
    folder = tmp_path_factory.mktemp("instructions")
    write_instructions(folder)
    return folder


def two_steps(arm: Arm, instructions: Path) -> Arm:
    training = arm.experiment.pretrain.training
    keys: dict[str, Any] = {
        "data": {"batch_size": 2},
        "training": {
            "max_steps": 2,
            "schedule": training.schedule.scaled(2 / training.max_steps).model_dump(mode="json"),
            "stability": {"logit_every": 1},
            "execution": {"micro_batch_size": None, "accelerator": "cpu"},
        },
        "validation": {"times": 1, "sequences": 2},
    }
    if arm.experiment.pretrain.data.corpus.kind not in ("python-stdlib", "synthetic"):
        keys["data"]["corpus"] = {"kind": "python-stdlib"}
    sections: dict[str, Any] = {"pretrain": keys}
    if arm.experiment.adapt is not None:
        (source,) = arm.experiment.adapt.experiments.values()
        given = source.pretrain.training
        schedule = given.schedule.scaled(2 / given.max_steps).model_dump(mode="json")
        sections["adapt"] = {"from": {"pretrain": keys | {"training": keys["training"] | {"schedule": schedule}}}}
    if arm.experiment.finetune is not None:
        examples = {"kind": "jsonl", "files": [str(instructions / "glosses" / "train.jsonl")]}
        data = {"examples": examples, "validation_files": None, "input_length": 8, "target_length": 4}
        sections["finetune"] = {
            "data": {**data, "task": "task", "batch_size": 2},
            "training": {"max_steps": 2, "execution": {"micro_batch_size": None, "accelerator": "cpu"}},
            "validation": {"times": 1, "examples": 4},
        }
    if (evaluate := arm.experiment.evaluate) is not None:
        tasks = {"names": ["glosses"], "folder": str(instructions / "glosses" / "tasks"), "limit": 1, "max_length": 64}
        small = {
            "likelihood": {"documents": 2},
            "examples": {"examples": 4},
            "extrapolation": {"sequences": 2},
            "tasks": tasks,
        }
        sections["evaluate"] = {name: few for name, few in small.items() if getattr(evaluate, name) is not None}
    node = merge(tree(arm.experiment.model_dump(mode="json")), tree(sections))
    # That an arm can be matched is for the plan of its real size to say: eight columns weigh more in a narrow one.
    return replace(arm, experiment=validate(Experiment, node), residual=0.0)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.slow], id=path.stem) for path in STUDIES],
)
def test_a_shipped_study_runs_two_steps_of_every_arm_and_is_reported(
    path: Path, store: Store, instructions: dict[str, object]
) -> None:
    study = load_study(path, OF_STUDY.get(path.stem, SMALL))
    arms = tuple(two_steps(arm, instructions) for arm in study.arms)
    # Costs are those of small arms, so that budgets say nothing of the study; nor does a block of a short sequence.
    keys, because = ("budget", "model.block"), "two steps of small arms"
    allow = (*(Allowed(key=key, because=because) for key in keys), *study.study.allow)
    one_seed = study.study.model_copy(update={"seeds": (0,), "allow": allow})
    finished = run_study(Ablation(one_seed, arms), store, observer=Observer(), max_parallel=2, report=write_report)
    assert {run.name: run.status()["state"] for run in finished.runs} == {
        f"{arm.name}/seed 0": "done" for arm in study.arms
    }
    assert all(row.mean is not None for row in finished.comparison.rows)
    page = ReadPage(finished.folder / "report.html")
    assert study.study.question in page.texts["p"]
    assert not page.texts["p"][1].startswith(("Not answered", "So far"))
    assert len(page.tables[0].rows) == len(study.arms)
    assert len(page.images) == len([*(finished.folder / "figures").glob("*.svg")]) >= 1  # those that tell something
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml;base64,") for image in page.images)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_fair_or_says_why_it_may_differ(path: Path) -> None:
    """At its real size, text and instructions aside, which a user has; each reason is of a difference that there is."""
    study = load_study(path)
    findings = audit(study, built=False)
    assert [finding for finding in findings if finding.kind == "refused"] == []
    assert list(unused_rules(study, findings)) == []


def test_every_study_has_a_sibling_of_the_papers_size() -> None:
    # Mixers and recall are as small in their papers, the width of an expert belongs to a size, and the paper's presets
    # have Adafactor, which has no rule by width.
    studies = {path.stem for path in STUDIES} - {"quickstart", "recall", "parametrization", "experts"}
    small = {name for name in studies if not name.endswith("-paper")}
    assert small == {
        "adaptation", "attribution", "biattn", "biattn_prefix", "cross_positions", "double_decoder",
        "encoder_objectives", "extrapolation", "finetune_reversal", "gated_attention", "kv_sharing", "layer_split",
        "modifications", "objectives", "pareto", "scaling", "stability", "tying",
    }  # fmt: skip
    assert studies - small == {f"{name}-paper" for name in small}


@pytest.mark.parametrize("path", SIBLINGS, ids=lambda path: path.stem)
def test_a_sibling_differs_in_preset_and_budget_alone(path: Path) -> None:
    """The preset brings shapes and budget; beside it stand only numbers of layers, what is shorter than a preset's
    budget in a source, and levels of the same factors."""
    own = dict(read_file(path).plain())
    name = path.stem.removesuffix("-paper")
    assert (own.pop("study"), own.pop("extends_study")) == (f"{name}-paper", f"{name}.yaml")
    parent = load_study(path.with_name(f"{name}.yaml")).study
    base = own.pop("base")
    measured, same = base.pop("evaluate", {}), dict(parent.base.get("evaluate", {}))
    measured.pop("tasks", None), same.pop("tasks", None)  # the paper's for the one, a dictionary's for the other
    assert measured == same
    extra = base.pop("model", {})  # room for sentinels and mode tokens
    assert extra.keys() == {key for key in parent.base.get("model", {}) if key == "vocabulary"}
    assert base in ({}, {"pretrain": {"objective": parent.base["pretrain"].get("objective")}})
    factors = own.pop("grid", {"factors": {}})["factors"]
    assert not parent.grid or factors.keys() <= parent.grid.factors.keys()
    keys = {key for arm in own.pop("arms", {}).values() for key, _ in leaves(arm)}
    source = (
        "extends",
        "model.decoder.layers",
        "pretrain.training.max_steps",
        "pretrain.training.schedule.warmup_steps",
    )
    allowed = {"extends", "model.encoder.layers", "model.decoder.layers", *(f"adapt.from.{key}" for key in source)}
    assert keys <= allowed
    assert own.keys() <= {"extends", "allow"}
    assert {arm.baseline for arm in load_study(path).arms}
