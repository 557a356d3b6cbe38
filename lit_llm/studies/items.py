"""Two arms of a store on the same items, from the records of their finished runs: `lit-llm diff A B --items`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_llm.config.metrics import BITS_PER_BYTE, metric_of
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.data.config import ByteTokenizer, DataConfig, InstructionConfig
from lit_llm.data.sources import UNNAMED
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_examples, digest_of_tasks, digests_of_texts, identity_of_data
from lit_llm.statistics.estimates import joined
from lit_llm.statistics.item_differences import ItemComparison, item_comparison
from lit_llm.statistics.run_results import RunResult, of_newest_provenance
from lit_llm.store.store import Store
from lit_llm.studies.load import file_and_arm
from lit_llm.studies.metric_noise import decides
from lit_llm.studies.runs import Run, StoredStage, runs_of_one_arm
from lit_llm.studies.stored import open_study

Texts = dict[str, str]
"""{source: digest of its documents, examples or questions, and of their tokens}."""


@dataclass(frozen=True)
class _Side:
    """One of the two arms."""

    name: str
    runs: dict[int, tuple[Run, RunResult]]
    texts: Texts
    """What the metric was measured on."""


def items_of(
    left: str, right: str, overrides: Sequence[str], store: Store, metric: str | None = None
) -> ItemComparison:
    """Compare two arms, `STUDY:ARM` each, item by item over the seeds that both have finished.

    metric: the primary metric of the first arm's study when None. Results of different code or machines are not mixed.
    Raises InputError, also where the arms were measured on different texts.
    """
    metric = metric or open_study(file_and_arm(left)[0], overrides, store).study.compare.metric
    sides = [_side(source, overrides, store, metric) for source in (left, right)]
    notes: list[str] = []
    results = [result for side in sides for _, result in side.runs.values()]
    kept = {id(result) for result in of_newest_provenance(results, notes)}
    finished = [
        {seed: run for seed, (run, result) in side.runs.items() if id(result) in kept and _has(result, metric)}
        for side in sides
    ]
    shared = sorted(finished[0].keys() & finished[1].keys())
    if not shared:
        measured = {name for result in results for name in result.result.get("metrics", {})}
        hint = did_you_mean(metric, [name for name in measured if decides(name)]) if metric not in measured else ""
        message = f"{left} and {right} have no finished seed in common that has {metric}{hint}"
        raise InputError(Problem("; ".join([message, *notes])))
    _refuse_other_texts(sides, [runs[shared[0]] for runs in finished], metric)
    units = [{seed: runs[seed].units(metric) for seed in shared} for runs in finished]
    recorded = [seed for seed in shared if all(each[seed] for each in units)]
    if not recorded:
        message = "is not kept item by item: give a loss of held-out documents or examples, or a score that is a mean "
        raise InputError(Problem(f"{message}over questions, e.g. --metric test/target_nll", metric))
    chosen = [{seed: found for seed in recorded if (found := each[seed])} for each in units]
    try:
        return item_comparison(metric, (left, right), chosen[0], chosen[1], [*notes, *_notes(metric)])
    except ValueError:
        raise InputError(Problem(f"{left} and {right} were not judged on the same items", metric)) from None


def _has(result: RunResult, metric: str) -> bool:
    return result.metric(metric) is not None


def _side(source: str, overrides: Sequence[str], store: Store, metric: str) -> _Side:
    """One arm with its runs. Digests are taken here, as opening the next study forgets those of this one."""
    runs = runs_of_one_arm(source, overrides, store)
    step = runs[0].step_of(metric)
    texts = {} if step is None else _texts(runs[0].experiment_at(step), step, metric)
    return _Side(source, {run.seed: (run, run.result()) for run in runs}, texts)


def _texts(experiment: Experiment, step: StoredStage, metric: str) -> Texts:
    """What a stage measures a metric on: of a metric of one source, that source alone."""
    node, evaluate = step.node, experiment.evaluate
    data: DataConfig | InstructionConfig
    if node.evaluation == "tasks":
        return {"tasks": digest_of_tasks(experiment)}
    if node.evaluation == "examples" or (not node.evaluation and node.after == "finetune"):
        data, texts = experiment.section("finetune").data, {"examples": digest_of_examples(experiment)}
    else:
        data = experiment.pretrain.data
        texts = {source.name or UNNAMED: source.digest for source in identity_of_data(experiment).sources}
    if node.evaluation and evaluate is not None:  # the split of other metrics is in their names
        split = evaluate.split if data.has_test else "validation"
        texts = {name: f"{digest} {split}" for name, digest in texts.items()}
    if node.evaluation == "likelihood":
        texts |= digests_of_texts(experiment)
    source = metric.rpartition("/")[2]
    return {source: texts[source]} if source in texts else texts


def _texts_by_byte(run: Run, metric: str) -> Texts:
    """The same with one tokenizer for all runs: documents are held out by their content, whatever their tokens."""
    step = run.step_of(metric)
    assert step is not None
    experiment = run.experiment_at(step)
    data = experiment.pretrain.data.model_copy(update={"tokenizer": ByteTokenizer()})
    pretrain = experiment.pretrain.model_copy(update={"data": data})
    return _texts(experiment.model_copy(update={"pretrain": pretrain}), step, metric)


def _refuse_other_texts(sides: Sequence[_Side], pair: Sequence[Run], metric: str) -> None:
    """Raise InputError where a source of both arms has other documents or tokens.

    A document's number is its place in its split, so numbers of different texts agree by chance alone. Metrics by byte
    need the same documents; the others need the same tokens, too.
    """
    differing = _differing(*(side.texts for side in sides))
    known = metric_of(metric)
    by_byte = known is not None and known.across_tokenizers
    if differing and by_byte:
        differing = _differing(*(_texts_by_byte(run, metric) for run in pair))
    if differing:
        arms = " and ".join(side.name for side in sides)
        per_token = not by_byte and "tasks" not in differing
        what = "text, split or tokenizer" if per_token else "text or split"
        advice = f"; {BITS_PER_BYTE.name} compares models of different tokenizers" if per_token else ""
        message = f"{arms} were not judged on the same items: another {what} in {joined(differing)}{advice}"
        raise InputError(Problem(message, metric))


def _differing(first: Texts, second: Texts) -> list[str]:
    """Sources of both arms whose digests differ."""
    return sorted(name for name in first.keys() & second.keys() if first[name] != second[name])


def _notes(metric: str) -> Iterator[str]:
    if "perplexity" in metric.split("/"):
        yield "items are shown in nats, of which the perplexity is a power of e"
