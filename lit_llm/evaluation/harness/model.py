"""The model that answers the harness's requests."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.tokenizers import Tokenizer
from lit_llm.evaluation.harness.scores import Pair, score_pairs
from lit_llm.evaluation.task_names import NOT_INSTALLED
from lit_llm.generation import Sampling, generate
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.config import BOS, EOD, MasksConfig

NEW_TOKENS = 256
"""Most tokens of an answer where a task does not set them; the harness's default."""
_FIRST_TOKENS = 16
"""Tokens that are generated before the first check whether an answer has ended."""


def harness_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    masks: MasksConfig = MasksConfig(),
    batch_tokens: int = 16_384,
) -> Any:
    """The model as a `lm_eval.api.model.TemplateLM`, which the harness's functions take."""
    check_installed()
    assert not model.training, "a model in training mode would be scored with its dropout"
    return _model_class()(model, tokenizer, max_length, masks, batch_tokens)


def check_installed() -> None:
    """Raise InputError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(Problem(NOT_INSTALLED, "tasks"))


class HarnessModel:
    """Answers the harness's requests with log-likelihoods and texts, in their order."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, max_length: int, masks: MasksConfig, batch_tokens: int
    ) -> None:
        super().__init__()
        self.model, self.ids, self.masks = model, tokenizer, masks
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.truncated: set[str] = set()
        """Contexts that lost their beginning."""
        self.apart: set[tuple[str, str]] = set()
        """Pairs (context, answer) that would merge into one token, so they are tokenised separately."""
        self.without_tokens: set[tuple[str, str]] = set()
        """Pairs (context, answer) whose answer has no token: an end of document stands for it."""
        self.lost: dict[str, int] = {}
        """{text: number of its bytes that the tokenizer has lost}."""
        self._device = next(model.parameters()).device
        self._encode = functools.lru_cache(maxsize=4096)(lambda text: tokenizer.encode([text])[0].tolist())

    @property
    def eot_token_id(self) -> int:
        return EOD

    @property
    def prefix_token_id(self) -> int:
        return BOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self._encode(string))  # `collate` adds <s>

    def check(self, request: Any) -> None:
        """Raise an error for a request whose text cannot be read, before any request is scored."""
        for argument in request.args[: 1 if request.request_type == "generate_until" else None]:
            if not isinstance(argument, str):
                raise TypeError(f"its text is {json.dumps(argument, default=str)[:40]}")
        if request.request_type == "loglikelihood_rolling" and not request.args[0]:
            raise ValueError("its text is empty")
        self.tok_encode(request.args[0])
        if request.request_type == "loglikelihood":
            self.tok_encode("".join(request.args[:2]))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = []
        counts = []
        for (text, answer), context, continuation in requests:
            context = context[1:] if context[:1] == [BOS] else context  # <s> alone: no context
            if not continuation:
                self.without_tokens.add((text, answer))
                continuation = [EOD]
            before = len(pairs)
            if len(continuation) > self.max_length:
                self.truncated.add(text)
                pairs += self._windows(continuation)
            else:
                pairs.append((self._truncate(text, context, len(continuation)), continuation))
            counts.append(len(pairs) - before)
        scores = iter(score_pairs(self.model, pairs, self.masks, self.batch_tokens))
        answers = []
        for count in counts:
            nats, greedy = zip(*(next(scores) for _ in range(count)), strict=True)
            answers.append((sum(nats), all(greedy)))
        return answers

    def _windows(self, ids: list[int]) -> Iterator[Pair]:
        """Parts of a long text; the context of each but the first is the token before it."""
        yield [], ids[: self.max_length]
        for start in range(self.max_length, len(ids), self.max_length - 1):
            yield [ids[start - 1]], ids[start : start + self.max_length - 1]

    def _truncate(self, text: str, context: list[int], room: int) -> list[int]:
        """The end of the context that leaves `room` tokens."""
        over = len(context) + room - self.max_length
        if over > 0:
            self.truncated.add(text)
        return context[max(0, over) :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows."""
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            text = request.args[0]
            ids, before = self.tok_encode(text), len(pairs)
            if lost := self.ids.lost_bytes(text, np.array(ids, dtype=np.int64)):
                self.lost[text] = lost
            pairs += self._windows(ids) if ids else []
            counts.append(len(pairs) - before)
        scores = iter(score_pairs(self.model, pairs, self.masks, self.batch_tokens))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Text generated after each context, until one of the request's stop strings or an end of document."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for options, numbers in alike.items():
            written = self._generate([requests[number].args[0] for number in numbers], json.loads(options))
            for number, text in zip(numbers, written, strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: list[str], options: Mapping[str, Any]) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        # At most half of the length, which leaves room for context.
        most = max(1, min(int(options.get("max_gen_toks", NEW_TOKENS)), self.max_length // 2))
        prompts = [self._truncate(text, self.tok_encode(text), most) for text in contexts]
        sampling = replace(_sampling(options), vocabulary=self.ids.vocabulary)
        decoder = not self.model.config.source_apart
        texts = [""] * len(prompts)
        todo = list(range(len(prompts)))
        # Generation cannot stop at strings. Most answers are short: unfinished ones are generated anew, but longer.
        # Sampled answers are generated once, since a draw depends on the prompt's place among all.
        length = most if sampling.temperature else min(most, _FIRST_TOKENS)
        while todo:
            generated = generate(
                self.model,
                [prompts[number] for number in todo],
                max_new_tokens=length,
                stop=(EOD,),
                sampling=sampling,
                prefix=self.masks.prefix if decoder else "causal",
                batch_size=max(1, self.batch_tokens // self.max_length),
            )
            going = []
            for number, answer in zip(todo, generated, strict=True):
                whole = texts[number] = self.ids.decode(answer.tokens)
                for end in filter(None, until):  # one after the other, as in the harness's models
                    texts[number] = texts[number].split(end)[0]
                if texts[number] == whole and not answer.stopped and length < most:
                    going.append(number)
            todo, length = going, min(most, 4 * length)
        return texts


@functools.cache
def _model_class() -> type[Any]:
    """The harness's model class; made here since the library is optional."""
    from lm_eval.api.model import TemplateLM

    class Model(HarnessModel, TemplateLM):  # type: ignore[misc, unused-ignore]
        """Tokenises requests in the way of the harness's model for transformers."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            tokenised = []
            for context, answer in (request.args for request in requests):
                pair = self._encode_pair(context, answer) if context else ([], self.tok_encode(answer))
                tokenised.append(((context, answer), *pair))
            return self._loglikelihood_tokens(tokenised)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """Tokens of context and continuation, cut where the context's tokens end. Where the continuation would have
            none, both are tokenised separately, as the harness does for encoder-decoders."""
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            words = context.rstrip()  # spaces before an answer belong to it, as in the harness
            if not pair[1] and (apart := self.tok_encode(context[len(words) :] + continuation)):
                self.apart.add((context, continuation))
                return self.tok_encode(words), apart
            return pair

    return Model


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Sampling options of a task, greedy by default; the harness uses the names of transformers."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(temperature or 1.0, top_k=options.get("top_k") or None, top_p=float(options.get("top_p") or 1.0))
