"""Bytes of device memory that training needs, by arithmetic. Loads no torch.

Counted are tensors whose size grows with the model or with tokens x width. Left out as small: tensors with one number
per token or head (statistics of norms and of softmax), rotations, masks, token ids, and the allocator's overhead. The
result is within 3% of what autograd keeps for pre-norm and sandwich models, within 5% for mixers with a recurrent
state, within 6% for double decoders, and within a sixth for other placements of norms and for merged attention.
Soft-capped or biased scores are counted roughly. Masks of a visible prefix and of merged layers are not counted, one
number per pair of tokens and layer for all sequences together: at 2,048 tokens, d_model 96 and one sequence up to 45%
of what is kept. FlexAttention's masks of windows, caps and ALiBi are counted; those of prefixes and documents, a byte
per pair of tokens and row, are not.

Dropout of attention weights takes no memory in the fused kernels of a GPU. A CPU keeps all weights of a layer, which
are counted with `accelerator: cpu`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from lit_llm.components.loss.config import chunk_rows
from lit_llm.components.part import BFLOAT16, FLOAT32, Part, Precision
from lit_llm.components.windows import block_mask_bytes
from lit_llm.models.cost import Shape, count_parameters, encoder_tokens, examples
from lit_llm.models.parameters import embedding_shapes, matrix_of, parameter_shapes
from lit_llm.models.resolved import ResolvedModel
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.config import Optimizer


def state_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """Bytes of parameters, gradients, the optimiser's state and the average of the weights.

    Parameters and gradients are in float32; with bf16 autocast's copies of the matrices are added. With bf16_master
    both are in bfloat16, and the float32 masters take the bytes that this saves.
    """
    parameters, optimizer = count_parameters(model), training.optimizer
    kept = 2.0 * parameters.total * FLOAT32  # or 2 + 2 + 4 bytes
    kept += optimizer_bytes(model, optimizer) + average_bytes(model, training)
    # Only the unembedding, among the vocabulary's matrices, is in a matrix product.
    multiplied = parameters.non_embedding + model.vocabulary * model.d_model
    return kept + (multiplied * BFLOAT16 if training.precision == "bf16" else 0)


def sharded_state_bytes(model: ResolvedModel, training: TrainingConfig, devices: int, synchronised: bool) -> float:
    """Bytes on one device, of those that share parameters, gradients and the optimiser's state (FSDP2).

    Beside its part a device has whole tensors: parameters and gradients outside of blocks during a step, and those of
    two blocks, since the next one is gathered while one computes. With several micro-batches (synchronised: False) the
    whole gradient is kept until the last. With bf16 autograd keeps a copy of every matrix for the backward pass.
    """
    parameters = count_parameters(model)
    states = optimizer_bytes(model, training.optimizer) + average_bytes(model, training)
    part = (2.0 * parameters.total * FLOAT32 + states) / devices
    blocks = block_parameters(model)
    gathered = parameters.total - sum(blocks) + sum(sorted(blocks)[-2:])
    number = BFLOAT16 if training.precision == "bf16_master" else FLOAT32
    copies = (parameters.non_embedding + model.vocabulary * model.d_model) * BFLOAT16
    whole = number * (gathered + (gathered if synchronised else parameters.total))
    return part + whole + (copies if training.precision == "bf16" else 0)


def block_parameters(model: ResolvedModel) -> list[int]:
    """Number of parameters of every block of layers, which are sharded as a unit."""
    sizes: dict[tuple[str, ...], int] = {}
    for name, shape in parameter_shapes(model).items():
        if ".layers." in name or ".future." in name:
            block = tuple(name.split(".")[:3])
            sizes[block] = sizes.get(block, 0) + math.prod(shape)
    return list(sizes.values())


def optimizer_bytes(model: ResolvedModel, optimizer: Optimizer) -> float:
    """Bytes of the optimiser's state."""
    outside = embedding_shapes(model)
    shapes = parameter_shapes(model)
    return sum(optimizer.state_bytes(*matrix_of(shape), name not in outside) for name, shape in shapes.items())


def average_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """Bytes of the average of the weights; 0 without one."""
    return 0.0 if training.weight_averaging is None else weights_bytes(model)


def weights_bytes(model: ResolvedModel) -> float:
    """Bytes of the weights that are saved at the end, in float32."""
    return float(count_parameters(model).total * FLOAT32)


def checkpoint_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """Bytes of a checkpoint: parameters, the optimiser's state and the average of the weights."""
    return weights_bytes(model) + optimizer_bytes(model, training.optimizer) + average_bytes(model, training)


Shared = Literal["ddp", "fsdp"]
"""What several devices share: with ddp each has the whole state, with fsdp a part of it."""


def device_bytes(
    model: ResolvedModel, training: TrainingConfig, shape: Shape, batch_size: int, strategy: Shared
) -> float:
    """Bytes of training on one of the configured devices; with one device the strategy has no effect."""
    execution = training.execution
    sequences = execution.rows_at_once(batch_size)
    needed = training_bytes(model, training, shape, sequences)
    if execution.ranks == 1 or strategy == "ddp":
        return needed
    synchronised = sequences == execution.share(batch_size)
    return needed - state_bytes(model, training) + sharded_state_bytes(model, training, execution.ranks, synchronised)


def training_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """Bytes of the state, of the tensors that one micro-batch keeps for its backward pass, and of the loss."""
    kept = sequences * activation_bytes(model, training, shape) + loss_bytes(model, sequences * shape.outputs)
    kept += mask_bytes(model, training, shape) + output_gradient_bytes(model)
    # Those of the losses of further tokens are kept until the backward pass.
    kept += model.output.future_tokens * output_gradient_bytes(model) / 2
    # Masters are updated with float32 gradients, after the tensors of the passes are freed.
    master = training.precision == "bf16_master"
    stepping = count_parameters(model).total * (FLOAT32 - BFLOAT16) if master else 0
    return state_bytes(model, training) + max(kept, stepping, logit_bytes(model, training, shape, sequences))


def mask_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """Bytes of masks that kernels keep as numbers, once for all sequences."""
    precision, kept, shared = _precision(training), list[float](), dict[tuple[str, Part], float]()
    for side, layer, example in examples(model, shape):
        kept.append(
            sum(part.mask_bytes(example, precision) for _, part in layer.parts if not part.shares_mask(precision))
        )
        shared |= {
            (side, part): part.mask_bytes(example, precision) for _, part in layer.parts if part.shares_mask(precision)
        }
    of_layers = max(kept, default=0.0) if training.execution.activation_checkpointing else sum(kept)
    return of_layers + sum(shared.values()) + _bytes_of_blocks(model, shape, precision)


def _bytes_of_blocks(model: ResolvedModel, shape: Shape, precision: Precision) -> float:
    """Bytes of a double decoder's masks of own and of earlier blocks; 0 in other families."""
    if model.block is None:
        return 0.0
    keys = shape.target, encoder_tokens(model, shape)
    if precision.flex and not any(part.without_flex for part in model.parts):
        return float(sum(block_mask_bytes(math.ceil(shape.target), math.ceil(number)) for number in keys))
    return shape.target * sum(keys) * precision.compute


def logit_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """Bytes to measure the largest attention logit, freed afterwards: the scores of one chunk of queries, the bias on
    all queries, and the queries, keys and values of one attention."""
    if not training.stability.logit_every:
        return 0.0
    rows = min(training.stability.logit_sequences, sequences)
    return max(
        (
            part.logit_bytes(example, model.widths(side), rows)
            for side, layer, example in examples(model, shape)
            for _, part in layer.parts
        ),
        default=0.0,
    )


def loss_bytes(model: ResolvedModel, positions: float, copies: int = 2) -> float:
    """Bytes of the logits in float32 and their temporary copies, for the positions computed at once on a GPU.

    On a CPU these are fewer. copies: how many tensors of the logits' size exist together.
    """
    return copies * min(positions, chunk_rows(model.vocabulary, "cuda")) * model.vocabulary * FLOAT32


def output_gradient_bytes(model: ResolvedModel) -> float:
    """Bytes of the loss's gradient with respect to the output matrix, which is made in the forward pass: the sum over
    the chunks so far, and one chunk's."""
    return 2 * model.vocabulary * model.d_model * FLOAT32


def _precision(training: TrainingConfig) -> Precision:
    compute = FLOAT32 if training.precision == "fp32" else BFLOAT16
    drops = training.attention_dropout > 0
    return Precision(
        compute=compute,
        residual=BFLOAT16 if training.precision == "bf16_master" else FLOAT32,
        dropout_mask=1 if training.dropout else 0,
        flex=training.execution.kernels == "flex",
        feed_forward_mask=1 if training.feed_forward_dropout else 0,
        # The mask, and the weights that are left; in bfloat16 these are kept anyway.
        dropped_weights=drops * (1 + (compute if compute == FLOAT32 else 0)),
        # torch's kernel for a CPU has no dropout: weights before and after it, and the mask, are kept as numbers.
        dropped_in_kernel=3 * FLOAT32 if drops and training.execution.accelerator == "cpu" else 0,
    )


def activation_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """Bytes kept for the backward pass over one example, with fused kernels that store no attention scores.

    With activation checkpointing: the inputs of all layers, what later layers read of earlier ones, the encoder's
    output, and the inside of the largest layer.
    """
    precision, norm, source = _precision(training), model.norm, encoder_tokens(model, shape) if model.encoder else 0.0
    # A norm keeps its input, and nothing for its learned scale. One on a part's output reads what its matrices made.
    norms = precision.residual * (norm.before or norm.placement == "post") + precision.compute * norm.after
    inputs, insides, encoder_is_read, for_later = list[float](), list[float](), False, 0.0
    for side, layer, example in examples(model, replace(shape, to_go_on=False)):
        widths, inside = model.widths(side), 0.0
        for number, (_, part) in enumerate(layer.parts):
            # The norms around the part, the input of its matrices, and dropout's mask. Parallel parts have one input.
            shared_input = precision.residual if norm.placement == "parallel" and number else 0
            read = norms - shared_input + precision.compute + precision.dropout_mask
            learned = precision.compute if model.residual.branch_shape(widths.row) else 0  # the input of its factor
            inside += example.row * widths.row * (read + learned) + part.activation_bytes(example, widths, precision)
            encoder_is_read |= part.reads_encoder
            for_later += part.bytes_for_later_layers(example, precision)
        inputs.append(example.row * widths.row)
        insides.append(inside)
    outputs = source * model.width("encoder"), shape.target * model.d_model
    # The norm after each stack, and dropout on the embeddings.
    kept = sum(outputs) * (precision.residual + precision.dropout_mask)
    if shared := model.shared_kv:
        # The norm before them keeps the input that the next layer's norm keeps.
        kept += shape.target * shared.shared_activation_bytes(model.widths("decoder"), precision)
    # The loss's gradient with respect to the last norm's output, for the counted positions only.
    kept += shape.outputs * model.d_model * precision.residual
    # Layers for further tokens read the last layer's input. Each keeps what that layer keeps, the input of the norm
    # behind it, and the loss's gradient.
    recomputed = training.execution.activation_checkpointing
    beside = 0.0 if recomputed else insides[-1] - inputs[-1] * precision.residual * norm.before
    beside += (outputs[1] + shape.outputs * model.d_model) * precision.residual
    kept += model.output.future_tokens * beside
    if not recomputed:
        return (
            kept + sum(insides) + (outputs[0] * precision.compute if encoder_is_read and not precision.autocast else 0)
        )
    # What a layer's first norm keeps is counted as the layer's input.
    inner = max(inside - entries * precision.residual for inside, entries in zip(insides, inputs, strict=True))
    return kept + for_later + inner + (sum(inputs) + (outputs[0] if encoder_is_read else 0)) * precision.residual
