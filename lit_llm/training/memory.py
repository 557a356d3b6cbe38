"""Bytes of device memory that training needs, by arithmetic. Loads no torch.

Counted are the tensors that grow with the model or with tokens x width. Left out as small: one number for a token or
for a head of it (statistics of norms and of softmax), rotations, masks, token ids, and what the allocator itself takes.
Within 3% of what autograd keeps for pre-norm and sandwich models, 5% with retention; a sixth off at most for other
placements of norms and for merged attention. Soft-capped or biased scores are counted, roughly. Not counted are the
masks of a visible prefix and of merged layers, a number for each pair of tokens that a kernel keeps for a layer
whatever the number of sequences: at 2,048 tokens, d_model 96 and one sequence up to 45% of what is kept.
"""

from __future__ import annotations

from dataclasses import replace

from lit_llm.components.loss.config import chunk_rows
from lit_llm.components.part import BFLOAT16, FLOAT32, Precision
from lit_llm.models.cost import Shape, count_parameters, examples
from lit_llm.models.parameters import embedding_shapes, matrix_of, parameter_shapes
from lit_llm.models.resolve import ResolvedModel
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.config import Optimizer


def state_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """Parameters, gradients, the optimiser's state.

    Parameters and gradients are in float32; under bf16 there are autocast's copies of the matrices, too. Under
    bf16_master both are in bfloat16, and the masters in float32 take what that spares.
    """
    parameters, optimizer = count_parameters(model), training.optimizer
    kept = 2.0 * parameters.total * FLOAT32  # or 2 + 2 + 4 bytes
    kept += optimizer_bytes(model, optimizer)
    # Of the vocabulary's matrices only the unembedding is multiplied with.
    multiplied = parameters.non_embedding + model.vocabulary * model.d_model
    return kept + (multiplied * BFLOAT16 if training.precision == "bf16" else 0)


def optimizer_bytes(model: ResolvedModel, optimizer: Optimizer) -> float:
    """The optimiser's state."""
    outside = embedding_shapes(model)
    shapes = parameter_shapes(model)
    return sum(optimizer.state_bytes(*matrix_of(shape), name not in outside) for name, shape in shapes.items())


def weights_bytes(model: ResolvedModel) -> float:
    """The weights as they are saved at the end, in float32."""
    return float(count_parameters(model).total * FLOAT32)


def checkpoint_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """What a resume needs: parameters and the optimiser's state."""
    return weights_bytes(model) + optimizer_bytes(model, training.optimizer)


def training_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """State, what the forward pass of one micro-batch keeps for its backward pass, and the loss."""
    kept = sequences * activation_bytes(model, training, shape) + loss_bytes(model, sequences * shape.outputs)
    kept += mask_bytes(model, training, shape)
    # Masters are stepped by float32 gradients, when what the passes kept is gone.
    master = training.precision == "bf16_master"
    stepping = count_parameters(model).total * (FLOAT32 - BFLOAT16) if master else 0
    return state_bytes(model, training) + max(kept, stepping, look_bytes(model, training, shape, sequences))


def mask_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """Of masks that a kernel keeps as numbers, once for all sequences."""
    precision = _precision(training)
    kept = [
        sum(part.mask_bytes(example, precision) for _, part in layer.parts)
        for _, layer, example in examples(model, shape)
    ]
    return max(kept, default=0.0) if training.execution.activation_checkpointing else sum(kept)


def look_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """Of a look at the largest attention logit, which keeps nothing: the scores of some queries at a time, the bias on
    all of them, and the queries, keys and values of one attention."""
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


def loss_bytes(model: ResolvedModel, positions: float) -> float:
    """Log-probabilities in float32, and their gradient, of as many positions as the loss holds at once."""
    return 2 * min(positions, chunk_rows(model.vocabulary)) * model.vocabulary * FLOAT32


def _precision(training: TrainingConfig) -> Precision:
    return Precision(
        compute=FLOAT32 if training.precision == "fp32" else BFLOAT16,
        residual=BFLOAT16 if training.precision == "bf16_master" else FLOAT32,
        dropout_mask=1 if training.dropout else 0,
    )


def activation_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """What is kept for the backward pass over one example, with attention scores never stored (a fused kernel).

    With activation checkpointing: the input of every layer, the encoder's output, and one layer's inside, the largest.
    """
    of, norm, source = _precision(training), model.norm, shape.source if model.encoder else 0.0
    # RMSNorm computes in float32 and keeps what it computes with (on a CPU; CUDA's kernel keeps what it reads).
    normed = of.residual if norm.function == "layer_norm" else FLOAT32
    # Where its scale is learned it also keeps what is scaled (on a CPU; CUDA's kernel keeps no copy).
    scaled = normed + (FLOAT32 if norm.scale and norm.function == "rms_norm" else 0)
    norms = scaled * (norm.before + (norm.after or norm.placement == "post"))
    inputs, insides, encoder_is_read = list[float](), list[float](), False
    for side, layer, example in examples(model, replace(shape, to_go_on=False)):
        widths, inside = model.widths(side), 0.0
        for _, part in layer.parts:
            # The norms around it, the copies that its matrices read (under autocast one each), and dropout's mask.
            read = norms + (part.readers if of.autocast else 1) * of.compute + of.dropout_mask
            inside += example.row * widths.row * read + part.activation_bytes(example, widths, of)
            encoder_is_read |= part.reads_encoder
        inputs.append(example.row * widths.row)
        insides.append(inside)
    outputs = source * model.width("encoder"), shape.target * model.d_model
    # The norm after each stack reads the residual stream once more; there is dropout on the embeddings.
    kept = sum(outputs) * (scaled + of.dropout_mask)
    if shared := model.shared_kv:
        # The norm before them keeps what the next layer's norm keeps anyway, unless each makes a copy in float32.
        copies = scaled - (normed if normed == of.residual else 0)
        kept += shape.target * (copies * model.d_model + shared.shared_activation_bytes(model.widths("decoder"), of))
    kept += shape.outputs * model.d_model * of.compute  # of the decoder's last norm only the counted positions are kept
    if not training.execution.activation_checkpointing:
        return kept + sum(insides) + (outputs[0] * of.compute if encoder_is_read and not of.autocast else 0)
    spared = of.residual if normed == of.residual else 0  # what its first norm keeps is the layer's input itself
    inner = max(inside - entries * spared for inside, entries in zip(insides, inputs, strict=True))
    return kept + inner + (sum(inputs) + (outputs[0] if encoder_is_read else 0)) * of.residual
