"""Generate continuations of prompts, in token ids."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_llm.generation.decoding import Decoding, Prefix, prefill
from lit_llm.generation.sampling import Sampling, choose
from lit_llm.models.families import LanguageModel
from lit_llm.models.positions import prompt_beyond_table


@dataclass
class Generated:
    """Continuation of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Token ids, without the stop token."""
    log_probabilities: list[float] = field(default_factory=list)
    """Log-probability of each token in nats under the model, before temperature, top_k and top_p."""
    stopped: bool = False
    """Whether a stop token ended it; otherwise max_new_tokens did."""


class NewToken(NamedTuple):
    """A token that was chosen, or the end of a continuation."""

    prompt: int
    """Index of the prompt."""
    token: int | None
    """Token id; None: a stop token, which ends the continuation."""
    log_probability: float
    """Log-probability in nats, as in `Generated`."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (0,),
    sampling: Sampling = Sampling(),
    prefix: Prefix = "causal",
    batch_size: int = 16,
    begin: int = 1,
    end: int = 0,
) -> list[Generated]:
    """Continue each prompt until a stop token or `max_new_tokens`.

    The model computes in the dtype and on the device of its weights, in evaluation mode and without gradients. Batch
    size and other prompts change a prompt's logits only by rounding, since a matrix product rounds differently by its
    shape; in bfloat16 that may change tokens.

    Args:
        model: A model of any family that generates.
        prompts: Token ids of each prompt. A decoder-only model reads `begin` and the prompt. An encoder-decoder has the
            prompt as its source and starts from `begin`.
        max_new_tokens: Most tokens after each prompt.
        stop: Tokens that end a continuation.
        sampling: Temperature, top-k, top-p and seed; greedy by default.
        prefix: `"bidirectional"` opens the attention mask over a decoder-only model's prompt.
        batch_size: Most prompts in one batch. A continuation that has ended makes room for the next prompt.
        begin: Token before everything that a decoder reads.
        end: Token that stands for an empty source.

    Returns:
        One result for each prompt, in their order.

    Raises:
        ValueError: An argument is impossible.
        FloatingPointError: The logits are not finite.
    """
    results = [Generated() for _ in prompts]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "sampling": sampling, "prefix": prefix}
    for new in stream(model, prompts, **options, batch_size=batch_size, begin=begin, end=end):
        if new.token is None:
            results[new.prompt].stopped = True
        else:
            results[new.prompt].tokens.append(new.token)
            results[new.prompt].log_probabilities.append(new.log_probability)
    return results


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (0,),
    sampling: Sampling = Sampling(),
    prefix: Prefix = "causal",
    batch_size: int = 16,
    begin: int = 1,
    end: int = 0,
) -> Iterator[NewToken]:
    """Yield the tokens of `generate` one by one, as they are chosen, of `batch_size` prompts in turn.

    Arguments and errors are those of `generate`.
    """
    _check(model, prompts, max_new_tokens, stop, prefix, batch_size, begin, end)
    # The longest first: a lack of memory shows at once, and the caches have room for those that follow.
    waiting = deque(sorted(range(len(prompts)), key=lambda index: -len(prompts[index])))

    def begun(count: int) -> tuple[list[_Row], Decoding]:
        """The next prompts, read."""
        rows = [_Row(waiting.popleft()) for _ in range(min(count, len(waiting)))]
        texts = [prompts[row.prompt] for row in rows]
        return rows, prefill(model, texts, prefix=prefix, begin=begin, end=end, max_new_tokens=max_new_tokens)

    with _evaluating(model):
        while waiting:
            rows, decoding = begun(batch_size)
            while rows:
                tokens_B, chosen = _choose(decoding.logits_BV, sampling, rows)
                for row, (token, nats) in zip(rows, chosen, strict=True):
                    row.tokens += 1
                    row.ended = token in stop or row.tokens == max_new_tokens
                    yield NewToken(row.prompt, None if token in stop else token, nats)
                going = [place for place, row in enumerate(rows) if not row.ended]
                if not going:
                    break
                if len(going) < len(rows) and not waiting:
                    decoding.keep(going)
                    rows, tokens_B = [rows[place] for place in going], tokens_B[going]
                decoding.step(tokens_B)
                # A row that has ended is read once more, since that is cheaper than to move the others together.
                if ended := [place for place, row in enumerate(rows) if row.ended]:
                    new_rows, new = begun(len(ended))
                    ended, left = ended[: len(new_rows)], ended[len(new_rows) :]
                    decoding.replace(ended, new)
                    for place, row in zip(ended, new_rows, strict=True):
                        rows[place] = row
                    if left:
                        going = [place for place in range(len(rows)) if place not in left]
                        decoding.keep(going)
                        rows = [rows[place] for place in going]


@dataclass
class _Row:
    """A row of the batch that is decoded."""

    prompt: int
    """Index of its prompt."""
    tokens: int = 0
    """Number of tokens that were chosen for it, the stop token included."""
    ended: bool = False


@torch.inference_mode()
def _choose(logits_BV: Tensor, sampling: Sampling, rows: Sequence[_Row]) -> tuple[Tensor, list[tuple[int, float]]]:
    """(B ids, the same as numbers with their log-probabilities)."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    tokens_B = choose(logits_BV, sampling, [(row.prompt, row.tokens) for row in rows])
    nats_B = logits_BV.log_softmax(dim=-1).gather(-1, tokens_B[:, None])[:, 0]
    chosen = list(zip(tokens_B.tolist(), nats_B.tolist(), strict=True))
    for row, (_, nats) in zip(rows, chosen, strict=True):
        if not math.isfinite(nats):
            raise FloatingPointError(
                f"the logits of token {row.tokens} after prompt {row.prompt} are not finite; "
                "the model has diverged, or its precision does not suffice"
            )
    return tokens_B, chosen


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Put every module in evaluation mode, and back into its earlier mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int],
    prefix: str,
    batch_size: int,
    begin: int,
    end: int,
) -> None:
    vocabulary = model.config.vocabulary
    longest = max(map(len, prompts), default=0)
    if prompts and (problem := prompt_beyond_table(model.config, longest, max_new_tokens)):
        raise ValueError(f"max_new_tokens: {problem}")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name}: {number} is too few; at least 1")
    if prefix not in ("causal", "bidirectional"):
        raise ValueError(f"prefix: {prefix!r} is unknown; causal or bidirectional")
    if prefix == "bidirectional" and model.config.source_apart:
        raise ValueError("prefix: bidirectional changes nothing here: an encoder sees all of its source anyway")
    if prefix == "bidirectional" and (reason := model.config.causal_only):
        raise ValueError(f"prefix: bidirectional: {reason}, and no prefix can be opened to it")
    named = [*((f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)), ("stop", stop)]
    for name, ids in (*named, ("begin", [begin]), ("end", [end])):
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"{name}: {wrong[0]} is not a token; the model's vocabulary is 0 to {vocabulary - 1}")
