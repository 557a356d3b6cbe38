"""Compile the blocks of a model and its loss for training, or its masked attention alone.

A block is compiled, not the model: layers of the same shape share one graph, so that compiling costs as much for two
layers as for thirty. All that depends on lengths is made before the layers, by `LayerPart.prepare`.

Two graphs of one block round differently, so which one computes a step must not depend on the steps before it: a
resumed run would end with other bits. Hence a graph is of one length or of any length from the start. torch's default,
a graph of one length that is replaced when a second length comes, is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_llm.components.flex import FlexAttention
from lit_llm.components.loss.module import terms_of_rows
from lit_llm.config.problems import InputError, Problem
from lit_llm.models.families import LanguageModel
from lit_llm.models.stacks import Stack, apply_block
from lit_llm.training.kernels import kernel_obstacle

GRAPHS = 8
"""Most graphs for each layer: kinds of masks (documents, padding, neither), and sizes of micro-batches. A run that
would need more stops with an error, since torch would go on eagerly."""
ATTENTION_GRAPHS = 128
"""Most graphs of FlexAttention for a model: kinds of scores, times sizes of queries, keys and micro-batches."""

Backend = str | Callable[..., Any]
"""One of torch's backends, or a test's."""


def use_kernels(model: LanguageModel, kernels: str, on_gpu: bool, lengths_vary: bool) -> None:
    """Make a model train by these kernels, after `LitModel` has taken it. Liger's are switched on by its steps.

    Args:
        model: The model that trains.
        kernels: A value of `training.execution.kernels`.
        on_gpu: True where the training has a CUDA device.
        lengths_vary: True where batches differ in their numbers of tokens.

    Raises:
        InputError: These kernels cannot be computed here.
    """
    if obstacle := kernel_obstacle(kernels, on_gpu):
        raise InputError(Problem(obstacle, "training.execution.kernels"))
    if kernels == "compiled":
        compile_blocks(model, lengths_vary)
    elif kernels == "flex":
        compile_attention(model, lengths_vary)
    elif kernels == "fla":
        for stack in _stacks_of(model):
            stack.fla_in_training = True


def compile_blocks(model: LanguageModel, lengths_vary: bool, backend: Backend = "inductor") -> None:
    """Compile the model's blocks and loss for training; evaluations stay eager. Names of parameters do not change.

    lengths_vary: whether batches differ in their numbers of tokens.
    """
    # Imported here, since they take seconds.
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    # A length that equals another one, or a width, in the first batch is not assumed to do so in later ones.
    shapes.use_duck_shape = False
    # Dropout drops the entries that it drops eagerly, so it stays paired between arms.
    inductor.fallback_random = True
    stacks = _stacks_of(model)
    _begin(GRAPHS * sum(len(stack.layers) + len(stack.future) for stack in stacks))
    apply = _compiled(apply_block, "a block", lengths_vary, backend)
    for stack in stacks:
        stack.apply_in_training = apply
    model.compiled_terms = _compiled(terms_of_rows, "the loss", True, backend)  # a batch's last rows are fewer


def compile_attention(model: LanguageModel, lengths_vary: bool, backend: Backend = "inductor") -> None:
    """Compute the model's masked attention in training by FlexAttention, compiled; the rest of its blocks stays eager.

    lengths_vary: whether batches differ in their numbers of rows or tokens.
    """
    flex = compiled_flex(lengths_vary, backend)
    for stack in _stacks_of(model):
        stack.flex_in_training = flex


def compiled_flex(lengths_vary: bool, backend: Backend = "inductor") -> FlexAttention:
    """FlexAttention as `compile_attention` takes it."""
    from torch.nn.attention.flex_attention import flex_attention

    _begin(ATTENTION_GRAPHS)
    return FlexAttention(_compiled(flex_attention, "attention", False, backend), lengths_vary)


def _stacks_of(model: LanguageModel) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]


def _begin(graphs: int) -> None:
    """Forget the graphs of an earlier model in this process, which would count, and allow so many for each function."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # A graph is a few kernels: a pool of compiling processes costs more than it saves, and would outlive a stopped run.
    inductor.compile_threads = 1
    torch.compiler.reset()
    dynamo.recompile_limit = graphs


def _compiled(function: Callable[..., Tensor], what: str, dynamic: bool, backend: Backend) -> Callable[..., Tensor]:
    """The function compiled whole, whose errors name the next step.

    what: its name in an error. dynamic: whether a graph is of any size, not of one.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    graph = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

    def call(*inputs: Any, **named: Any) -> Tensor:
        try:
            return graph(*inputs, **named)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = str(error).strip().partition("\n")[0]
            message = f"{what} could not be compiled ({reason}); set training.execution.kernels to auto in all arms"
            raise RuntimeError(message) from error

    return call
