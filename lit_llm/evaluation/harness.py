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
from lit_llm.evaluation.task_names import NOT_INSTALLED, no_task, shots_by_task
from lit_llm.generation import Sampling, generate
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import BOS, EOD, MasksConfig

NEW_TOKENS = 256
"""Most tokens of an answer where a task does not set them; the harness's default."""
_FIRST_TOKENS = 16
"""Tokens that are generated before the first check whether an answer has ended."""

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
    include_path  a folder of task files. Where it has all tasks, the harness's own are not indexed.
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

    shots_of = shots_by_task(tasks, shots)
    if include_path is not None:
        read_task_files(include_path)  # refuses what would run
    with _silence_warnings(), _sandbox_templates():
        loaded = _load_tasks(shots_of, include_path, seed)
        harness = harness_model(model, tokenizer, max_length=max_length, masks=masks, batch_tokens=batch_tokens)
        guards = {name: _Guard(name, task, harness) for name, task in loaded["tasks"].items()}
        results = evaluate(harness, loaded, limit=limit, bootstrap_iters=0)
    return _collect_results(results, harness, {name: guard.unreadable for name, guard in guards.items()})


def harness_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    masks: MasksConfig = MasksConfig(),
    batch_tokens: int = 16_384,
) -> Any:
    """The model as a `lm_eval.api.model.TemplateLM`, which the harness's functions take."""
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
    """Scores of each pair's continuation: (log-probability in nats, whether all its tokens are the most probable ones).

    Pairs that differ in the last token alone, such as one-letter answers, share one forward pass.
    """
    readings: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        readings[tuple(context), tuple(continuation[:-1])].append(number)
    rows, device, family = list(readings), next(model.parameters()).device, model.config.family
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for chosen in _batches([(len(context), len(read) + 1) for context, read in rows], family, batch_tokens):
        sources = [np.array(rows[row][0], dtype=np.int64) for row in chosen]
        targets = [np.array([*rows[row][1], EOD], dtype=np.int64) for row in chosen]  # the last token is not read
        batch = collate(sources, targets, family, masks).to(device)
        hidden_ND = model.hidden(**batch.inputs).flatten(0, 1)
        numbers: list[int] = []
        positions: list[int] = []
        tokens: list[Sequence[int]] = []
        for index, row in enumerate(chosen):
            start = index * batch.targets.shape[1] + (0 if family == "encoder_decoder" else len(sources[index]))
            for number in readings[rows[row]]:
                numbers.append(number)
                tokens.append(pairs[number][1])
                positions.extend(range(start, start + len(tokens[-1])))
        nats, greedy = _score_tokens(
            hidden_ND, model.unembedding, positions, [token for continuation in tokens for token in continuation]
        )
        cuts = np.cumsum([len(continuation) for continuation in tokens])[:-1]
        for number, pair_nats, pair_greedy in zip(numbers, np.split(nats, cuts), np.split(greedy, cuts), strict=True):
            scores[number] = (-float(pair_nats.sum()), bool(pair_greedy.all()))
    return scores


def _score_tokens(
    hidden_ND: Tensor, unembedding: Unembedding, positions: Sequence[int], tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(nats in float64, whether it is the most probable token) of one token at each of the positions."""
    hidden_ND = hidden_ND[torch.tensor(positions, device=hidden_ND.device)]
    tokens_N = torch.tensor(tokens, device=hidden_ND.device)
    nats, greedy = [], []
    size = chunk_rows(unembedding.vocabulary, hidden_ND.device.type)  # limits the memory of the logits
    for hidden, token in zip(hidden_ND.split(size), tokens_N.split(size), strict=True):
        logits = unembedding(hidden).float()
        nats.append(F.cross_entropy(logits, token, reduction="none"))
        greedy.append(logits.argmax(-1) == token)
    return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def _batches(lengths: Sequence[tuple[int, int]], family: str, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers of each batch, of about one length, the longest first. lengths: (source, target) tokens of rows."""
    is_encoder_decoder = family == "encoder_decoder"  # its sources and targets are padded separately

    def key(number: int) -> tuple[int, ...]:
        source, target = lengths[number]
        return (-source, -target) if is_encoder_decoder else (-source - target,)

    batch: list[int] = []
    width: tuple[int, ...] = ()
    for number in sorted(range(len(lengths)), key=key):
        size = lengths[number] if is_encoder_decoder else (sum(lengths[number]),)
        wider = tuple(map(max, width, size)) if batch else size
        if batch and sum(wider) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], size
        batch.append(number)
        width = wider
    if batch:
        yield batch


# --- the harness's model -------------------------------------------------------------------------------------------


class _HarnessModel:
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

    class Model(_HarnessModel, TemplateLM):  # type: ignore[misc, unused-ignore]
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


# --- tasks ---------------------------------------------------------------------------------------------------------


def _load_tasks(shots_of: Mapping[str, int | None], include_path: Path | None, seed: int) -> dict[str, Any]:
    """Tasks and groups in the harness's form. shots_of: {task: shots, None for the task's default}."""
    from lm_eval.tasks import TaskManager

    options = {"include_path": str(include_path)} if include_path else {}
    manager = TaskManager(include_defaults=False, **options)
    if not set(shots_of) <= set(manager.all_tasks):
        manager = TaskManager(**options)  # takes some seconds
    wrong = [Problem(no_task(name, manager.all_tasks), "tasks") for name in shots_of if name not in manager.all_tasks]
    if wrong:
        raise InputError(*wrong)
    whole: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    problems = []
    for name, shots in shots_of.items():
        try:
            part = manager.load(name)
        except Exception as error:  # of the network, of the Hub, of `datasets`, of the task's own code
            problems.append(_not_loaded(name, error))
            continue
        for task in part["tasks"].values():
            problems += _set_shots(task, shots, seed)
        for key, merged in whole.items():
            merged.update(part[key])
    if problems:
        raise InputError(*problems)
    return whole


def _not_loaded(name: str, error: Exception) -> Problem:
    cause = "its data cannot be reached" if isinstance(error, OSError) else "the harness cannot load it"
    return Problem(f"{name!r}: {cause} ({_reason(error)})", "tasks")


def _set_shots(task: Any, shots: int | None, seed: int) -> list[Problem]:
    task_shots = task.get_config("num_fewshot")
    if shots is None or task_shots == 0:
        shots = task_shots or 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    pool = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if shots > pool:
        return [Problem(f"{task.task_name!r} has {pool} examples to draw {shots} shots from", "shots")]
    return []


class _Guard:
    """Leaves out documents of a task that cannot be read or scored, for which the harness ends in a traceback.

    It replaces the task's methods that read a document.
    """

    def __init__(self, name: str, task: Any, harness: _HarnessModel) -> None:
        self.unreadable: dict[int, str] = {}
        """{number of a document in its task: reason why it is left out}."""
        self._name, self._task, self._harness = name, task, harness
        self._failed: Exception | None = None
        """Error raised by the context of the current document."""
        self._number, self._scored, self._built = 0, 0, False
        """Number of the current document, documents scored under this filter, and whether the requests are built."""
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
            raise self._no_documents() from None
        self._built = True

    def doc_iterator(self, **options: Any) -> Iterator[tuple[int, Any]]:
        self._scored = 0
        for number, document in self._original["doc_iterator"](**options):
            if number not in self.unreadable:
                self._number, self._failed = number, None
                yield number, document
        if self._built and not self._scored:
            raise self._no_documents()

    def doc_to_prefix(self, document: Any) -> Any:
        return self._try("doc_to_prefix", None, document)

    def fewshot_context(self, *arguments: Any, **options: Any) -> Any:
        return self._try("fewshot_context", "", *arguments, **options)

    def _try(self, method: str, otherwise: Any, *arguments: Any, **options: Any) -> Any:
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

    def _no_documents(self) -> InputError:
        if not self.unreadable:
            return InputError(Problem(f"{self._name!r} has no documents", "tasks"))
        number, reason = min(self.unreadable.items())
        message = f"none of the documents of {self._name!r} can be read, the first ({number}) because: {reason}"
        return InputError(Problem(message, "tasks"))


def _reason(error: Exception) -> str:
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {message}"


@contextmanager
def _sandbox_templates() -> Iterator[None]:
    """Render the templates of the harness's task files in a sandbox, without access to Python."""
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
def _silence_warnings() -> Iterator[None]:
    """Silence the harness's warnings, which are about intended settings: changed shots, no standard errors."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


_PER_TEXT_SIZE = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics that divide the loss of the tokens by the size of the text."""


def _collect_results(
    results: Mapping[str, Any], harness: _HarnessModel, unreadable: Mapping[str, Mapping[int, str]]
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
        rows_of_task = [_row(task, sample, harness) for sample in samples if sample["doc_id"] not in left_out]
        questions = {row["question"]: row for row in rows_of_task}
        metrics[f"tasks/{task}/questions"] = float(len(questions))
        metrics[f"tasks/{task}/truncated"] = float(sum(row["truncated"] for row in questions.values()))
        for what in ("tokenised_apart", "without_tokens", "lost_bytes"):
            if count := sum(row[what] for row in questions.values()):
                metrics[f"tasks/{task}/{what}"] = float(count)
        if f"tasks/{task}/lost_bytes" in metrics:
            for name in _PER_TEXT_SIZE:
                metrics.pop(f"tasks/{task}/{name}", None)
        if left_out:
            metrics[f"tasks/{task}/unreadable"] = float(len(left_out))
        rows += rows_of_task
        # Their filter is empty, which keeps them out of every metric.
        rows += [
            {"task": task, "question": number, "filter": "", "unreadable": reason}
            for number, reason in sorted(left_out.items())
        ]
    return EvaluationResult(metrics, rows)


def _row(task: str, sample: Mapping[str, Any], harness: _HarnessModel) -> dict[str, Any]:
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
