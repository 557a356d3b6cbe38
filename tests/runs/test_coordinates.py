"""The coordinate check: which activations depend on width and depth under which parametrization."""

import json
from fractions import Fraction

import pytest
import torch

from lit_llm.components.experts.resolved import ResolvedExperts
from lit_llm.components.loss.module import LossWeights
from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.resolve import resolve_model
from lit_llm.report.tables.coordinates import conclusion, coordinate_tables
from lit_llm.runs.coordinates import (
    Coordinate,
    ZipfBatches,
    _activations,
    _train,
    at_depth,
    at_width,
    measure_coordinates,
)
from lit_llm.statistics.coordinate_slopes import PartSlopes, Slope, part_slopes
from lit_llm.training.balance import ExpertBalance
from tests.commands import lit_llm
from tests.training.test_step import stepped, uneven_batch

SMALL = ["model.d_model=32", "model.feed_forward.d_ff=64", "model.attention.heads=2"]
SMALL += ["pretrain.data.sequence_length=32", "pretrain.data.batch_size=8"]
KINDS = {
    "standard": [],
    "mup": ["model.parametrization={kind: mup, base_width: 32, base_head_dim: 16}"],
    "completep": ["model.parametrization={kind: completep, base_width: 32, base_depth: 2, base_head_dim: 16}"],
}


def small(preset, kind="standard", *overrides):
    return load_experiment(preset, [*SMALL, *KINDS[kind], *overrides])


def verdicts(sized, steps=3, seeds=(0, 1)):
    return {one.part: one.verdict for one in part_slopes(measure_coordinates(sized, steps, seeds))}


def test_all_widths_follow_d_model_and_heads_or_their_size_too():
    experiment = small("redllm-tiny", "standard", "model.encoder.d_model=48", "model.tie_embeddings=none")
    for grow, heads, head_dim in (("heads", 4, 16), ("head_dim", 2, 32)):
        model = resolve_model(at_width(experiment, 64, grow).experiment.model)
        attention, network = model.decoder[0].self_attention, model.encoder[0].feed_forward
        assert (model.d_model, model.width("encoder"), network.d_ff) == (64, 96, 128)
        assert (attention.heads, attention.head_dim) == (heads, head_dim)
    deeper = at_depth(experiment, Fraction(3, 2))
    assert (deeper.size, len(resolve_model(deeper.experiment.model).encoder)) == (6, 3)
    with pytest.raises(InputError, match="heads 2 times 3/4 is 1.5"):
        at_width(experiment, 24)


def test_slopes_are_those_of_planted_powers():
    measured = [
        Coordinate("width", size, seed, step, "part", size**0.5 * (1 + step) * (1 + 0.01 * seed), size**-1.0)
        for size in (32, 64, 256)
        for seed in (0, 1)
        for step in (0, 1)
    ]
    (slopes,) = part_slopes(measured)
    assert slopes.first.value == pytest.approx(0.5)
    assert slopes.last.value == pytest.approx(0.5)
    assert slopes.change.value == pytest.approx(-1)
    assert 0 < slopes.last.half < 0.05
    assert slopes.verdict == "grows"


def test_activations_of_tied_stacks_are_those_of_an_encoder_with_copies_of_the_decoders_parameters():
    tied, untied = (
        build_model(small("redllm-tiny", "standard", *more).model) for more in (["model.tie_layers=true"], [])
    )
    state = tied.state_dict()
    untied.load_state_dict(
        {name: state[name.replace("encoder.layers", "decoder.layers")] for name in untied.state_dict()}
    )
    probe = ZipfBatches(small("redllm-tiny"), "pretrain")[0]
    found, wanted = (_activations(model, probe, {}) for model in (tied, untied))
    assert [*found] == [*wanted]
    for part, tensors in wanted.items():
        assert len(found[part]) == len(tensors)
        assert all(torch.equal(*pair) for pair in zip(found[part], tensors, strict=True)), part


def test_a_step_of_the_check_has_the_gradient_of_a_step_of_training():
    """With every term of its objective: z-loss, the losses of further tokens and the balance of experts."""
    batch = uneven_batch("decoder")
    keys = ["model.output.future_tokens=1", "model.decoder.experts={count: 4, balance_weight: 3.0}"]
    lit, wanted = stepped("decllm", batch, *keys, z_loss=0.5)
    model, found = build_model(lit.model.config), {}
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.register_step_pre_hook(
        lambda *_: found.update({name: value.grad.clone() for name, value in model.named_parameters()})
    )
    _train(model, batch, optimizer, ExpertBalance(model), LossWeights(squares=0.5))
    assert [*found] == [*wanted]
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_the_z_loss_of_the_configuration_is_in_the_check():
    sized = [at_width(small("decllm-tiny", "standard", f"pretrain.training.z_loss={z}"), 32) for z in (0, 1)]
    without, with_it = ([one for one in measure_coordinates([each], 1, [0]) if one.step] for each in sized)
    assert without != with_it


MERGED = "model.decoder.cross_attention_mode=merged"
TWO_LAYERS = "model.decoder.layers=2"
MODELS = {
    "decoder": ("decllm-tiny",),
    "encoder_decoder": ("redllm-tiny",),
    "merged": ("redllm-tiny", MERGED, "model.encoder.layers=1", "model.decoder.layers=1"),
    "merged double decoder": ("doubledecoder-tiny", MERGED, "model.block=8"),
    "muon": ("decllm-tiny", TWO_LAYERS, "pretrain.training.optimizer=muon"),
    "experts": ("decllm-tiny", TWO_LAYERS, "model.decoder.experts={count: 4, balance_weight: 3.0}"),
    "convolutions, further tokens": (
        "decllm-tiny",
        TWO_LAYERS,
        "model.attention.convolution=[input, qkv]",
        "model.feed_forward.convolution=[input, hidden]",
        "model.output.future_tokens=2",
    ),
    "retention": ("decllm-tiny", TWO_LAYERS, "model.decoder.retention=gated"),
    "gla": ("decllm-tiny", TWO_LAYERS, "model.decoder.gla=gated"),
    "mamba2": ("decllm-tiny", TWO_LAYERS, "model.decoder.mamba2={head_dim: 16, groups: 2, chunk: 16}"),
    "gated_deltanet": ("decllm-tiny", TWO_LAYERS, "model.decoder.gated_deltanet={chunk: 16}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_changes_grow_with_the_width_under_standard_and_not_under_mup(case):
    preset, *overrides = MODELS[case]
    standard, mup = (
        verdicts([at_width(small(preset, kind, *overrides), n) for n in (32, 64, 128, 256)])
        for kind in ("standard", "mup")
    )
    assert standard["decoder residual stream"] == "grows"
    assert "grows" not in mup.values()
    assert (mup["decoder residual stream"], mup["logits"]) == ("", "")
    assert not any(mup[part] for part in mup if part.endswith("router update"))


ROUTER = "decoder experts router"


@pytest.mark.slow
def test_a_router_that_begins_at_too_much_grows_and_one_that_learns_too_slowly_vanishes(monkeypatch):
    preset, *overrides = MODELS["experts"]

    def found(more=lambda n: []):
        return verdicts([at_width(small(preset, "mup", *overrides, *more(n)), n) for n in (32, 64, 128, 256)])

    slow = found(lambda n: [f"pretrain.training.optimizer.lr_groups={{experts: {32 / n}}}"])
    assert slow[f"{ROUTER} update"] == "vanishes"
    # As any hidden matrix: N(0, 1 / m) in place of 1 / m^2.
    monkeypatch.setattr(ResolvedExperts, "matrix_kind", lambda self, name: "hidden")
    assert found()[ROUTER] == "grows"


def test_a_routers_update_may_fall_as_a_sum_over_random_inputs_and_no_faster():
    falling = {slope: PartSlopes("width", f"{ROUTER} update", None, None, Slope(slope, 0.1)) for slope in (-0.7, -0.8)}
    assert [one.verdict for one in falling.values()] == ["", "vanishes"]
    assert PartSlopes("width", ROUTER, None, None, Slope(-0.8, 0.1)).verdict == ""
    assert PartSlopes("width", ROUTER, None, None, Slope(0.3, 0.1)).verdict == "grows"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_the_residual_stream_grows_with_the_depth_under_mup_and_not_under_completep(preset):
    mup, completep = (
        verdicts([at_depth(small(preset, kind, "model.decoder.layers=2"), Fraction(n)) for n in (1, 2, 4)])
        for kind in ("mup", "completep")
    )
    assert (mup["decoder residual stream"], completep["decoder residual stream"]) == ("grows", "")


def test_the_command_prints_json_and_draws_a_figure(tmp_path):
    options = [word for each in (*SMALL, "model.decoder.layers=1") for word in ("-o", each)]
    line = ["coordinates", "decllm-tiny", *options]
    sizes = ["--widths", "32,64", "--seeds", "1", "--steps", "1", "--figure", tmp_path / "check"]
    printed = lit_llm(*line, *sizes, "--json")
    assert printed.returncode == 0, printed.stderr
    assert "decllm-tiny: training 2 of 2: width 64, seed 0" in printed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["check.png", "check.svg"]
    (content,) = json.loads(printed.stdout)["arms"]
    parts = {one["part"] for one in content["coordinates"]}
    assert parts == {one["part"] for one in content["parts"]} >= {"embedding", "decoder feed_forward", "logits"}
    assert {(one["size"], one["step"]) for one in content["coordinates"]} == {(32, 0), (32, 1), (64, 0), (64, 1)}


def test_the_command_checks_every_arm_of_a_study(tmp_path):
    values = "d_model: 32, feed_forward: {d_ff: 64}, attention: {heads: 2}"
    mup = "{model: {parametrization: {kind: mup, base_width: 32, base_head_dim: 16}}}"
    study = tmp_path / "arms.yaml"
    study.write_text(
        "study: arms\nquestion: Which grows?\nextends: decllm-tiny\n"
        f"base: {{model: {{{values}, decoder: {{layers: 1}}}}, "
        "pretrain: {data: {sequence_length: 32, batch_size: 8}}}\n"
        f"arms: {{standard: {{}}, mup: {mup}}}\nseeds: [0]\n"
    )
    sizes = ["--widths", "32,64", "--seeds", "1", "--steps", "1"]
    printed = lit_llm("coordinates", study, *sizes, "--figure", tmp_path / "check", "--json")
    assert printed.returncode == 0, printed.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["check-mup.png", "check-standard.png"]
    arms = {one["arm"]: one["coordinates"] for one in json.loads(printed.stdout)["arms"]}
    assert [*arms] == ["standard", "mup"]
    of_size = {size: [[one for one in ones if one["size"] == size] for ones in arms.values()] for size in (32, 64)}
    assert of_size[32][0] == of_size[32][1]  # the base model's width
    assert of_size[64][0] != of_size[64][1]


@pytest.mark.parametrize(
    ("wrong", "message"), [("32", "two different sizes"), ("a,b", "no list of numbers"), ("64,65", "no whole number")]
)
def test_widths_that_make_no_slope_or_no_model_are_refused(wrong, message):
    refused = lit_llm("coordinates", "decllm-tiny", "--widths", wrong)
    assert (refused.returncode, message in refused.stderr) == (2, True)


def test_the_table_has_a_row_for_each_part_and_its_sentence_names_what_breaks():
    growing, flat = Slope(0.6, 0.1), Slope(0.1, 0.2)
    slopes = [PartSlopes("width", "logits", None, growing, flat), PartSlopes("width", "scores", flat, flat, flat)]
    (table,) = coordinate_tables(slopes, 4, "dec")
    assert [row[-1] for row in table.rows] == ["breaks: grows", ""]
    assert table.rows[0][1:3] == ["–", "+0.60 ± 0.10"]
    assert conclusion(slopes) == "1 of 2 break: logits grows with width."
