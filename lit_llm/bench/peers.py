"""Peers: the same functions, with the same weights, in transformers and in litgpt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_llm.bench.contestants import Contestant, Text, begun
from lit_llm.huggingface.architectures import nearest
from lit_llm.huggingface.export import tensors_of
from lit_llm.huggingface.source_config import build_config
from lit_llm.huggingface.to_config import SpecialTokens
from lit_llm.models.resolved import ResolvedModel
from lit_llm.objectives.config import BOS, EOD

Weights = Mapping[str, Tensor]
"""Our parameters by name."""


class Transformers(Contestant):
    """The model of transformers that computes the same."""

    def __init__(self, model: ResolvedModel, weights: Weights | None = None) -> None:
        import transformers

        architecture, values, differences = nearest(model, SpecialTokens(EOD, BOS))
        if differences:
            raise ValueError(f"{architecture.model} differs: {differences}")
        self.encoder = bool(model.encoder)
        config = build_config(architecture.model_type, values, architecture.ignored_keys)
        self.module: Any = getattr(transformers, architecture.model)(config)
        if weights is not None:
            result = self.module.load_state_dict(tensors_of(architecture, model, weights), strict=False)
            if result.unexpected_keys or {*result.missing_keys} - {*architecture.tied}:
                raise ValueError(f"{architecture.model} has other parameters: {result}")
        self.module.generation_config.eos_token_id = None  # answers have one length

    def _read(self, text: Text) -> dict[str, Tensor]:
        if text.source_BS is None:
            return {"input_ids": text.inputs_BT}
        return {"input_ids": text.source_BS, "decoder_input_ids": text.inputs_BT}

    def logits(self, text: Text) -> Tensor:
        logits: Tensor = self.module(**self._read(text), use_cache=False).logits
        return logits

    def loss(self, text: Text) -> Tensor:
        # A decoder-only model would shift the labels by itself; an encoder-decoder never does.
        shifted = {} if self.encoder else {"shift_labels": text.targets_BT}
        loss: Tensor = self.module(**self._read(text), labels=text.targets_BT, use_cache=False, **shifted).loss
        return loss

    def prefill(self, prompts_BP: Tensor) -> object:
        if self.encoder:
            begins_B1 = torch.full_like(prompts_BP[:, :1], BOS)
            return self.module(input_ids=prompts_BP, decoder_input_ids=begins_B1, use_cache=True)
        return self.module(input_ids=begun(prompts_BP), use_cache=True, logits_to_keep=1)

    def generate(self, prompts_BP: Tensor, tokens: int) -> Tensor:
        read_BP = prompts_BP if self.encoder else begun(prompts_BP)
        answers: Tensor = self.module.generate(
            read_BP, attention_mask=torch.ones_like(read_BP), max_new_tokens=tokens, do_sample=False
        )
        return answers[:, -tokens:]


class LitGPT(Contestant):
    """litgpt's GPT as a Llama, with embeddings tied as its pretraining ties them."""

    def __init__(self, model: ResolvedModel, weights: Weights | None = None) -> None:
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

        architecture, values, differences = nearest(model, SpecialTokens(EOD, BOS))
        if differences or architecture.model_type != "llama":
            raise ValueError(f"litgpt has no {architecture.model_type} with {differences}")
        config = Config(
            n_layer=values["num_hidden_layers"],
            n_embd=values["hidden_size"],
            n_head=values["num_attention_heads"],
            n_query_groups=values["num_key_value_heads"],
            head_size=values["head_dim"],
            intermediate_size=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            padded_vocab_size=values["vocab_size"],
            norm_class_name="RMSNorm",
            norm_eps=values["rms_norm_eps"],
            rotary_percentage=1.0,
            rope_base=round(values["rope_parameters"]["rope_theta"]),
            parallel_residual=False,
            bias=False,
            mlp_class_name="LLaMAMLP",
        )
        self.module: Any = GPT(config)
        if weights is not None:
            converted: dict[str, Tensor] = {}
            copy_weights_hf_llama(config, {}, converted, tensors_of(architecture, model, weights))
            self.module.load_state_dict(converted)
        self.module.transformer.wte.weight = self.module.lm_head.weight

    def logits(self, text: Text) -> Tensor:
        logits: Tensor = self.module(text.inputs_BT)
        return logits

    def loss(self, text: Text) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        loss: Tensor = chunked_cross_entropy(self.module(text.inputs_BT), text.targets_BT)
        return loss

    def prefill(self, prompts_BP: Tensor) -> object:
        return self._read_prompts(begun(prompts_BP), prompts_BP.shape[1] + 2)

    def generate(self, prompts_BP: Tensor, tokens: int) -> Tensor:
        """The loop of `litgpt.generate`, whose own function takes one prompt."""
        begun_BT = begun(prompts_BP)
        length = begun_BT.shape[1]
        logits_BV = self._read_prompts(begun_BT, length + tokens)
        chosen_BA = [logits_BV.argmax(dim=-1, keepdim=True)]
        for place in range(length, length + tokens - 1):
            position = torch.tensor([place], device=begun_BT.device)
            logits_BV = self.module(chosen_BA[-1], position, input_pos_maxp1=place + 1)[:, -1]
            chosen_BA.append(logits_BV.argmax(dim=-1, keepdim=True))
        return torch.cat(chosen_BA, dim=1)

    def _read_prompts(self, begun_BT: Tensor, capacity: int) -> Tensor:
        """B x V logits after the prompts, with a new cache for that many tokens."""
        (rows, length), weight = begun_BT.shape, self.module.lm_head.weight
        self.module.clear_kv_cache()
        self.module.max_seq_length = capacity
        self.module.set_kv_cache(rows, device=weight.device, dtype=weight.dtype)
        positions = torch.arange(length, device=weight.device)
        logits_BV: Tensor = self.module(begun_BT, positions, input_pos_maxp1=length)[:, -1]
        return logits_BV
