"""Bytes of device memory that training needs, by arithmetic. Loads no torch."""

from __future__ import annotations

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.models.config import Layer, ResolvedModel
from lit_llm.models.cost import Shape, count_parameters
from lit_llm.training.config import TrainingConfig

FLOAT32, BFLOAT16 = 4, 2


def state_bytes(model: ResolvedModel, training: TrainingConfig) -> int:
    """Parameters, gradients and optimiser state, all in float32."""
    return count_parameters(model).total * FLOAT32 * (2 + training.optimizer.state_entries)


def training_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> int:
    """State, and what the forward pass of one micro-batch keeps for its backward pass."""
    return state_bytes(model, training) + sequences * activation_bytes(model, training, shape)


def activation_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> int:
    """What is kept for the backward pass over one example, with attention scores never stored (a fused kernel)."""
    compute = FLOAT32 if training.precision == "fp32" else BFLOAT16
    entries = sum(shape.source * _layer_entries(layer, model.d_model) for layer in model.encoder)
    for layer in model.decoder:
        entries += shape.target * _layer_entries(layer, model.d_model)
        if cross := layer.cross_attention:
            entries += shape.target * (2 * model.d_model + _query_entries(cross, model.d_model))
            entries += shape.source * _key_entries(cross)
    # Logits of the counted positions, and their gradient, in float32.
    return int(entries * compute + 2 * shape.outputs * model.vocabulary * FLOAT32)


def _layer_entries(layer: Layer, d_model: int) -> int:
    attention, feed_forward = layer.self_attention, layer.feed_forward
    inside = 4 * feed_forward.d_ff if feed_forward.gated else 2 * feed_forward.d_ff
    return 4 * d_model + _query_entries(attention, d_model) + _key_entries(attention) + inside


def _query_entries(attention: ResolvedAttention, d_model: int) -> int:
    """Queries as the kernel reads them, before their norm, the kernel's output, and what W_o reads."""
    after_out = d_model if attention.output_norm == "after_out" else 0
    return attention.width * (3 + ("q" in attention.qkv_norm)) + after_out


def _key_entries(attention: ResolvedAttention) -> int:
    """Keys and values as the kernel reads them, and before their norms."""
    return attention.kv_width * (2 + ("k" in attention.qkv_norm) + ("v" in attention.qkv_norm))
