"""Attention analysis, judged by a plain forward pass that writes every attention map out, and by its full Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from lit_llm.components.attention import dot_product
from lit_llm.config.problems import InputError
from lit_llm.data.config import DataConfig
from lit_llm.data.prepare import Prepared, PreparedSource
from lit_llm.evaluation import attention_weights
from lit_llm.evaluation.attention import attention_analysis, held_out_windows
from lit_llm.evaluation.config import AttentionAnalysisConfig
from lit_llm.evaluation.curves import log_slope
from lit_llm.evaluation.source_sensitivity import attention_sensitivity, end_to_end_sensitivity
from lit_llm.models.build import build_model
from lit_llm.models.config import DecoderModel, EncoderDecoderModel
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import MasksConfig, PrefixLM

torch.set_num_threads(1)

VOCABULARY, LENGTH, SOURCE, WINDOWS = 31, 24, 11, 5
TARGETS = LENGTH - SOURCE
SHARED = {"d_model": 16, "vocabulary": VOCABULARY, "feed_forward": {"d_ff": 24}}
HEADS = {"heads": 4, "kv_heads": 2, "qkv_norm": ["q"]}
CASES = [
    ("decoder", MasksConfig()),
    ("decoder", MasksConfig(prefix="bidirectional")),
    ("decoder", MasksConfig(intra_document=True)),
    ("encoder_decoder", MasksConfig()),
    ("encoder_decoder", MasksConfig(intra_document=True)),
]
NAMES = ["decoder", "decoder-prefix", "decoder-documents", "encoder_decoder", "encoder_decoder-documents"]
CLOSE = {"rtol": 1e-5, "atol": 1e-8}
"""Angles are of float32 here and there, and rounded in another order."""
both = pytest.mark.parametrize(("family", "masks"), CASES, ids=NAMES)


def built(family):
    """Two layers, in float64; keys twice as large as usual, so that attention is not nearly uniform."""
    if family == "decoder":
        config = DecoderModel.model_validate({**SHARED, "attention": HEADS, "decoder": {"layers": 2}})
    else:
        stacks = {"encoder": {"layers": 2}, "decoder": {"layers": 2}}
        config = EncoderDecoderModel.model_validate({**SHARED, "attention": {**HEADS, "output_norm": "head"}, **stacks})
    model = build_model(config, seed=3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(2.0 if ".k." in name else 1.0)
    return model


@pytest.fixture
def data(tmp_path):
    """Tokens with ends of documents (0) among them, one of them just before the last token of a source."""
    tokens = np.random.default_rng(1).integers(2, VOCABULARY, WINDOWS * LENGTH).astype(np.uint16)
    tokens[::15] = 0
    return prepared(tmp_path, {"": (1, tokens)})


def prepared(folder, sources, length=LENGTH):
    config = DataConfig.model_validate({"sequence_length": length, "batch_size": 2, "tokenizer": "bytes"})
    found = []
    for number, (name, (share, tokens)) in enumerate(sources.items()):
        (folder / str(number)).mkdir()
        for split in ("train", "validation"):
            tokens.tofile(folder / str(number) / f"00000.{split}.bin")
        found.append(
            PreparedSource(
                name, share, folder / str(number), {"train": (len(tokens),), "validation": (len(tokens),), "test": ()}
            )
        )
    return Prepared(config, "digest", folder, tuple(found))


def settings(**more):
    return AttentionAnalysisConfig.model_validate(
        {"sequences": WINDOWS, "source_share": SOURCE / LENGTH, "buckets": 100, "steps": [1, 4, 9], **more}
    )


def windows_of(data):
    source = data.sources[0]
    tokens = np.fromfile(source.folder / "00000.validation.bin", dtype=np.uint16)
    return torch.from_numpy(tokens.astype(np.int64)).view(-1, LENGTH)


# --- the same model, written out ------------------------------------------------------------------------------------


class Plain:
    """A forward pass in which nothing is fused: every map, and what each attention adds, is kept by layer."""

    def __init__(self, model, family, masks, windows_BT):
        self.model, self.family = model, family
        start = torch.ones(len(windows_BT), 1, dtype=torch.long)
        self.window = torch.cat([start, windows_BT[:, :-1]], 1)
        ends = (windows_BT == 0).long()
        number = ends.cumsum(1) - ends
        of_window, of_shifted = number, torch.cat([torch.zeros_like(start), number[:, :-1]], 1)
        if not masks.intra_document:
            of_window, of_shifted = torch.zeros_like(number), torch.zeros_like(number)
        if family == "decoder":
            self.tokens = self.window
            self.own = of_shifted[:, :, None] == of_shifted[:, None, :]
            at = torch.arange(LENGTH)
            causal = at[None, :] <= at[:, None]
            if masks.prefix == "bidirectional":
                causal = causal | ((at[:, None] <= SOURCE) & (at[None, :] <= SOURCE))
            self.own = self.own & causal
        else:
            self.source, self.tokens = windows_BT[:, :SOURCE], self.window[:, SOURCE:].clone()
            self.tokens[:, 0] = 1
            of_source, of_target = of_window[:, :SOURCE], of_shifted[:, SOURCE:]
            at = torch.arange(TARGETS)
            self.own = (of_target[:, :, None] == of_target[:, None, :]) & (at[None, :] <= at[:, None])
            self.crossed = of_target[:, :, None] == of_source[:, None, :]
            self.encoded = of_source[:, :, None] == of_source[:, None, :]

    def __call__(self, source_states=None):
        """Run from the embedded source (its own when absent) to log-probabilities: B x T x V."""
        self.maps = {"self": [], "cross": [], "encoder": []}
        self.outputs, self.inputs = {"self": [], "cross": []}, []
        embed = self.model.embedding.weight
        if self.family == "decoder":
            x = embed[self.tokens]
            if source_states is not None:
                x = torch.cat([x[:, :1], source_states, x[:, SOURCE + 1 :]], 1)
            for block in self.model.decoder.layers:
                self.inputs.append(x)
                x = x + self.own_attention(block, x)
                x = x + block.feed_forward(block.feed_forward_norm(x))
        else:
            s = embed[self.source] if source_states is None else source_states
            at, then = torch.arange(SOURCE), torch.arange(TARGETS)
            for block in self.model.encoder.layers:
                n = block.self_attention_norm(s)
                out, weights = attend(block.self_attention, n, n, self.encoded, at, at)
                self.maps["encoder"].append(weights)
                s = s + out
                s = s + block.feed_forward(block.feed_forward_norm(s))
            self.memory = self.model.encoder.norm(s)
            x = embed[self.tokens]
            for block in self.model.decoder.layers:
                n = block.self_attention_norm(x)
                out, weights = attend(block.self_attention, n, n, self.own, then, then)
                x = x + self.keep("self", out, weights)
                self.inputs.append(x)
                x = x + self.cross_attention(block, x, self.memory)
                x = x + block.feed_forward(block.feed_forward_norm(x))
        return (self.model.decoder.norm(x) @ embed.T).log_softmax(-1)

    def own_attention(self, block, x):
        """Of a decoder-only layer."""
        n, at = block.self_attention_norm(x), torch.arange(LENGTH)
        return self.keep("self", *attend(block.self_attention, n, n, self.own, at, at))

    def cross_attention(self, block, x, memory):
        positions = torch.arange(SOURCE, LENGTH), torch.arange(SOURCE)
        n = block.cross_attention_norm(x)
        return self.keep("cross", *attend(block.cross_attention, n, memory, self.crossed, *positions))

    def keep(self, name, out, weights):
        self.maps[name].append(weights.detach())
        self.outputs[name].append(out.detach())
        return out

    def at_source(self):
        """For each layer, B x H x targets x source: what lies on the source, and that divided by its sum."""
        maps = self.maps["cross"] or [m[:, :, SOURCE:, 1 : SOURCE + 1] for m in self.maps["self"]]
        return maps, [m / m.sum(-1, keepdim=True) for m in maps]

    def seen_source(self):
        """B x targets x source."""
        return self.crossed if self.family == "encoder_decoder" else self.own[:, SOURCE:, 1 : SOURCE + 1]


def attend(attention, x, memory, seen, query_positions, key_positions):
    """(output, softmax(QKᵀ/√K)) with rotations as complex numbers; a query that sees nothing has zero weights."""
    config = attention.config

    def heads(matrix, y):
        return (y @ matrix.weight.T).view(*y.shape[:2], -1, config.head_dim).transpose(1, 2)

    def turned(y, positions):
        half = config.head_dim // 2
        angles = positions[:, None].float() * config.rope_theta ** (-torch.arange(half) / half)
        z = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], -1)

    def unit(y):
        return y / (y.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    q, k, v = heads(attention.q, x), heads(attention.k, memory), heads(attention.v, memory)
    q, k = turned(unit(q), query_positions), turned(k, key_positions)
    k, v = (y.repeat_interleave(config.heads // config.kv_heads, 1) for y in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(config.head_dim)).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = weights @ v
    out = unit(out) if config.output_norm == "head" else out
    return out.transpose(1, 2).flatten(2) @ attention.out.weight.T, weights


def curve(found, measure, layer=None, axis="step"):
    """{place: value} of the records; every place is a bucket of its own."""
    rows = [row for row in found.rows if (row["measure"], row["layer"], row["axis"]) == (measure, layer, axis)]
    assert all(row["first"] == row["last"] for row in rows)
    return {row["first"]: row["value"] for row in rows}


def averaged(values, counted=None):
    """{step: mean}, of arrays (rows x ... x steps) of several layers, over what counts: the loop over each of them."""
    found = {}
    for step in range(values[0].shape[-1]):
        kept = [
            float(layer[row, ..., step].mean())
            for layer in values
            for row in range(len(layer))
            if counted is None or counted[row, step]
        ]
        if kept:
            found[step + 1] = float(np.mean(kept))
    return found


def run(data, family, masks, batch_tokens=10_000, **more):
    return attention_analysis(built(family), settings(**more), data, masks, batch_tokens=batch_tokens)


def written_out(data, family, masks):
    plain = Plain(built(family), family, masks, windows_of(data))
    with torch.no_grad():
        vars(plain)["log_probability"] = plain()
    return plain


# --- what holds -----------------------------------------------------------------------------------------------------


@both
def test_target_log_probabilities_are_those_of_the_written_out_model(data, family, masks):
    """By step and by position; and so the maps below are those of the same function."""
    found, plain = run(data, family, masks), written_out(data, family, masks)
    chosen = plain.log_probability[:, -TARGETS:].gather(-1, windows_of(data)[:, SOURCE:, None]).squeeze(-1)
    assert curve(found, "target_log_probability") == pytest.approx(averaged([chosen]))
    first = SOURCE if family == "decoder" else 0
    by_position = {first + step - 1: value for step, value in averaged([chosen]).items()}
    assert curve(found, "target_log_probability", axis="position") == pytest.approx(by_position)
    assert found.metrics["attention/target_log_probability"] == pytest.approx(float(chosen.mean()))


@both
@pytest.mark.parametrize("window", [1, 5])
def test_local_probability_is_the_weight_on_the_last_keys(data, family, masks, window):
    found, plain = run(data, family, masks, window=window), written_out(data, family, masks)
    parts = [("local_probability", plain.maps["self"]), ("encoder_local_probability", plain.maps["encoder"])]
    for measure, maps in parts:
        by_layer = [
            torch.stack([m[:, :, t, max(0, t - window + 1) : t + 1].sum(-1) for t in range(m.shape[2])], -1)
            for m in maps
        ]
        for layer, values in enumerate(by_layer):
            expected = {step - 1: value for step, value in averaged([values]).items()}
            assert curve(found, measure, layer, "position") == pytest.approx(expected)
        if maps:
            expected = {step - 1: value for step, value in averaged(by_layer).items()}
            assert curve(found, measure, axis="position") == pytest.approx(expected)


@both
def test_first_key_probability_is_the_weight_on_a_rows_first_key_where_others_can_be_seen(data, family, masks):
    found, plain = run(data, family, masks), written_out(data, family, masks)
    for stack, maps in ("", plain.maps["self"]), ("encoder_", plain.maps["encoder"]):
        by_layer = [m[:, :, 1:, 0] for m in maps]
        for layer, values in [*enumerate([values] for values in by_layer), (None, by_layer)] if maps else []:
            assert curve(found, f"{stack}first_key_probability", layer, "position") == pytest.approx(averaged(values))
        if maps:
            mean = float(torch.stack(by_layer).mean())
            assert found.metrics[f"attention/{stack}first_key_probability"] == pytest.approx(mean)


def entropies(p, seen):
    """Over the logarithm of how many there are, of one row of weights."""
    p = p[seen]
    return 1.0 if len(p) == 1 else float(-(p * p.log()).sum() / math.log(len(p)))


@both
def test_how_attention_lies_within_the_source(data, family, masks):
    """Entropy, the largest weights, and what one row has in common with the one before, element by element."""
    found, plain = run(data, family, masks), written_out(data, family, masks)
    seen = plain.seen_source()
    sees = seen.any(-1)
    expected = {name: [] for name in ("entropy", "top_mass", "top_percent_mass", "overlap", "cosine")}
    for p in plain.at_source()[1]:
        values = {name: np.full(p.shape[:3], np.nan) for name in expected}
        for b, h, i in np.ndindex(*p.shape[:3]):
            if not sees[b, i]:
                continue
            row = p[b, h, i]
            values["entropy"][b, h, i] = entropies(row, seen[b, i])
            values["top_mass"][b, h, i] = row.sort(descending=True).values[:5].sum()
            values["top_percent_mass"][b, h, i] = row.max()  # 1% of 11 tokens is one token
            if i and sees[b, i - 1]:
                before = p[b, h, i - 1]
                sets = [{int(j) for j in r.argsort(descending=True)[:5] if r[j] > 0} for r in (row, before)]
                values["overlap"][b, h, i] = len(sets[0] & sets[1]) / max(map(len, sets))
                values["cosine"][b, h, i] = row @ before / (row.norm() * before.norm())
        for name, value in values.items():
            expected[name].append(value)
    follows = sees & torch.nn.functional.pad(sees[:, :-1], (1, 0))
    for name, by_layer in expected.items():
        counted = follows if name in ("overlap", "cosine") else sees
        assert curve(found, f"source_{name}") == pytest.approx(averaged(by_layer, counted)), name
        assert curve(found, f"source_{name}", layer=1) == pytest.approx(averaged(by_layer[1:], counted)), name


@both
def test_stripes_are_the_mean_cosine_of_all_pairs_of_steps(data, family, masks):
    found, plain = run(data, family, masks), written_out(data, family, masks)
    sees, values = plain.seen_source().any(-1), []
    for p in plain.at_source()[1]:
        for b in range(WINDOWS):
            rows = [i for i in range(TARGETS) if sees[b, i]]
            pairs = [
                float(p[b, h, i] @ p[b, h, j] / (p[b, h, i].norm() * p[b, h, j].norm()))
                for h in range(4)
                for i in rows
                for j in rows
                if i != j
            ]
            values += [np.mean(pairs)] if pairs else []
    assert found.metrics["attention/source_stripes"] == pytest.approx(np.mean(values))


@pytest.mark.parametrize("masks", [masks for family, masks in CASES if family == "decoder"], ids=NAMES[:3])
def test_source_mass_is_the_weight_on_source_tokens_beside_that_of_equal_weights(data, masks):
    """Where documents are joined, equal weights give S / (S + i) at step i: <s> is no source token."""
    found, plain = run(data, "decoder", masks), written_out(data, "decoder", masks)
    mass = averaged([m.sum(-1) for m in plain.at_source()[0]])
    visible = plain.own[:, SOURCE:].double()
    null = averaged([visible[:, :, 1 : SOURCE + 1].sum(-1) / visible.sum(-1)])
    if not masks.intra_document:
        assert null == pytest.approx({i: SOURCE / (SOURCE + i) for i in range(1, TARGETS + 1)})
    assert curve(found, "source_mass") == pytest.approx(mass)
    assert curve(found, "source_mass_null") == pytest.approx(null)
    ratio = np.array([mass[i] / null[i] for i in mass if null[i] > 0])
    assert found.metrics["attention/source_mass_over_null"] == pytest.approx(ratio.mean())
    assert "attention/source_norm_share" not in found.metrics


@pytest.mark.parametrize("masks", [masks for family, masks in CASES if family != "decoder"], ids=NAMES[3:])
def test_norm_share_is_that_of_what_cross_attention_adds(data, masks):
    found, plain = run(data, "encoder_decoder", masks), written_out(data, "encoder_decoder", masks)
    shares = []
    for own, cross in zip(plain.outputs["self"], plain.outputs["cross"], strict=True):
        shares.append(cross.norm(dim=-1) / (cross.norm(dim=-1) + own.norm(dim=-1)))
    assert curve(found, "source_norm_share") == pytest.approx(averaged(shares))
    assert "attention/source_mass" not in found.metrics


@both
def test_the_sources_gain_is_what_another_windows_source_takes_away(data, family, masks):
    """Every window is read once more with the source of the one before it."""
    found, own = run(data, family, masks), windows_of(data)
    other = torch.cat([own.roll(1, 0)[:, :SOURCE], own[:, SOURCE:]], 1)
    with torch.no_grad():
        given = [
            Plain(built(family), family, masks, windows)()[:, -TARGETS:].gather(-1, own[:, SOURCE:, None]).squeeze(-1)
            for windows in (own, other)
        ]
    gain = averaged([given[0] - given[1]])
    assert max(map(abs, gain.values())) > 0.01
    assert curve(found, "source_gain") == pytest.approx(gain, rel=1e-4, abs=1e-7)
    assert "attention/source_gain" not in run(data, family, masks, sequences=1).metrics


def laid_out(data, family, masks):
    windows = windows_of(data).numpy()
    return collate([w[:SOURCE] for w in windows], [w[SOURCE:] for w in windows], family, masks)


@both
def test_end_to_end_sensitivity_is_the_norm_of_the_written_out_models_jacobian(data, family, masks):
    model, steps = built(family), (1, 2, TARGETS)
    found = end_to_end_sensitivity(model, laid_out(data, family, masks), steps)
    windows = windows_of(data)
    plain = Plain(model, family, masks, windows)
    embedded = model.embedding.weight[windows[:, :SOURCE]].detach()
    for place, i in enumerate(steps):

        def chosen(source, i=i):
            return plain(source)[:, -TARGETS + i - 1].gather(-1, windows[:, SOURCE + i - 1, None]).squeeze(-1)

        full = jacobian(chosen, embedded)  # B x B x S x D: rows depend on themselves alone
        expected = torch.stack([full[b, b].norm() for b in range(WINDOWS)])
        torch.testing.assert_close(found[:, place], expected, **CLOSE)


@both
def test_end_to_end_sensitivity_bounds_a_small_step(data, family, masks):
    """Finite differences along the gradient's direction see its norm."""
    model, i = built(family), 3
    windows = windows_of(data)
    plain = Plain(model, family, masks, windows)
    embedded = model.embedding.weight[windows[:, :SOURCE]].detach().requires_grad_()

    def chosen(source):
        return plain(source)[:, -TARGETS + i - 1].gather(-1, windows[:, SOURCE + i - 1, None]).squeeze(-1)

    (gradient,) = torch.autograd.grad(chosen(embedded).sum(), embedded)
    sizes = gradient.flatten(1).norm(dim=1).clamp_min(1e-300)
    step = 1e-5 * gradient / sizes[:, None, None]
    with torch.no_grad():
        slope = (chosen(embedded + step) - chosen(embedded - step)) / 2e-5
    found = end_to_end_sensitivity(model, laid_out(data, family, masks), [i])
    torch.testing.assert_close(found[:, 0], slope, **CLOSE)


def test_behind_a_norm_the_size_of_what_attention_makes_says_nothing(data):
    """In a sandwich the norm after W_o undoes its scale: what is added stays, and so does what is measured of it."""
    stacks = {"encoder": {"layers": 2}, "decoder": {"layers": 2}, "norm": {"placement": "sandwich", "eps": 1e-12}}
    found = []
    for scale in (1.0, 10.0):
        config = EncoderDecoderModel.model_validate({**SHARED, "attention": HEADS, **stacks})
        model = build_model(config, seed=3).double()
        with torch.no_grad():
            for block in model.decoder.layers:
                block.cross_attention.out.weight.mul_(scale)
        found.append(attention_analysis(model, settings(), data, MasksConfig(), batch_tokens=10_000).metrics)
    for name in ("source_norm_share", "attention_sensitivity"):
        assert found[1][f"attention/{name}"] == pytest.approx(found[0][f"attention/{name}"], rel=1e-6)


@both
def test_attention_sensitivity_is_the_norm_of_each_layers_jacobian(data, family, masks):
    """With the directions √D e_1 ... √D e_D, whose mean of uuᵀ is 1, Hutchinson's estimate is exact."""
    model, steps, d_model = built(family), (1, 5), 16
    basis = (d_model**0.5 * torch.eye(d_model, dtype=torch.float64)).expand(WINDOWS, -1, -1)
    found = attention_sensitivity(model, laid_out(data, family, masks), steps, basis)
    plain = written_out(data, family, masks)
    for layer, block in enumerate(plain.model.decoder.layers):
        x = plain.inputs[layer].detach()

        def output(states, x=x, block=block):
            if family == "encoder_decoder":
                return plain.cross_attention(block, x, states)
            return plain.own_attention(block, torch.cat([x[:, :1], states, x[:, SOURCE + 1 :]], 1))[:, SOURCE:]

        states = plain.memory.detach() if family == "encoder_decoder" else x[:, 1 : SOURCE + 1]
        for place, i in enumerate(steps):
            full = jacobian(lambda s, i=i, output=output: output(s)[:, i - 1], states)  # B x D x B x S x D
            expected = torch.stack([full[b, :, b].norm() for b in range(WINDOWS)])
            torch.testing.assert_close(found[layer][:, place], expected, **CLOSE)


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_random_directions_estimate_that_norm(data, family):
    """2000 draws of 16 numbers are within 10% of the exact value; 8 are what an evaluation takes."""
    d_model = 16
    basis = (d_model**0.5 * torch.eye(d_model, dtype=torch.float64)).expand(1, -1, -1)
    one = next(laid_out(data, family, MasksConfig()).micro_batches(1))
    exact = attention_sensitivity(built(family), one, (4,), basis)
    more = {"sensitivity_sequences": 1, "draws": 2000, "steps": [4], "sequences": 1}
    found = run(data, family, MasksConfig(), **more)
    for layer in range(2):
        assert curve(found, "attention_sensitivity", layer)[4] == pytest.approx(float(exact[layer]), rel=0.1)


@both
def test_neither_the_batch_nor_the_parts_of_a_map_change_a_number(data, family, masks, monkeypatch):
    """Five windows at once and whole maps; or two at a time, one query at a time."""
    whole = run(data, family, masks)
    monkeypatch.setattr(dot_product, "SCORES", 1)
    parts = run(data, family, masks, batch_tokens=2 * LENGTH)
    assert [{**row, "value": 0} for row in whole.rows] == [{**row, "value": 0} for row in parts.rows]
    assert [row["value"] for row in parts.rows] == pytest.approx([row["value"] for row in whole.rows], rel=1e-9)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-9)


def test_no_more_scores_exist_at_a_time_than_were_asked_for(data, monkeypatch):
    """5 windows x 4 heads x 24 keys: a budget of three queries' scores."""
    monkeypatch.setattr(dot_product, "SCORES", 3 * WINDOWS * 4 * LENGTH + 1)
    sizes = []
    rows = attention_weights.attention_rows

    def watched(*inputs):
        for first, weights, seen in rows(*inputs):
            sizes.append(weights.shape[2])
            yield first, weights, seen

    monkeypatch.setattr(attention_weights, "attention_rows", watched)
    run(data, "decoder", MasksConfig(), sensitivity_sequences=0)
    assert max(sizes) == 3


def test_a_decay_is_the_exponent_of_a_power_law():
    x = np.arange(1, 50)
    assert log_slope(x, 3.0 * x**-0.7) == pytest.approx(-0.7)
    assert math.isnan(log_slope(x, np.where(x == 3, 1.0, 0.0)))


@pytest.mark.parametrize("window", [1, 5])
def test_equal_weights_have_a_locality_decay_of_minus_one(data, window):
    """Without queries all scores are zero: the last w of t + 1 keys get w / (t + 1), the source S / (S + i)."""
    model = built("decoder")
    with torch.no_grad():
        for block in model.decoder.layers:
            block.self_attention.q.weight.zero_()
    metrics = attention_analysis(model, settings(window=window), data, MasksConfig(), batch_tokens=100).metrics
    assert metrics["attention/locality_decay"] == pytest.approx(-1)
    assert metrics["attention/source_mass_over_null"] == pytest.approx(1)
    assert metrics["attention/source_mass_over_null_decay"] == pytest.approx(0, abs=1e-9)
    assert metrics["attention/source_entropy"] == pytest.approx(1)
    assert metrics["attention/source_top_mass"] == pytest.approx(5 / SOURCE)
    assert metrics["attention/source_stripes"] == pytest.approx(1)


def test_metrics_are_means_over_places_and_slopes_of_the_curves(data):
    found = run(data, "encoder_decoder", MasksConfig())
    local = curve(found, "local_probability", axis="position")
    assert found.metrics["attention/local_probability"] == pytest.approx(np.mean(list(local.values())))
    beyond = {t + 1: value for t, value in local.items() if t + 1 > 5}
    slope = np.polyfit(np.log(list(beyond)), np.log(list(beyond.values())), 1)[0]
    assert found.metrics["attention/locality_decay"] == pytest.approx(slope)
    steps = curve(found, "source_sensitivity")
    assert list(steps) == [1, 4, 9]
    slope = np.polyfit(np.log(list(steps)), np.log(list(steps.values())), 1)[0]
    assert found.metrics["attention/source_sensitivity_decay"] == pytest.approx(slope)


def test_a_bucket_holds_the_mean_of_its_places(data):
    fine, coarse = (run(data, "decoder", MasksConfig(), buckets=n, sensitivity_sequences=0) for n in (100, 4))
    single = curve(fine, "local_probability", axis="position")
    rows = [r for r in coarse.rows if r["measure"] == "local_probability" and r["layer"] is None]
    assert [(row["first"], row["last"]) for row in rows] == [(0, 5), (6, 11), (12, 17), (18, 23)]
    for row in rows:
        within = [single[t] for t in range(row["first"], row["last"] + 1)]
        assert row["value"] == pytest.approx(np.mean(within))
    assert coarse.metrics == pytest.approx(fine.metrics)


def test_a_longer_window_than_that_of_the_training_can_be_looked_at(data):
    found = run(data, "decoder", MasksConfig(), sequence_length=60, sequences=2, sensitivity_sequences=0)
    assert max(curve(found, "local_probability", axis="position")) == 59
    with pytest.raises(InputError, match="120 tokens, less than one window of 500"):
        run(data, "decoder", MasksConfig(), sequence_length=500)


def test_a_mixture_is_looked_at_in_its_shares(tmp_path):
    """Three of four windows are of the source with three quarters."""
    tokens = {name: np.full(8 * LENGTH, token, dtype=np.uint16) for name, token in (("a", 5), ("b", 9))}
    mixture = prepared(tmp_path, {"a": (750, tokens["a"]), "b": (250, tokens["b"])})
    windows = held_out_windows(mixture, settings(sequences=4))
    assert windows[:, 0].tolist() == [5, 5, 5, 9]


def test_the_model_is_left_as_it_was_found(data):
    model = built("decoder").train()
    attention_analysis(model, settings(), data, MasksConfig(), batch_tokens=100)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_windows_of_both_parts(data):
    told = []
    config = settings(sensitivity_sequences=2)
    tell = lambda done, total: told.append((done, total))  # noqa: E731
    attention_analysis(built("decoder"), config, data, MasksConfig(), batch_tokens=3 * LENGTH, progress=tell)
    assert told == [(3, 7), (5, 7), (7, 7)]


def test_without_a_choice_steps_are_powers_of_two():
    config = AttentionAnalysisConfig()
    assert config.steps_of(9) == (1, 2, 4, 8)
    assert config.steps_of(8) == (1, 2, 4, 8)
    assert AttentionAnalysisConfig(steps=(3, 5)).steps_of(9) == (3, 5)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_every_share_leaves_a_source_and_a_target(share):
    config = AttentionAnalysisConfig(source_share=share)
    assert all(PrefixLM(split=config.split(length)).problem(length) == "" for length in range(2, 40))


def test_a_step_beyond_the_target_is_refused(data):
    with pytest.raises(InputError, match=r"attention\.steps: 14 is beyond a target of 13 tokens"):
        run(data, "decoder", MasksConfig(), steps=[1, 14])


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_a_model_in_bfloat16_is_looked_at_in_float32(data, family):
    """Its own rounding is all that is left of the difference: 8 bits."""
    exact = attention_analysis(built(family), settings(), data, MasksConfig(), batch_tokens=1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention_analysis(built(family).float(), settings(), data, MasksConfig(), batch_tokens=1000)
    rough = attention_analysis(built(family).bfloat16(), settings(), data, MasksConfig(), batch_tokens=1000)
    for name in ("local_probability", "source_entropy", "source_sensitivity", "attention_sensitivity"):
        name = f"attention/{name}"
        assert mixed.metrics[name] == pytest.approx(exact.metrics[name], rel=0.1), name
        assert rough.metrics[name] == pytest.approx(exact.metrics[name], rel=0.1), name
