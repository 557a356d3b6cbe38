"""EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on models of every family.

Its tasks ask for the log-probability of a continuation after a context, for that of a whole text, or for what the model
writes after a context. A decoder-only model reads <s>, the context and the continuation; an encoder-decoder has the
context as its source and the continuation as its target. The tokens are the same for both: context and continuation are
tokenised together and cut where the context's own tokens end, as the harness does for decoder-only models.

Nothing here is loaded without the library: pip install 'lit-llm[eval]'.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss.config import chunk_rows
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.tokenizers import Tokenizer
from lit_llm.evaluation.result import EvaluationResult
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.evaluation.task_names import NOT_INSTALLED, asked_of, no_task
from lit_llm.generation import Sampling, generate
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import BOS, EOD, MasksConfig

NEW_TOKENS = 256
"""Tokens that are written where a task does not say how many, as the harness has it."""
_FIRST_TOKENS = 16
"""Tokens after which it is looked whether an answer has ended."""

Pair = tuple[Sequence[int], Sequence[int]]
"""The ids of a context, and of a continuation of at least one token."""


def evaluate_tasks(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    max_length: int,
    shots: int | Mapping[str, int] | None = None,
    masks: MasksConfig = MasksConfig(),
    limit: int | None = None,
    include_path: Path | None = None,
    batch_tokens: int = 16_384,
    seed: int = 1234,
) -> EvaluationResult:
    """Run tasks of the harness on a model in evaluation mode.

    tasks         names of tasks, groups and tags of the harness, of those in `include_path`, and of SUITES
    max_length    tokens of context and continuation together, of windows of a long text, and of a prompt with what is
                  written after it, for every family. A longer context loses its beginning, and is counted.
    shots         worked examples before each question: for all, or by name of `tasks`. By default a suite's, or the
                  task's own. As in the harness, a task that sets 0 itself keeps it.
    limit         questions of each task; its first ones
    include_path  a folder of task files. Where it has all that are asked for, the harness's own are not looked through.
    batch_tokens  tokens of a batch, padding included. The scores do not depend on it.
    seed          draws the shots

    Metrics are `tasks/<task>/<metric>`, with `/<filter>` after it where a task has several ways to read an answer,
    `tasks/<task>/questions`, and `tasks/<task>/truncated`: questions whose context lost something. Where there are any:
    `tokenised_apart` counts answers that merge with their context into one token, `without_tokens` answers of no token
    (an end of document stands for them), `lost_bytes` what the tokenizer loses of whole texts, whose perplexities are
    then left out. A row is a question with what the model answered, under one filter.

    `unreadable` counts documents that cannot be asked or scored: without a text or choices, with a text that the
    tokenizer refuses. They are left out of all other metrics. Their rows have the reason under `unreadable`.

    Raises InputError for a task that is not known, one whose data cannot be reached, one whose documents are all
    unreadable, and a suite whose task it is not.
    """
    _check_installed()
    if max_length < 2:
        raise InputError(Problem(f"{max_length} has no room for a context and an answer; at least 2", "max_length"))
    from lm_eval.evaluator import evaluate

    asked = asked_of(tasks, shots)
    if include_path is not None:
        read_task_files(include_path)  # refuses what would run
    with _quiet(), _sandboxed():
        loaded = _loaded(asked, include_path, seed)
        harness = harness_model(model, tokenizer, max_length=max_length, masks=masks, batch_tokens=batch_tokens)
        guards = {name: _Guard(name, task, harness) for name, task in loaded["tasks"].items()}
        results = evaluate(harness, loaded, limit=limit, bootstrap_iters=0)
    return _found(results, harness, {name: guard.unreadable for name, guard in guards.items()})


def harness_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    masks: MasksConfig = MasksConfig(),
    batch_tokens: int = 16_384,
) -> Any:
    """The model as the harness wants it, a `lm_eval.api.model.TemplateLM`, for its own functions too."""
    _check_installed()
    assert not model.training, "a model in training mode would be scored with its dropout"
    return _model_class()(model, tokenizer, max_length, masks, batch_tokens)


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(Problem(NOT_INSTALLED, "tasks"))


# --- scores --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def score_pairs(
    model: LanguageModel, pairs: Sequence[Pair], masks: MasksConfig, batch_tokens: int
) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether each of its tokens is the most probable one) of every pair's continuation.

    Pairs that differ in the last token alone, as one-letter answers do, are read once.
    """
    readings: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        readings[tuple(context), tuple(continuation[:-1])].append(number)
    rows, device, family = list(readings), next(model.parameters()).device, model.config.family
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for chosen in _batches([(len(context), len(read) + 1) for context, read in rows], family, batch_tokens):
        sources = [np.array(rows[row][0], dtype=np.int64) for row in chosen]
        targets = [np.array([*rows[row][1], EOD], dtype=np.int64) for row in chosen]  # the last one is not read
        batch = collate(sources, targets, family, masks).to(device)
        hidden_ND = model.hidden(**batch.inputs).flatten(0, 1)
        numbers: list[int] = []
        places: list[int] = []
        tokens: list[Sequence[int]] = []
        for index, row in enumerate(chosen):
            start = index * batch.targets.shape[1] + (0 if family == "encoder_decoder" else len(sources[index]))
            for number in readings[rows[row]]:
                numbers.append(number)
                tokens.append(pairs[number][1])
                places.extend(range(start, start + len(tokens[-1])))
        nats, greedy = _answers(hidden_ND, model.unembedding, places, [token for own in tokens for token in own])
        cuts = np.cumsum([len(own) for own in tokens])[:-1]
        for number, own_nats, own_greedy in zip(numbers, np.split(nats, cuts), np.split(greedy, cuts), strict=True):
            found[number] = (-float(own_nats.sum()), bool(own_greedy.all()))
    return found


def _answers(
    hidden_ND: Tensor, unembedding: Unembedding, places: Sequence[int], tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(nats in float64, whether it is the most probable) of a token at each of these places."""
    hidden_ND = hidden_ND[torch.tensor(places, device=hidden_ND.device)]
    tokens_N = torch.tensor(tokens, device=hidden_ND.device)
    nats, greedy = [], []
    size = chunk_rows(unembedding.vocabulary)  # so that the logits of a large vocabulary fit
    for hidden, token in zip(hidden_ND.split(size), tokens_N.split(size), strict=True):
        logits = unembedding(hidden).float()
        nats.append(F.cross_entropy(logits, token, reduction="none"))
        greedy.append(logits.argmax(-1) == token)
    return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def _batches(lengths: Sequence[tuple[int, int]], family: str, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of (source, target) tokens that are read together: of about one length, the longest first."""
    apart = family == "encoder_decoder"  # sources and targets are padded by themselves

    def key(number: int) -> tuple[int, ...]:
        source, target = lengths[number]
        return (-source, -target) if apart else (-source - target,)

    batch: list[int] = []
    width: tuple[int, ...] = ()
    for number in sorted(range(len(lengths)), key=key):
        own = lengths[number] if apart else (sum(lengths[number]),)
        wider = tuple(map(max, width, own)) if batch else own
        if batch and sum(wider) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], own
        batch.append(number)
        width = wider
    if batch:
        yield batch


# --- the harness's model -------------------------------------------------------------------------------------------


class _Answering:
    """What the harness calls: log-likelihoods and texts, in the order of its requests."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, max_length: int, masks: MasksConfig, batch_tokens: int
    ) -> None:
        super().__init__()
        self.model, self.ids, self.masks = model, tokenizer, masks
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self.truncated: set[str] = set()
        """Contexts that lost their beginning."""
        self.apart: set[tuple[str, str]] = set()
        """(context, answer) whose answer merges with its context into one token: they are tokenised apart."""
        self.without_tokens: set[tuple[str, str]] = set()
        """(context, answer) whose answer has no token: an end of document stands for it."""
        self.lost: dict[str, int] = {}
        """Texts of which the tokenizer has lost bytes, and how many."""
        self._device = next(model.parameters()).device
        self._encode = functools.lru_cache(maxsize=4096)(lambda text: tokenizer.encode([text])[0].tolist())

    @property
    def eot_token_id(self) -> int:
        return EOD

    @property
    def prefix_token_id(self) -> int:
        return BOS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self._encode(string))  # the layout puts <s> where it belongs

    def check(self, request: Any) -> None:
        """Raise what reading a request's text raises, before any request is scored."""
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
            context = context[1:] if context[:1] == [BOS] else context  # the harness's way to say: no context
            if not continuation:
                self.without_tokens.add((text, answer))
                continuation = [EOD]
            before = len(pairs)
            if len(continuation) > self.max_length:
                self.truncated.add(text)
                pairs += self._windows(continuation)
            else:
                pairs.append((self._fitting(text, context, len(continuation)), continuation))
            counts.append(len(pairs) - before)
        scores = iter(score_pairs(self.model, pairs, self.masks, self.batch_tokens))
        found = []
        for count in counts:
            nats, greedy = zip(*(next(scores) for _ in range(count)), strict=True)
            found.append((sum(nats), all(greedy)))
        return found

    def _windows(self, ids: list[int]) -> Iterator[Pair]:
        """A long text in parts; before each but the first stands the token that goes before it."""
        yield [], ids[: self.max_length]
        for start in range(self.max_length, len(ids), self.max_length - 1):
            yield [ids[start - 1]], ids[start : start + self.max_length - 1]

    def _fitting(self, text: str, context: list[int], room: int) -> list[int]:
        """The end of the context that leaves `room` tokens."""
        over = len(context) + room - self.max_length
        if over > 0:
            self.truncated.add(text)
        return context[max(0, over) :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows."""
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
        """What is written after each context, until one of the request's strings or an end of document."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        found = [""] * len(requests)
        for options, numbers in alike.items():
            written = self._written([requests[number].args[0] for number in numbers], json.loads(options))
            for number, text in zip(numbers, written, strict=True):
                found[number] = text
        return found

    def _written(self, contexts: list[str], options: Mapping[str, Any]) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        # Half of the length at most, so that some of the context is left.
        most = max(1, min(int(options.get("max_gen_toks", NEW_TOKENS)), self.max_length // 2))
        prompts = [self._fitting(text, self.tok_encode(text), most) for text in contexts]
        sampling = replace(_sampling(options), vocabulary=self.ids.vocabulary)
        decoder = not self.model.config.encoder
        found = [""] * len(prompts)
        todo = list(range(len(prompts)))
        # Generation knows no strings. Most answers are short: what has not ended is written anew, at more length.
        # Drawn answers are not, for what is drawn depends on a prompt's place among all.
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
                whole = found[number] = self.ids.decode(answer.tokens)
                for end in filter(None, until):  # one after the other, as the harness's own models do
                    found[number] = found[number].split(end)[0]
                if found[number] == whole and not answer.stopped and length < most:
                    going.append(number)
            todo, length = going, min(most, 4 * length)
        return found


@functools.cache
def _model_class() -> type[Any]:
    """The class is made where the library is there."""
    from lm_eval.api.model import TemplateLM

    class Model(_Answering, TemplateLM):  # type: ignore[misc, unused-ignore]
        """Its requests in text become requests in tokens as the harness's model for transformers makes them."""

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            asked = []
            for context, answer in (request.args for request in requests):
                pair = self._encode_pair(context, answer) if context else ([], self.tok_encode(answer))
                asked.append(((context, answer), *pair))
            return self._loglikelihood_tokens(asked)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """Cut where the context's own tokens end. Where that leaves the answer none, the parts are tokenised apart,
            as the harness does for encoder-decoders."""
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            words = context.rstrip()  # spaces before an answer belong to it, as in the harness
            if not pair[1] and (apart := self.tok_encode(context[len(words) :] + continuation)):
                self.apart.add((context, continuation))
                return self.tok_encode(words), apart
            return pair

    return Model


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """Greedy unless a task asks for more: the harness's names for it are those of transformers."""
    temperature = float(options.get("temperature") or 0.0)
    if not options.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(temperature or 1.0, top_k=options.get("top_k") or None, top_p=float(options.get("top_p") or 1.0))


# --- tasks ---------------------------------------------------------------------------------------------------------


def _loaded(asked: Mapping[str, int | None], include_path: Path | None, seed: int) -> dict[str, Any]:
    """Tasks and groups as the harness wants them."""
    from lm_eval.tasks import TaskManager

    own = {"include_path": str(include_path)} if include_path else {}
    manager = TaskManager(include_defaults=False, **own)
    if not set(asked) <= set(manager.all_tasks):
        manager = TaskManager(**own)  # takes some seconds
    wrong = [Problem(no_task(name, manager.all_tasks), "tasks") for name in asked if name not in manager.all_tasks]
    if wrong:
        raise InputError(*wrong)
    whole: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    problems = []
    for name, shots in asked.items():
        try:
            part = manager.load(name)
        except Exception as error:  # of the network, of the Hub, of `datasets`, of the task's own code
            problems.append(_not_loaded(name, error))
            continue
        for task in part["tasks"].values():
            problems += _set_shots(task, shots, seed)
        for key, found in whole.items():
            found.update(part[key])
    if problems:
        raise InputError(*problems)
    return whole


def _not_loaded(name: str, error: Exception) -> Problem:
    what = "its data cannot be reached" if isinstance(error, OSError) else "the harness cannot load it"
    return Problem(f"{name!r}: {what} ({_reason(error)})", "tasks")


def _set_shots(task: Any, shots: int | None, seed: int) -> list[Problem]:
    own = task.get_config("num_fewshot")
    if shots is None or own == 0:
        shots = own or 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    pool = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if shots > pool:
        return [Problem(f"{task.task_name!r} has {pool} examples to draw {shots} shots from", "shots")]
    return []


class _Guard:
    """Leaves out the documents of a task that cannot be asked or scored, which the harness ends in a traceback.

    It takes the place of those methods of the task that read a document.
    """

    def __init__(self, name: str, task: Any, harness: _Answering) -> None:
        self.unreadable: dict[int, str] = {}
        """{number of a document in its task: why it is left out}."""
        self._name, self._task, self._harness = name, task, harness
        self._failed: Exception | None = None
        """What the context of the document that is being read has raised."""
        self._number, self._scored, self._built = 0, 0, False
        """The document that is read, how many have a score under this filter, and whether the requests are made."""
        self._original = {
            method: getattr(task, method)
            for method in (
                "build_all_requests",
                "doc_iterator",
                "doc_to_prefix",
                "fewshot_context",
                "construct_requests",
                "process_results",
            )
        }
        for method in self._original:
            setattr(task, method, getattr(self, method))

    def build_all_requests(self, **options: Any) -> None:
        try:
            self._original["build_all_requests"](**options)
        except ValueError:
            if self._task.instances:
                raise
            raise self._nothing() from None
        self._built = True

    def doc_iterator(self, **options: Any) -> Iterator[tuple[int, Any]]:
        self._scored = 0
        for number, document in self._original["doc_iterator"](**options):
            if number not in self.unreadable:
                self._number, self._failed = number, None
                yield number, document
        if self._built and not self._scored:
            raise self._nothing()

    def doc_to_prefix(self, document: Any) -> Any:
        return self._tried("doc_to_prefix", None, document)

    def fewshot_context(self, *arguments: Any, **options: Any) -> Any:
        return self._tried("fewshot_context", "", *arguments, **options)

    def _tried(self, method: str, otherwise: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return self._original[method](*arguments, **options)
        except Exception as error:  # of the task's templates, on whatever the document holds
            self._failed = self._failed or error
            return otherwise

    def construct_requests(self, doc: Any, ctx: Any, **options: Any) -> list[Any]:
        number = options["metadata"][1]
        try:
            if self._failed:
                raise self._failed
            made = self._original["construct_requests"](doc=doc, ctx=ctx, **options)
            requests = made if isinstance(made, list) else [made]
            if not requests:
                raise ValueError("it has no choices")
            for request in requests:
                self._harness.check(request)
            self._task.doc_to_target(doc)  # is kept in the row of the question
        except Exception as error:
            self.unreadable[number] = _reason(error)
            return []
        finally:
            self._failed = None
        return requests

    def process_results(self, document: Any, results: Any) -> Any:
        try:
            scores = self._original["process_results"](document, results)
        except Exception as error:
            self.unreadable[self._number] = _reason(error)
            return {}
        self._scored += 1
        return scores

    def _nothing(self) -> InputError:
        if not self.unreadable:
            return InputError(Problem(f"{self._name!r} has no documents", "tasks"))
        number, reason = min(self.unreadable.items())
        message = f"none of the documents of {self._name!r} can be read, the first ({number}) because: {reason}"
        return InputError(Problem(message, "tasks"))


def _reason(error: Exception) -> str:
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {message}"


@contextmanager
def _sandboxed() -> Iterator[None]:
    """The harness's templates, which its task files hold, without the way from a template to all of Python."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=before.undefined, keep_trailing_newline=True)
    utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Its many warnings are about what is meant here: shots other than a task's own, no stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_OF_A_TEXT = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics that divide the loss of the tokens by the size of the text."""


def _found(
    results: Mapping[str, Any], harness: _Answering, unreadable: Mapping[str, Mapping[int, str]]
) -> EvaluationResult:
    metrics: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if way and not metric.endswith("_stderr") and isinstance(value, int | float):
                metrics["/".join(["tasks", task, metric, *([way] if way != "none" else [])])] = float(value)
    rows = []
    for task, samples in results["samples"].items():
        left_out = unreadable[task]
        own = [_row(task, sample, harness) for sample in samples if sample["doc_id"] not in left_out]
        questions = {row["question"]: row for row in own}
        metrics[f"tasks/{task}/questions"] = float(len(questions))
        metrics[f"tasks/{task}/truncated"] = float(sum(row["truncated"] for row in questions.values()))
        for what in ("tokenised_apart", "without_tokens", "lost_bytes"):
            if count := sum(row[what] for row in questions.values()):
                metrics[f"tasks/{task}/{what}"] = float(count)
        if f"tasks/{task}/lost_bytes" in metrics:
            for name in _OF_A_TEXT:
                metrics.pop(f"tasks/{task}/{name}", None)
        if left_out:
            metrics[f"tasks/{task}/unreadable"] = float(len(left_out))
        rows += own
        # Their filter is empty, so that no metric takes them for its questions.
        rows += [
            {"task": task, "question": number, "filter": "", "unreadable": reason}
            for number, reason in sorted(left_out.items())
        ]
    return EvaluationResult(metrics, rows)


def _row(task: str, sample: Mapping[str, Any], harness: _Answering) -> dict[str, Any]:
    arguments = sample["arguments"]
    pairs = [(each[0], each[1]) for each in arguments if len(each) == 2 and isinstance(each[1], str)]
    plain = {
        "task": task,
        "question": sample["doc_id"],
        "filter": sample["filter"],
        "prompt_hash": sample["prompt_hash"],
        "target": sample["target"],
        "answers": sample["filtered_resps"],
        "truncated": any(each[0] in harness.truncated for each in arguments),
        "tokenised_apart": sum(pair in harness.apart for pair in pairs),
        "without_tokens": sum(pair in harness.without_tokens for pair in pairs),
        "lost_bytes": sum(harness.lost.get(each[0], 0) for each in arguments),
        **{metric: sample[metric] for metric in sample["metrics"]},
    }
    row = json.loads(json.dumps(plain, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
    assert isinstance(row, dict)
    return row
