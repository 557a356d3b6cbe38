"""A feed-forward network, an added part and a mixer of another package: resolved, built and refused as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

CONFIG = '''
from typing import Any, ClassVar, Literal
from lit_llm.components.part import Defaults, LayerComponent, Part, TensorShape, Widths
from lit_llm.config.section import Section
from tests.outside.new_parts import LowRankFeedForward, MovingAverage


class LowRankOverride(Section):
    """A low-rank network."""

    kind: Literal["half", "quarter"] = "half"


class AverageOverride(Section):
    """A moving average."""

    kind: Literal["plain"] = "plain"


class SmoothOverride(Section):
    """Each token with half of the one before it."""

    kind: Literal["fixed"] = "fixed"


class Smooth(Part):
    """y_t = x_t + x_{t-1} / 2, by fixed taps."""

    module: ClassVar[str] = "other_roles.module:SmoothModule"
    taps: int = 2

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        return {}


def low_rank(values: dict[str, Any], defaults: Defaults) -> Part:
    share = {"half": 2, "quarter": 4}[values["kind"]]
    return LowRankFeedForward(d_ff=defaults.feed_forward["d_ff"], rank=defaults.width // share)


STACKS = ("encoder", "decoder", "target_decoder")
LOW_RANK = LayerComponent("low_rank", LowRankOverride, low_rank, STACKS, "feed_forward", "A low-rank network.")
SMOOTH = LayerComponent("smooth", SmoothOverride, lambda values, defaults: Smooth(), STACKS, "added", "Smoothing.")
AVERAGE = LayerComponent(
    "average", AverageOverride, lambda values, defaults: MovingAverage(channels=8), STACKS, "mixer", "An average."
)
'''
MODULE = """
import torch
from lit_llm.components.layer_part import LayerPart


class SmoothModule(LayerPart):
    def __init__(self, config, widths, causal):
        super().__init__(config, widths, causal)
        self.register_buffer("fade", 0.5 ** torch.arange(config.taps))

    def forward(self, x_BTD, inputs):
        before_BTD = torch.nn.functional.pad(x_BTD[:, :-1], (0, 0, 1, 0))
        return self.fade[0] * x_BTD + self.fade[1] * before_BTD
"""
CHECKS = """
import pytest, torch
from pydantic import ValidationError
from tests.tiny_models import build, config, ids, resolved

layer = resolved("decllm", "decoder.low_rank=half", "decoder.smooth=fixed").decoder[0]
assert [name for name, _ in layer.parts] == ["self_attention", "smooth", "low_rank"]
for kind, rank in (("half", 16), ("quarter", 8)):
    assert resolved("decllm", f"decoder.low_rank={kind}").decoder[0].part("low_rank").rank == rank

model = build("decllm", "decoder.smooth=fixed")
assert model.decoder.layers[0].smooth.fade.tolist() == [1.0, 0.5]
tokens = ids(2, 6)
assert model(tokens).isfinite().all()

for family, overrides, problem in (
    ("redllm", ["decoder.average=plain", "decoder.cross_attention_mode=merged"], "would read no source"),
    ("decllm", ["decoder.average=plain", "decoder.retention=gated"], "both stand in place of self-attention"),
    ("decllm", ["decoder.low_rank=thrid"], "is not possible"),
):
    with pytest.raises(Exception, match=problem):
        config(family, *overrides)
with pytest.raises(ValueError, match="a moving average is causal"):
    build("decllm", "decoder.average=plain")(tokens, prefix_length=3)

from lit_llm.components.registry import PACKAGES, modules_of_parts
from lit_llm.runs.worker import preloaded
assert PACKAGES == {key: "other_roles" for key in ("low_rank", "smooth", "average")}
assert "other_roles.module" in modules_of_parts() and "other_roles.module" in preloaded()

from lit_llm.experiment.load import load_experiment
from lit_llm.runs.provenance import OUTSIDE_CODE, provenance
used = load_experiment("decllm-tiny", ["model.decoder.low_rank=half"])
assert provenance(used)["components"] == OUTSIDE_CODE and set(OUTSIDE_CODE) == {"other_roles"}
assert provenance(load_experiment("decllm-tiny"))["components"] is None
"""
STUDY = """
study: roles
question: Does a low rank do?
extends: decllm-tiny
grid:
  factors:
    model.decoder.low_rank: [half, quarter]
    model.feed_forward.d_ff: [64, 128]
seeds: [0]
allow: [{key: budget, because: ranks are the question}]
"""


def test_they_are_resolved_built_and_refused_as_written(tmp_path: Path) -> None:
    package = tmp_path / "other_roles"
    package.mkdir()
    for name, text in (("__init__.py", ""), ("config.py", CONFIG), ("module.py", MODULE)):
        (package / name).write_text(text)
    about = tmp_path / "other_roles-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other-roles\nVersion: 1\n")
    names = "".join(f"{name} = other_roles.config:{name.upper()}\n" for name in ("smooth", "low_rank", "average"))
    (about / "entry_points.txt").write_text(f"[lit_llm.components]\n{names}")
    (tmp_path / "roles.yaml").write_text(STUDY)
    paths = os.pathsep.join(map(str, (tmp_path, HERE, HERE.parent, ROOT)))
    plan = "import sys; from lit_llm.cli import main; sys.argv = ['lit-llm', 'plan', 'roles.yaml']; main()"
    for code in (CHECKS, plan):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "≠" not in done.stdout, "that a factor changes what a component takes as its default is no confound"
    assert "no-op" not in done.stdout
