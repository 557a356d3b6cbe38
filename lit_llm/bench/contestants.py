"""What is measured: a model, how it is trained on a text, and how it answers prompts."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lit_llm.components.loss.module import target_loss
from lit_llm.generation import generate, prefill
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.config import BOS
from lit_llm.training.compiled_blocks import compile_blocks


class Text(NamedTuple):
    """A batch of random tokens."""

    source_BS: Tensor | None
    """What an encoder reads; None for a decoder-only model."""
    inputs_BT: Tensor
    targets_BT: Tensor

    def to(self, device: str) -> Text:
        return Text(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Contestant(ABC):
    """One implementation of a model."""

    module: Any
    """Its `nn.Module`."""

    def compiled(self) -> Self:
        """The same model under torch.compile, as its own training compiles it."""
        other = copy.copy(self)
        other.module = torch.compile(self.module)
        return other

    @abstractmethod
    def logits(self, text: Text) -> Tensor:
        """B x T x V logits of the targets."""

    @abstractmethod
    def loss(self, text: Text) -> Tensor:
        """Mean loss over the targets, as its own training computes it, those of further tokens added."""

    @abstractmethod
    def prefill(self, prompts_BP: Tensor) -> object:
        """Read the prompts and compute the logits of the first answered token, with a cache for the next ones."""

    @abstractmethod
    def generate(self, prompts_BP: Tensor, tokens: int) -> Tensor:
        """Answer each prompt with that many tokens, greedily: B x tokens."""


class Ours(Contestant):
    """A model of ours."""

    def __init__(self, module: LanguageModel) -> None:
        self.module: LanguageModel = module

    def compiled(self) -> Self:
        """The same model with compiled blocks, as `training.execution.kernels: compiled` trains it."""
        other = copy.deepcopy(self)
        compile_blocks(other.module, lengths_vary=False)
        return other

    def _hidden(self, text: Text) -> Tensor:
        read = (text.inputs_BT,) if text.source_BS is None else (text.source_BS, text.inputs_BT)
        return self.module.hidden(*read)

    def logits(self, text: Text) -> Tensor:
        return self.module.logits(self._hidden(text))

    def loss(self, text: Text) -> Tensor:
        targets_BT, hidden_BTD = text.targets_BT, self._hidden(text)
        places_BT = torch.arange(targets_BT.numel(), device=targets_BT.device).view_as(targets_BT)
        losses = target_loss(hidden_BTD, self.module.unembedding, (targets_BT, places_BT.flatten()))
        objective = losses.objective
        for number, states_BTD in enumerate(self.module.decoder.take_future_states()):
            # A row's last positions have no target so far ahead.
            further = targets_BT.roll(-number - 1, 1), places_BT[:, : -number - 1].flatten()
            objective = objective + target_loss(states_BTD, self.module.unembedding, further).objective
        return objective / targets_BT.numel()

    def prefill(self, prompts_BP: Tensor) -> object:
        return prefill(self.module, prompts_BP.tolist())

    def generate(self, prompts_BP: Tensor, tokens: int) -> Tensor:
        prompts = prompts_BP.tolist()
        answers = generate(self.module, prompts, max_new_tokens=tokens, stop=(), batch_size=len(prompts))
        return torch.tensor([answer.tokens for answer in answers])


def begun(prompts_BP: Tensor) -> Tensor:
    """The prompts after the token that our decoders begin with."""
    return torch.cat([torch.full_like(prompts_BP[:, :1], BOS), prompts_BP], dim=1)
