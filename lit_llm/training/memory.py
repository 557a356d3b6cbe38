"""Bytes of device memory that training needs, by arithmetic. Loads no torch.

Counted are the tensors that grow with the model or with tokens x width. Left out as small: one number for a token or
for a head of it (statistics of norms and of softmax), rotations, masks, token ids, and what the allocator itself takes.
"""

from __future__ import annotations

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.loss.config import chunk_rows
from lit_llm.models.config import Layer, ResolvedModel
from lit_llm.models.cost import Shape, count_parameters, embedding_tensors, layer_tensors
from lit_llm.training.config import TrainingConfig

FLOAT32, BFLOAT16 = 4, 2


def state_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """Parameters and gradients in float32, the optimiser's state; under bf16 also autocast's copies of the matrices."""
    parameters, optimizer = count_parameters(model), training.optimizer
    kept = 2.0 * parameters.total * FLOAT32
    kept += sum(optimizer.state_bytes(*tensor, inside=True) for tensor in layer_tensors(model))
    kept += sum(optimizer.state_bytes(*tensor, inside=False) for tensor in embedding_tensors(model))
    # Of the vocabulary's matrices only the unembedding is multiplied with.
    multiplied = parameters.non_embedding + model.vocabulary * model.d_model
    return kept + (multiplied * BFLOAT16 if training.precision == "bf16" else 0)


def training_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """State, what the forward pass of one micro-batch keeps for its backward pass, and the loss."""
    kept = sequences * activation_bytes(model, training, shape)
    return state_bytes(model, training) + kept + loss_bytes(model, sequences * shape.outputs)


def loss_bytes(model: ResolvedModel, positions: float) -> float:
    """Log-probabilities in float32, and their gradient, of as many positions as the loss holds at once."""
    return 2 * min(positions, chunk_rows(model.vocabulary)) * model.vocabulary * FLOAT32


def activation_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """What is kept for the backward pass over one example, with attention scores never stored (a fused kernel)."""
    compute = FLOAT32 if training.precision == "fp32" else BFLOAT16
    d_model, source, target = model.d_model, shape.source, shape.target
    kept = sum(source * _layer_bytes(layer, d_model, compute) for layer in model.encoder)
    kept += sum(target * _layer_bytes(layer, d_model, compute) for layer in model.decoder)
    for cross in (layer.cross_attention for layer in model.decoder if layer.cross_attention):
        kept += target * (_read_bytes(d_model, 1, compute) + _query_bytes(cross, d_model, compute))
        kept += source * _key_bytes(cross, compute)
    readers = 2 * sum(layer.cross_attention is not None for layer in model.decoder)  # W_k and W_v of each
    # The encoder's last norm, read by all of them, and the decoder's, of which only the counted positions are kept.
    kept += source * _read_bytes(d_model, readers, compute)
    return kept + target * d_model * FLOAT32 + shape.outputs * d_model * compute


def _layer_bytes(layer: Layer, d_model: int, compute: int) -> int:
    """Self-attention and feed-forward network, for each token."""
    attention, feed_forward = layer.self_attention, layer.feed_forward
    # W_q, W_k and W_v read the one norm, W_gate and W_up the other.
    reads = _read_bytes(d_model, 3, compute) + _read_bytes(d_model, 2 if feed_forward.gated else 1, compute)
    # What the activation reads and makes; with a gate also what it is multiplied with, and the product.
    inside = (4 if feed_forward.gated else 2) * feed_forward.d_ff * compute
    return reads + _query_bytes(attention, d_model, compute) + _key_bytes(attention, compute) + inside


def _read_bytes(d_model: int, readers: int, compute: int) -> int:
    """The residual stream in float32, which its norm keeps, and the normed copy that the matrices after it keep.

    In float32 they share it; autocast makes a copy in bfloat16 for each of them.
    """
    return d_model * (FLOAT32 + (FLOAT32 if compute == FLOAT32 else readers * compute))


def _query_bytes(attention: ResolvedAttention, d_model: int, compute: int) -> int:
    """For each query token."""
    # Queries as the kernel reads them, and its output, which W_o reads too where no norm stands between.
    kept = 2 * attention.width * compute
    if "q" in attention.qkv_norm:
        kept += attention.width * FLOAT32  # a norm keeps what it reads, in float32
    if attention.output_norm in ("head", "concat"):
        kept += attention.width * compute  # what W_o reads
        # The norm reads the kernel's output; in bfloat16 it keeps a float32 copy of it.
        kept += 0 if compute == FLOAT32 else attention.width * FLOAT32
    if attention.output_norm == "after_out":
        kept += d_model * FLOAT32
    return kept


def _key_bytes(attention: ResolvedAttention, compute: int) -> int:
    """For each key token: keys and values as the kernel reads them, and before their norms, in float32."""
    norms = ("k" in attention.qkv_norm) + ("v" in attention.qkv_norm)
    return attention.kv_width * (2 * compute + FLOAT32 * norms)
