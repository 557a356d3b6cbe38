"""Generate continuations of prompts, in token ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lit_llm.generation.decoding import Prefix, prefill
from lit_llm.generation.sampling import Sampling, choose
from lit_llm.models.families import LanguageModel


@dataclass
class Generated:
    """Continuation of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Token ids, without the stop token."""
    log_probabilities: list[float] = field(default_factory=list)
    """Log-probability of each token in nats under the model, before temperature, top_k and top_p."""
    stopped: bool = False
    """Whether a stop token ended it; otherwise max_new_tokens did."""


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
        batch_size: Most prompts in one batch; prompts of similar length share one.
        begin: Token before everything that a decoder reads.
        end: Token that stands for an empty source.

    Returns:
        One result for each prompt, in their order.

    Raises:
        ValueError: An argument is impossible.
        FloatingPointError: The logits are not finite.
    """
    _check(model, prompts, max_new_tokens, stop, prefix, batch_size, begin, end)
    results = [Generated() for _ in prompts]
    # The longest first: a lack of memory shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with torch.inference_mode(), _evaluating(model):
        for start in range(0, len(order), batch_size):
            running = order[start : start + batch_size]
            decoding = prefill(model, [prompts[index] for index in running], prefix=prefix, begin=begin, end=end)
            for step in range(max_new_tokens):
                logits_BV = decoding.logits_BV.to(torch.promote_types(decoding.logits_BV.dtype, torch.float32))
                tokens_B = choose(logits_BV, sampling, running, step)
                nats_B = logits_BV.log_softmax(dim=-1).gather(-1, tokens_B[:, None])[:, 0]
                going = []
                for row, (token, nats) in enumerate(zip(tokens_B.tolist(), nats_B.tolist(), strict=True)):
                    result = results[running[row]]
                    if not math.isfinite(nats):
                        raise FloatingPointError(
                            f"the logits of token {step} after prompt {running[row]} are not finite; "
                            "the model has diverged, or its precision does not suffice"
                        )
                    if token in stop:
                        result.stopped = True
                        continue
                    result.tokens.append(token)
                    result.log_probabilities.append(nats)
                    going.append(row)
                if not going or step + 1 == max_new_tokens:
                    break
                if len(going) < len(running):
                    decoding.keep(going)
                    running, tokens_B = [running[row] for row in going], tokens_B[going]
                decoding.step(tokens_B)
    return results


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
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name}: {number} is too few; at least 1")
    if prefix not in ("causal", "bidirectional"):
        raise ValueError(f"prefix: {prefix!r} is unknown; causal or bidirectional")
    if prefix == "bidirectional" and model.config.encoder:
        raise ValueError("prefix: bidirectional changes nothing here: an encoder sees all of its source anyway")
    if prefix == "bidirectional" and (reason := model.config.causal_only):
        raise ValueError(f"prefix: bidirectional: {reason}, and no prefix can be opened to it")
    named = [*((f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)), ("stop", stop)]
    for name, ids in (*named, ("begin", [begin]), ("end", [end])):
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"{name}: {wrong[0]} is not a token; the model's vocabulary is 0 to {vocabulary - 1}")
