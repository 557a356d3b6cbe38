"""Who takes part: ours first, then the peers of the same function, then what of ours has no peer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lit_llm.bench.contestants import Contestant, Ours, Text
from lit_llm.bench.peers import LitGPT, Transformers, Weights
from lit_llm.bench.settings import Size
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel

LLAMA = ("model.attention.qkv_norm=[]", "model.norm.scale=true")
"""What makes DecLLM the function of transformers' Llama."""
T5GEMMA = (
    *LLAMA,
    "model.attention.output_norm=none",
    "model.norm.placement=sandwich",
    "model.embedding.scaled=true",
    "model.feed_forward.activation=geglu_tanh",
    "model.tie_embeddings=decoder",
    "model.decoder.cross_attention.rope=none",
)
"""What makes RedLLM the function of transformers' T5Gemma, without caps and windows."""
INSTALL = {"transformers": "pip install -e '.[bench]'", "litgpt": "pip install --no-deps litgpt"}
"""{package of a peer: command that installs it}"""
SAME = 1e-4
"""Largest difference between logits of the same function in float32, relative to the largest logit above 1."""


@dataclass(frozen=True)
class Entry:
    """A contestant before it is built."""

    name: str
    model: ResolvedModel
    build: Callable[[ResolvedModel, Weights | None], Contestant]
    package: str = ""
    """Package of a peer; '' for ours."""


def build_ours(model: ResolvedModel, weights: Weights | None = None) -> Contestant:
    """A model of ours, with initial values of its own unless weights are given."""
    built = build_model(model)
    if weights is not None:
        built.load_state_dict(weights)
    return Ours(built)


def decoders(size: Size) -> list[Entry]:
    """Entries of decoders: ours as a Llama, the Llamas of transformers and of litgpt, and DecLLM."""
    llama = decoder(size, LLAMA)
    return [
        Entry("ours", llama, build_ours),
        Entry("Llama", llama, Transformers, "transformers"),
        Entry("litgpt", llama, LitGPT, "litgpt"),
        Entry("DecLLM", decoder(size), build_ours),
    ]


def encoder_decoders(size: Size) -> list[Entry]:
    """Entries of encoder-decoders: ours as a T5Gemma, that of transformers, and RedLLM."""
    t5gemma = encoder_decoder(size, T5GEMMA)
    return [
        Entry("ours", t5gemma, build_ours),
        Entry("T5Gemma", t5gemma, Transformers, "transformers"),
        Entry("RedLLM", encoder_decoder(size), build_ours),
    ]


KINDS = {"decoder": decoders, "encoder-decoder": encoder_decoders}
"""{kind of model: function that lists its contestants}"""


def families(size: Size) -> list[Entry]:
    """DecLLM and RedLLM of as many parameters: the d_ff of DecLLM is the nearest multiple of 8."""
    red = encoder_decoder(size)
    wanted = count_parameters(red).total

    def distance(d_ff: int) -> int:
        return abs(count_parameters(decoder(size._replace(d_ff=d_ff))).total - wanted)

    # Linear in d_ff, so that two sizes give the place.
    first, second = (count_parameters(decoder(size._replace(d_ff=d_ff))).total for d_ff in (8, 16))
    about = 1 + (wanted - first) // (second - first)
    d_ff = min((8 * eighths for eighths in (about, about + 1)), key=distance)
    return [
        Entry("DecLLM", decoder(size._replace(d_ff=d_ff)), build_ours),
        Entry("RedLLM", red, build_ours),
    ]


def decoder(size: Size, overrides: Sequence[str] = ()) -> ResolvedModel:
    """DecLLM of this size."""
    layers = f"model.decoder.layers={size.layers}"
    return resolve_model(load_experiment("decllm-tiny", [*_shape(size), layers, *overrides]).model)


def encoder_decoder(size: Size, overrides: Sequence[str] = ()) -> ResolvedModel:
    """RedLLM of this size, with half of the layers on each side."""
    layers = [f"model.{side}.layers={size.layers // 2}" for side in ("encoder", "decoder")]
    return resolve_model(load_experiment("redllm-tiny", [*_shape(size), *layers, *overrides]).model)


def _shape(size: Size) -> list[str]:
    keys = {
        "d_model": size.d_model,
        "attention.heads": size.heads,
        "feed_forward.d_ff": size.d_ff,
        "vocabulary": size.vocabulary,
    }
    return [f"model.{key}={value}" for key, value in keys.items()]


def available(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """(entries that can take part, a line on each of the others)."""
    there, lines = [], []
    for entry in entries:
        if entry.package and entry.model.output.future_tokens:
            lines.append(f"without {entry.name} of {entry.package}: it trains no layers for further tokens")
            continue
        try:
            if entry.package:
                importlib.import_module(entry.package)
        except ImportError as error:
            how = f"`{INSTALL[entry.package]}` installs it"
            reason = how if getattr(error, "name", None) == entry.package else f"{error}; {how}"
            lines.append(f"without {entry.name} of {entry.package}: {reason}")
        else:
            there.append(entry)
    return there, lines


def same_function(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Names of the entries with the first one's function, with their packages; none where it has no peer."""
    same = [entry for entry in entries if entry.model == entries[0].model]
    names = tuple(f"{entry.name} ({entry.package})" if entry.package else entry.name for entry in same)
    return names if len(names) > 1 else ()


def built(entries: Sequence[Entry], text: Text) -> tuple[dict[str, Contestant], list[str]]:
    """({name: contestant with the weights of the first one}, a line on each that computes something else).

    Those of another function than the first one have initial values of their own.
    """
    first = entries[0]
    baseline = first.build(first.model, None)
    contestants, lines = {first.name: baseline}, []
    weights = baseline.module.state_dict()
    for entry in entries[1:]:
        same = entry.model == first.model
        contestant = entry.build(entry.model, weights if same else None)
        apart = logits_apart(baseline, contestant, text) if same else 0.0
        if apart <= SAME:  # not for NaN
            contestants[entry.name] = contestant
        else:
            lines.append(f"without {entry.name}: its logits of the same weights differ by {apart:.1e}")
    return contestants, lines


@torch.no_grad()
def logits_apart(left: Contestant, right: Contestant, text: Text) -> float:
    """Largest difference of the logits in float32, relative to the largest logit above 1."""
    expected, found = left.logits(text), right.logits(text)
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1))
