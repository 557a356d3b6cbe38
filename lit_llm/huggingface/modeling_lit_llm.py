"""DecLLM and RedLLM (arXiv 2510.26622) for transformers 5.24 or later, as `lit-llm export` writes them.

This file stands alone: it imports torch and transformers. `trust_remote_code=True` loads it from an exported folder.

DecLLM   tokens ─ embedding ─ layers ─ norm ─ embeddingᵀ ─▶ logits
RedLLM   source ─ embedding ─ encoder layers ─ norm ─┐
         target ─ embedding ─ decoder layers ◀───────┘ ─ norm ─ embeddingᵀ ─▶ logits
layer    x + attention(norm(x)), in RedLLM's decoder + cross_attention(norm(x)), + down(silu(gate x) * up x) of norm(x)

All norms are RMSNorm without a learned scale, also those of each head's queries, keys and values, and in RedLLM of each
head's output. Positions are rotary (RoPE). In cross-attention the target's positions continue after the source's.

Shapes in names: B rows, T tokens, S source tokens, D entries of a token, H heads, K entries of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class DecLLMConfig(PreTrainedConfig):
    """A decoder: causal attention with normalised queries, keys and values."""

    model_type = "decllm"
    vocab_size: int = 32768
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    attention_output_norm: bool = False
    """Normalise each head's output."""
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0


class RedLLMConfig(DecLLMConfig):
    """An encoder-decoder; `num_hidden_layers` are those of the decoder."""

    model_type = "redllm"
    num_hidden_layers: int = 3
    num_encoder_layers: int = 3
    attention_output_norm: bool = True
    is_encoder_decoder: bool = True
    decoder_start_token_id: int | None = 1


Rotation = tuple[Tensor, Tensor]
"""Cosine and sine, B x 1 x T x K/2."""


class Source(NamedTuple):
    """What cross-attention reads."""

    states_BSD: Tensor
    mask: Tensor | None
    rotation: Rotation
    """Rotation of the source's keys."""
    target_rotation: Rotation
    """Rotation of the target's queries, whose positions continue after the source."""


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) over the last dimension, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotation_at(positions_BT: Tensor, config: DecLLMConfig, dtype: torch.dtype) -> Rotation:
    """RoPE at these positions. Angles are computed in float32."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    angles = positions_BT[:, None, :, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (i, i + K/2) of every head."""
    cos, sin = rotation
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def positions_of(attention_mask: Tensor | None, x_BTD: Tensor, past: int = 0) -> Tensor:
    """B x T: numbers of the tokens in their rows, without padding on either side."""
    tokens = x_BTD.shape[1]
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + tokens, device=x_BTD.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


def eager_attention(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights (`attn_implementation="eager"`)."""
    key, value = (heads.repeat_interleave(module.num_key_value_groups, dim=1) for heads in (key, value))
    scores = query @ key.transpose(2, 3) * module.scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1, torch.float32)
    return (weights.to(query.dtype) @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """
    x ────── q ─ norm ─ RoPE ─┐
    memory ┬ k ─ norm ─ RoPE ─┼─ softmax(QKᵀ/√K)V ─[norm of each head]─ o ─▶
           └ v ─ norm ────────┘
    """

    def __init__(self, config: DecLLMConfig, layer: int, causal: bool) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer, causal
        self.scaling = config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, rotation: Rotation, cache: Cache | None = None) -> Tensor:
        """Self-attention."""
        q, k, v = (self.heads(part, x_BTD) for part in (self.q_proj, self.k_proj, self.v_proj))
        k = rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        return self.attend(rotate(q, rotation), k, v, mask)

    def heads(self, projection: nn.Linear, x_BTD: Tensor) -> Tensor:
        """B x T x D -> B x H x T x K, normalised."""
        x_BTHK = projection(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        return rms_norm(x_BTHK, self.config.rms_norm_eps).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """B x H x T x K queries, keys and values -> B x T x D."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BTHK, _ = function(self, q, k, v, mask, scaling=self.scaling, dropout=0.0)
        if self.config.attention_output_norm:
            out_BTHK = rms_norm(out_BTHK, self.config.rms_norm_eps)
        return self.o_proj(out_BTHK.flatten(2))


class CrossAttention(Attention):
    """Attention from the target to the encoder's output, whose keys and values are cached once."""

    def forward(self, x_BTD: Tensor, source: Source, cache: EncoderDecoderCache | None = None) -> Tensor:  # type: ignore[override]
        q = rotate(self.heads(self.q_proj, x_BTD), source.target_rotation)
        if cache is not None and cache.is_updated.get(self.layer_idx):
            kept: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return self.attend(q, kept.keys, kept.values, source.mask)
        k = rotate(self.heads(self.k_proj, source.states_BSD), source.rotation)
        v = self.heads(self.v_proj, source.states_BSD)
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return self.attend(q, k, v, source.mask)


class FeedForward(nn.Module):
    """
    x ─┬─ gate ─ silu ─(×)─ down ─▶
       └─ up ───────────┘
    """

    def __init__(self, config: DecLLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    """Parts that each read the normalised residual stream and add to it."""

    def __init__(self, config: DecLLMConfig, layer: int, causal: bool, reads_source: bool) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config, layer, causal)
        self.cross_attn = CrossAttention(config, layer, causal=False) if reads_source else None
        self.mlp = FeedForward(config)

    def forward(
        self, x_BTD: Tensor, mask: Tensor | None, rotation: Rotation, cache: Cache | None, source: Source | None
    ) -> Tensor:
        kept = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        x_BTD = x_BTD + self.self_attn(rms_norm(x_BTD, self.eps), mask, rotation, kept)
        if self.cross_attn is not None:
            x_BTD = x_BTD + self.cross_attn(rms_norm(x_BTD, self.eps), source, cache)
        return x_BTD + self.mlp(rms_norm(x_BTD, self.eps))


class Stack(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: DecLLMConfig, layers: int, causal: bool, reads_source: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, causal, reads_source) for layer in range(layers))

    def run(
        self,
        x_BTD: Tensor,
        mask: Tensor | None,
        positions_BT: Tensor,
        cache: Cache | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """B x T x D -> B x T x D."""
        rotation = rotation_at(positions_BT, self.config, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask, rotation, cache, source)
        return rms_norm(x_BTD, self.config.rms_norm_eps)


class Encoder(Stack):
    """A stack of bidirectional layers over the source."""

    main_input_name = "input_ids"  # `generate` asks for it

    def __init__(self, config: RedLLMConfig) -> None:
        super().__init__(config, config.num_encoder_layers, causal=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=x_BSD, attention_mask=attention_mask)
        return BaseModelOutput(last_hidden_state=self.run(x_BSD, mask, positions_of(attention_mask, x_BSD)))


class LitLLMPreTrainedModel(PreTrainedModel):
    """What both families tell transformers."""

    config_class: type[DecLLMConfig] = DecLLMConfig
    base_model_prefix = ""
    _no_split_modules = ["Layer"]
    _supports_sdpa = True


class DecLLMForCausalLM(LitLLMPreTrainedModel, GenerationMixin):
    """The decoder-only model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecLLMConfig) -> None:
        super().__init__(config)
        self.model = Stack(config, config.num_hidden_layers, causal=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at each of the last `logits_to_keep` tokens, 0 for all; arguments as in Llama."""
        x_BTD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = positions_of(attention_mask, x_BTD, past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        logits = self.lm_head(self.model.run(x_BTD, mask, position_ids, cache)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)


class RedLLMForConditionalGeneration(LitLLMPreTrainedModel, GenerationMixin):
    """The encoder-decoder."""

    config_class = RedLLMConfig
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "decoder.embed_tokens.weight",
        "lm_head.weight": "decoder.embed_tokens.weight",
    }

    def __init__(self, config: RedLLMConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Stack(config, config.num_hidden_layers, causal=True, reads_source=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, *args: Any, **kwargs: Any) -> Encoder:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels, shifted behind the token that starts a target."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)], dim=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Logits of the target's tokens; arguments as in T5."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("decoder_input_ids or labels are needed")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        x_BTD, states_BSD = self.decoder.embed_tokens(decoder_input_ids), encoder_outputs[0]
        if cache is None and labels is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past = 0 if cache is None else cache.get_seq_length()
        positions_BT = positions_of(decoder_attention_mask, x_BTD, past)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x_BTD,
            attention_mask=decoder_attention_mask,
            cache=None if cache is None else cache.self_attention_cache,
        )
        source = self._source(states_BSD, attention_mask, x_BTD, positions_BT)
        logits = self.lm_head(self.decoder.run(x_BTD, mask, positions_BT, cache, source))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, cache=cache, encoder_last_hidden_state=states_BSD)

    def _source(self, states_BSD: Tensor, attention_mask: Tensor | None, x_BTD: Tensor, positions_BT: Tensor) -> Source:
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=x_BTD, attention_mask=attention_mask, encoder_hidden_states=states_BSD
        )
        lengths_B1 = states_BSD.shape[1] if attention_mask is None else attention_mask.sum(-1, keepdim=True)
        config = self.decoder.config
        rotation = rotation_at(positions_of(attention_mask, states_BSD), config, x_BTD.dtype)
        return Source(states_BSD, mask, rotation, rotation_at(positions_BT + lengths_B1, config, x_BTD.dtype))
