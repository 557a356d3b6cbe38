"""Build an initialised module from a config.

Every parameter is drawn from a separate generator, seeded by (seed, name). Parameters of equal name and shape therefore
start bit-equal in all arms and families, in any order of construction: a decoder-only model's stack has the names of an
encoder-decoder's decoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from lit_llm.components.registry import PACKAGES
from lit_llm.config.problems import InputError, Problem
from lit_llm.models.config import ModelConfig
from lit_llm.models.decoder_decoder import DecoderDecoder
from lit_llm.models.double_decoder import DoubleDecoder
from lit_llm.models.families import DecoderOnly, EncoderDecoder, EncoderOnly, LanguageModel
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import initial_deviations


def build_model(config: ModelConfig | ResolvedModel, seed: int = 0, device: str = "cpu") -> LanguageModel:
    """Build a model in float32 and initialise it.

    Args:
        config: Model section of an experiment, or the result of `resolve_model`.
        seed: Seed of the initial values. Equal seeds give equal values to parameters of equal name and shape, in every
            family.
        device: Device of the parameters. With `"meta"` only their shapes exist, so that any size fits.

    Returns:
        A module of the config's family. An encoder-decoder is called with source ids (B x S) and decoder inputs (B x
        T), any other with ids (B x T); the logits are B x T x V.
    """
    resolved = config if isinstance(config, ResolvedModel) else resolve_model(config)
    with torch.device("meta"):
        model = bare_model(resolved)
    if device == "meta":
        return model
    if next(model.buffers(), None) is None:
        model.to_empty(device="cpu")
    else:
        model = bare_model(resolved)  # with the values that modules give their buffers
    initialise(model, seed)
    return model.to(device)


def _check_shapes(model: LanguageModel) -> None:
    """Raise InputError where a component from another package has other parameters than its `shapes`."""
    if not any(layer.part(key) for layer in model.config.layers for key in PACKAGES):
        return
    specified = parameter_shapes(model.config)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in [*specified, *built]:
        if specified.get(name) != built.get(name):
            message = f"its `shapes` say {specified.get(name)} of {name}, and the module has {built.get(name)}"
            raise InputError(Problem(message, f"the component of {name.rpartition('.')[0]}"))


def bare_model(resolved: ResolvedModel) -> LanguageModel:
    """Build the modules with torch's initial values, on torch's default device."""
    model = FAMILIES[resolved.family](resolved)
    _check_shapes(model)
    return model


FAMILIES: dict[str, Callable[[ResolvedModel], LanguageModel]] = {
    "decoder": DecoderOnly,
    "encoder_decoder": EncoderDecoder,
    "encoder_only": EncoderOnly,
    "decoder_decoder": DecoderDecoder,
    "double_decoder": DoubleDecoder,
}


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill the parameters with initial values.

    Scales begin at one, biases at zero, matrices and tables with the deviations of `initial_deviations`. A module's
    `initial_std` overrides its matrices' standard deviation, and `initial` of a module has functions that fill single
    parameters.

    By default the standard deviation depends on a matrix's shape and not on the depth, so that stacks of different
    depth share their layers' values.
    """
    deviations = initial_deviations(model.config)
    for path, module in model.named_modules():
        for local_name, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{local_name}".lstrip(".")
            if fill := getattr(module, "initial", {}).get(local_name):
                fill(parameter, generator(seed, name))
                continue
            if parameter.dim() < 2:
                parameter.fill_(0.0 if local_name in ("bias", "output_bias") else 1.0)
                continue
            deviation = getattr(module, "initial_std", deviations[name])
            parameter.normal_(0.0, deviation, generator=generator(seed, name))


def generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU, seeded by (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
