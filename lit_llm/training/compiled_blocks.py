"""Compile the blocks of a model and its loss for training.

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

from lit_llm.components.loss.module import terms_of_rows
from lit_llm.models.families import LanguageModel
from lit_llm.models.stacks import Stack, apply_block

GRAPHS = 8
"""Most graphs for each layer: kinds of masks (documents, padding, neither), and sizes of micro-batches. A run that
would need more stops with an error, since torch would go on eagerly."""


def compile_blocks(model: LanguageModel, lengths_vary: bool, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the model's blocks and loss for training; evaluations stay eager. Names of parameters do not change.

    lengths_vary: whether batches differ in their numbers of tokens. backend: one of torch's, or a test's.
    """
    # Imported here, since they take seconds.
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    # A length that equals another one, or a width, in the first batch is not assumed to do so in later ones.
    shapes.use_duck_shape = False
    # Dropout drops the entries that it drops eagerly, so it stays paired between arms.
    inductor.fallback_random = True
    # A block is a few kernels: a pool of compiling processes costs more than it saves, and would outlive a stopped run.
    inductor.compile_threads = 1
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    torch.compiler.reset()  # graphs of an earlier model in this process would count
    dynamo.recompile_limit = GRAPHS * sum(len(stack.layers) for stack in stacks)

    def compiled(function: Callable[..., Tensor], what: str, dynamic: bool) -> Callable[..., Tensor]:
        graph = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

        def call(*inputs: Any) -> Tensor:
            try:
                return graph(*inputs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = str(error).strip().partition("\n")[0]
                message = f"{what} could not be compiled ({reason}); set training.execution.kernels to auto in all arms"
                raise RuntimeError(message) from error

        return call

    apply = compiled(apply_block, "a block", lengths_vary)
    for stack in stacks:
        stack.apply_in_training = apply
    model.compiled_terms = compiled(terms_of_rows, "the loss", True)  # a batch's last rows are fewer
