"""Bytes of device memory that training needs, by arithmetic. Loads no torch.

Counted are the tensors that grow with the model or with tokens x width. Left out as small: one number for a token or
for a head of it (statistics of norms and of softmax), rotations, masks, token ids, and what the allocator itself takes.
Within 3% of what autograd keeps for pre-norm and sandwich models, 5% with retention; a sixth off at most for other
placements of norms and for merged attention. Soft-capped or biased scores are counted, roughly. Not counted are the
masks of a visible prefix and of merged layers, a number for each pair of tokens that a kernel keeps for a layer
whatever the number of sequences: at 2,048 tokens, d_model 96 and one sequence up to 45% of what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_llm.components.attention.config import BAND, SCORES, ResolvedAttention, band_size
from lit_llm.components.loss.config import chunk_rows
from lit_llm.components.retention.config import ResolvedRetention
from lit_llm.models.cost import Shape, count_parameters, embedding_tensors, layer_tensors
from lit_llm.models.resolve import Layer, ResolvedModel
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.config import Optimizer

FLOAT32, BFLOAT16 = 4, 2


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
    kept = sum(optimizer.state_bytes(*tensor, inside=True) for tensor in layer_tensors(model))
    return kept + sum(optimizer.state_bytes(*tensor, inside=False) for tensor in embedding_tensors(model))


def weights_bytes(model: ResolvedModel) -> float:
    """The weights as they are saved at the end, in float32."""
    return float(count_parameters(model).total * FLOAT32)


def checkpoint_bytes(model: ResolvedModel, training: TrainingConfig) -> float:
    """What a resume needs: parameters and the optimiser's state."""
    return weights_bytes(model) + optimizer_bytes(model, training.optimizer)


def training_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """State, what the forward pass of one micro-batch keeps for its backward pass, and the loss."""
    kept = sequences * activation_bytes(model, training, shape) + loss_bytes(model, sequences * shape.outputs)
    kept += window_bytes(model, training, shape)
    # Masters are stepped by float32 gradients, when what the passes kept is gone.
    master = training.precision == "bf16_master"
    stepping = count_parameters(model).total * (FLOAT32 - BFLOAT16) if master else 0
    return state_bytes(model, training) + max(kept, stepping, look_bytes(model, training, shape, sequences))


def window_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """Of the masks of windows that are no band: each layer's kernel keeps one for all sequences, as numbers."""
    compute, found = FLOAT32 if training.precision == "fp32" else BFLOAT16, [0.0]
    for causal, tokens, layers in ((False, shape.source, model.encoder), (True, shape.target, model.decoder)):
        for layer in layers:
            own = layer.self_attention
            if own is not None and own.reach is not None and not _is_band(own, tokens, causal):
                found.append(tokens * (tokens + shape.source * layer.merged) * compute)
    return max(found) if training.execution.activation_checkpointing else sum(found)


def _is_band(attention: ResolvedAttention, tokens: float, causal: bool) -> bool:
    return attention.reach is not None and tokens >= BAND * band_size(attention.reach, causal)


def look_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape, sequences: int) -> float:
    """Of a look at the largest attention logit, which keeps nothing: the scores of some queries at a time, the bias on
    all of them, and the queries, keys and values of one attention."""
    if not training.stability.logit_every:
        return 0.0
    rows = min(training.stability.logit_sequences, sequences)
    found = [0.0]
    for side, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        own = shape.source if side == "encoder" else shape.target
        for layer in layers:
            pairs = [(layer.self_attention, own, own + shape.source * layer.merged)]
            pairs.append((layer.cross_attention, own, shape.source))
            for attention, queries, keys in pairs:
                if attention is None or not queries or not keys:
                    continue
                row = rows * attention.heads * keys
                scores = min(row * queries, max(SCORES, row)) * FLOAT32
                bias = 0.0 if attention.relative_bias == "none" else attention.heads * queries * keys * FLOAT32
                heads = rows * (2 * queries + 4 * keys) * attention.width * FLOAT32
                found.append(3 * scores + bias + heads + rows * 4 * own * model.width(side) * FLOAT32)
    return max(found)


def loss_bytes(model: ResolvedModel, positions: float) -> float:
    """Log-probabilities in float32, and their gradient, of as many positions as the loss holds at once."""
    return 2 * min(positions, chunk_rows(model.vocabulary)) * model.vocabulary * FLOAT32


@dataclass(frozen=True)
class _Kept:
    """How many bytes what is kept takes, for each token, in one precision."""

    d_model: int
    compute: int
    """Of an entry that the kernels read."""
    residual: int
    """Of an entry of the residual stream."""
    normed: int
    """Of an entry that a norm of the residual stream keeps beside the stream itself or in its place."""
    scaled: int
    """The same where its scale is learned: beside them what is scaled (on a CPU; CUDA's kernel keeps no copy)."""
    mask: int
    """Of an entry that dropout decides about: CUDA's kernel keeps one byte (on a CPU it is a number)."""
    before: bool
    """Whether parts read a normed residual stream."""
    after: bool
    """Whether a norm reads what parts add, or the stream with it."""

    @property
    def autocast(self) -> bool:
        return self.compute != self.residual

    def read(self, readers: int) -> int:
        """What the norms of the residual stream keep around one part, and the copy that the matrices after it keep.

        Autocast makes a copy in bfloat16 for each of the readers.
        """
        return self.d_model * (
            self.scaled * (self.before + self.after) + (readers if self.autocast else 1) * self.compute
        )

    def layer(self, layer: Layer) -> int:
        """Self-attention, or what of a retention each token keeps, and feed-forward network."""
        attention, retention, feed_forward = layer.self_attention, layer.retention, layer.feed_forward
        mixed = 0
        if attention is not None:  # W_q, W_k and W_v read the one norm, W_gate and W_up the other
            mixed = self.read(len(attention.own_parts)) + self.query(attention)
            mixed += 0 if attention.shared_kv else self.key(attention)
        if retention is not None:
            # Queries, keys, values; then of the values' width what the head norm reads, what it and the gate make,
            # before and after swish, and the product.
            entries = 2 * retention.width + 5 * retention.value_width
            mixed = self.read(5) + entries * self.compute + retention.value_width * FLOAT32
        reads = mixed + self.read(2 if feed_forward.gated else 1)
        # What the activation reads and makes; with a gate also what it is multiplied with, and the product.
        inside = (4 if feed_forward.gated else 2) * feed_forward.d_ff * self.compute
        return reads + inside + 2 * self.d_model * self.mask

    def query(self, attention: ResolvedAttention) -> int:
        """For each query token."""
        # Queries as the kernel reads them, and its output, which W_o reads too where no norm stands between.
        kept = 2 * attention.width * self.compute
        if "q" in attention.qkv_norm:
            # A norm keeps what it reads, in float32, and what it scales.
            kept += attention.width * (FLOAT32 + FLOAT32 * attention.qkv_norm_scale)
        if attention.output_norm in ("head", "concat"):
            kept += attention.width * self.compute  # what W_o reads
            # The norm reads the kernel's output; in bfloat16 it keeps a float32 copy of it.
            kept += 0 if self.compute == FLOAT32 else attention.width * FLOAT32
            kept += attention.width * FLOAT32 * attention.output_norm_scale
        if attention.output_norm == "after_out":
            kept += self.d_model * (FLOAT32 + FLOAT32 * attention.output_norm_scale)
        return kept

    def chunks(self, retention: ResolvedRetention | None, tokens: float) -> float:
        """For all of its tokens beside what each of them keeps: the pairs inside of chunks, and the states between."""
        if retention is None:
            return 0.0
        whole, rest = divmod(tokens, retention.chunk)
        # Scores, how much of each is left (in float32, then in the scores' precision), and their product.
        pairs = (whole * retention.chunk**2 + rest**2) * retention.heads
        kept = pairs * (FLOAT32 + (3 if self.compute != FLOAT32 else 2) * self.compute)
        # Queries that read a state and keys that are added to it, faded; the states.
        kept += 2 * max(tokens - retention.chunk, 0) * retention.width * self.compute
        copy = self.compute if self.compute != FLOAT32 else 0
        return kept + max(whole + (rest > 0) - 1, 0) * retention.state_entries * (FLOAT32 + copy)

    def shared(self, attention: ResolvedAttention) -> int:
        """For each token: what makes shared keys and values, and these."""
        # Their norm keeps what the next layer's norm keeps anyway, unless each makes a copy in float32.
        normed = self.scaled - (self.normed if self.normed == self.residual else 0)
        return self.d_model * (normed + (2 if self.autocast else 1) * self.compute) + self.key(attention)

    def band(self, attention: ResolvedAttention | None, tokens: float, causal: bool) -> float:
        """For all of its tokens, of a window that is a band: keys and values once more for each block beside their own,
        and the mask of each block, as numbers."""
        if attention is None or not _is_band(attention, tokens, causal):
            return 0.0
        assert attention.reach is not None
        sides = 2 if causal else 3
        keys = 2 * (sides - 1) * attention.kv_width
        return tokens * (keys + sides * band_size(attention.reach, causal)) * self.compute

    def scores(self, attention: ResolvedAttention | None, pairs: float) -> float:
        """For all (query, key) pairs, where no fused kernel spares them: a cap's tanh and the weights, or a bias with
        its mask and the weights."""
        if attention is None or (attention.softcap is None and attention.relative_bias == "none"):
            return 0.0
        return pairs * attention.heads * (2 * FLOAT32 + (self.compute if self.autocast else 0))

    def key(self, attention: ResolvedAttention) -> int:
        """For each key token: keys and values as the kernel reads them, and before their norms, in float32."""
        norms = ("k" in attention.qkv_norm) + ("v" in attention.qkv_norm)
        return attention.kv_width * (2 * self.compute + FLOAT32 * norms * (1 + attention.qkv_norm_scale))


def _kept(model: ResolvedModel, training: TrainingConfig, side: str) -> _Kept:
    compute = FLOAT32 if training.precision == "fp32" else BFLOAT16
    residual = BFLOAT16 if training.precision == "bf16_master" else FLOAT32
    # RMSNorm computes in float32 and keeps what it computes with (on a CPU; CUDA's kernel keeps what it reads).
    normed = residual if model.norm.function == "layer_norm" else FLOAT32
    norm, mask = model.norm, 1 if training.dropout else 0
    after = norm.after or norm.placement == "post"
    scaled = normed + (FLOAT32 if norm.scale and norm.function == "rms_norm" else 0)
    return _Kept(model.width(side), compute, residual, normed, scaled, mask, norm.before, after)


def activation_bytes(model: ResolvedModel, training: TrainingConfig, shape: Shape) -> float:
    """What is kept for the backward pass over one example, with attention scores never stored (a fused kernel).

    With activation checkpointing: the input of every layer, the encoder's output, and one layer's inside, the largest.
    """
    of, d_model, source, target = _kept(model, training, "decoder"), model.d_model, shape.source, shape.target
    at_source, width = _kept(model, training, "encoder"), model.width("encoder")
    insides, crossed = [], 0
    for layer in model.encoder:
        scores = at_source.scores(layer.self_attention, source * source)
        scores += at_source.band(layer.self_attention, source, causal=False)
        insides.append(source * at_source.layer(layer) + scores)
    for layer in model.decoder:
        own = layer.self_attention
        inside = target * of.layer(layer) + of.scores(own, target * (target + source * layer.merged))
        inside += of.chunks(layer.retention, target)
        inside += 0.0 if layer.merged else of.band(own, target, causal=True)
        if own and layer.merged:  # the keys once more, joined with the target's
            inside += source * of.key(own) + (source + target) * 2 * own.kv_width * of.compute
            inside += source * d_model * 2 * of.compute if of.autocast else 0
            crossed += 1
        if cross := layer.cross_attention:
            inside += target * (of.read(1) + of.query(cross) + d_model * of.mask) + source * of.key(cross)
            # W_k and W_v read the encoder's output; autocast makes a copy for each of them.
            inside += source * width * 2 * of.compute if of.autocast else 0
            inside += of.scores(cross, target * source)
            crossed += 1
        if partial := layer.partial_attention:
            inside += target * (of.read(1) + of.query(partial) + d_model * of.mask) + shape.partial * of.key(partial)
            # What A1, then A2, then W_k and W_v read. The first is a copy: in a batch the source's slice has gaps.
            inside += shape.partial * d_model * 3 * of.compute
        insides.append(inside)
    # The norm after each stack reads the residual stream once more.
    kept = (source if model.encoder else 0) * width * at_source.scaled + target * d_model * of.scaled
    kept += (source * width + target * d_model) * of.mask  # dropout on the embeddings
    kept += target * of.shared(model.shared_kv) if model.shared_kv else 0
    kept += shape.outputs * d_model * of.compute  # of the decoder's last norm only the counted positions are kept
    if not training.execution.activation_checkpointing:
        return kept + sum(insides) + (source * width * of.compute if crossed and not of.autocast else 0)
    inputs = [source * width] * len(model.encoder) + [target * d_model] * len(model.decoder)
    shared = of.residual if of.normed == of.residual else 0  # what its first norm keeps is the layer's input itself
    inner = max(inside - entries * shared for inside, entries in zip(insides, inputs, strict=True))
    return kept + inner + (sum(inputs) + (source * width if crossed else 0)) * of.residual
