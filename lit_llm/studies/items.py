"""Two arms of a store on the same items, from the records of their finished runs: `lit-llm diff A B --items`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.statistics.item_differences import ItemComparison, item_comparison
from lit_llm.store.store import Store
from lit_llm.studies.load import file_and_arm
from lit_llm.studies.metric_noise import decides
from lit_llm.studies.runs import runs_of_one_arm
from lit_llm.studies.stored import open_study


def items_of(
    left: str, right: str, overrides: Sequence[str], store: Store, metric: str | None = None
) -> ItemComparison:
    """Compare two arms, `STUDY:ARM` each, item by item over the seeds that both have finished.

    metric: the primary metric of the first arm's study when None. Raises InputError.
    """
    metric = metric or open_study(file_and_arm(left)[0], overrides, store).study.compare.metric
    arms = [{run.seed: run.result() for run in runs_of_one_arm(source, overrides, store)} for source in (left, right)]
    finished = [{seed: run for seed, run in runs.items() if run.metric(metric) is not None} for runs in arms]
    shared = sorted(finished[0].keys() & finished[1].keys())
    if not shared:
        measured = {name for runs in arms for run in runs.values() for name in run.result.get("metrics", {})}
        hint = did_you_mean(metric, [name for name in measured if decides(name)]) if metric not in measured else ""
        raise InputError(Problem(f"{left} and {right} have no finished seed in common that has {metric}{hint}"))
    units = [{seed: runs[seed].units(metric) for seed in shared} for runs in finished]
    recorded = [seed for seed in shared if all(each[seed] for each in units)]
    if not recorded:
        message = "is not kept item by item: give a loss of held-out documents or examples, or a score that is a mean "
        raise InputError(Problem(f"{message}over questions, e.g. --metric test/target_nll", metric))
    chosen = [{seed: found for seed in recorded if (found := each[seed])} for each in units]
    try:
        return item_comparison(metric, (left, right), chosen[0], chosen[1], [*_notes(metric)])
    except ValueError:
        raise InputError(Problem(f"{left} and {right} were not judged on the same items", metric)) from None


def _notes(metric: str) -> Iterator[str]:
    if "perplexity" in metric.split("/"):
        yield "items are shown in nats, of which the perplexity is a power of e"
