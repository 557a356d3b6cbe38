"""Figures of a sweep: history, slices and importance of the trials, drawn by Optuna, and the effect of tuning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.report.figures.differences import End, slopes
from lit_llm.report.figures.inputs import labelled
from lit_llm.report.figures.style import save, scale
from lit_llm.report.tables.sweep import names_of
from lit_llm.runs.fingerprints import reset_identities
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import open_study, studies_in
from lit_llm.sweeps.confirmation import confirmation_name, tuned_name
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trials import Trials

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

Draw = Callable[[], Any]
ENOUGH = 4
"""Least number of done trials for importance and slices."""


CAPTIONS = {
    "history": "each trial in the order in which it was drawn, and the best up to there",
    "slices": "each parameter alone: a point is a trial, the darker the later",
    "importance": "how much of what differs between the trials each parameter explains, by Optuna's estimate",
    "parallel": "each trial as a line through its parameters and its goal",
    "front": "trials by their goals, and those that no other beats in all of them",
    "courses": "what the pruner saw of each trial",
}


def write_figures(search: Search, trials: Trials, folder: Path) -> dict[Path, str]:
    """Write `<arm>-history.png` and others for every arm with done trials, and `tuning.svg` after the confirmation
    study.

    Returns {file: caption}.
    """
    from matplotlib import rc_context

    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"figure.dpi": 150, "font.size": 8, "axes.titlesize": 9}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on experimental functions, and on layouts that are set here
        for arm in search.spaces:
            study = trials.study(arm)
            if study is None or not any(trial.state == "done" for trial in trials.of(arm)):
                continue
            for name, draw in _figures(search, _with_short_names(search, study)):
                path = folder / f"{arm}-{name}.png"
                if _save(draw, path, f"{search.name}, {arm}: {name}"):
                    written[path] = f"{arm}: {CAPTIONS[name.split('-')[0]]}."
    tuned = tuning_figure(search, trials)
    if tuned is None:
        return written
    caption = "each arm at its default setting and at its best, mean over the seeds that the search has not seen"
    return {save(tuned, folder / "tuning")[1]: f"{caption}; bars: standard deviation."} | written


def tuning_figure(search: Search, trials: Trials) -> Figure | None:
    """Each arm at its default and its best setting, over seeds that the search has not seen.

    None before the confirmation study has a value of both.
    """
    name = confirmation_name(search)
    if name not in studies_in(trials.store):
        return None
    winners = open_study(name, store=trials.store)
    rows = {row.arm: row for row in comparison_of(winners, runs_of(winners, trials.store)).rows}
    reset_identities(search.ablation.identities)  # reading the other study has replaced those of the search
    arms = {}
    for arm in search.spaces:
        # Where no trial beat an arm's default setting, the default is its best.
        default, best = rows.get(arm), rows.get(tuned_name(search, arm), rows.get(arm))
        if default is not None and best is not None and default.mean is not None and best.mean is not None:
            arms[arm] = (_spread(default.mean, default.deviation), _spread(best.mean, best.deviation))
    if not arms:
        return None
    return slopes(
        f"{search.name}: before and after tuning",
        arms,
        labelled(winners.study.compare.metric),
        ("default setting", "tuned"),
        f"bars: standard deviation over {len(winners.study.seeds)} seeds that the search has not seen",
        from_zero=False,
    )


def _spread(mean: float, deviation: float | None) -> End:
    return End(mean, None if deviation is None else mean - deviation, None if deviation is None else mean + deviation)


def _figures(search: Search, study: optuna.Study) -> Iterator[tuple[str, Draw]]:
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as draw

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    several = len(search.goals) > 1
    for number, goal in enumerate(search.goals):
        ending = f"-{number + 1}" if several else ""
        target = (lambda trial, number=number: trial.values[number]) if several else None
        kwargs: dict[str, Any] = {"target": target, "target_name": goal}
        yield f"history{ending}", partial(draw.plot_optimization_history, study, **kwargs)
        varied = {name for trial in done for name in trial.params}
        if len(done) >= ENOUGH and varied:
            yield f"slices{ending}", partial(draw.plot_slice, study, **kwargs)
        if len(done) >= ENOUGH and len(varied) > 1:
            yield f"importance{ending}", partial(draw.plot_param_importances, study, **kwargs)
            yield f"parallel{ending}", partial(draw.plot_parallel_coordinate, study, **kwargs)
    if 1 < len(search.goals) < 4:
        yield "front", partial(draw.plot_pareto_front, study, target_names=list(search.goals))
    elif any(trial.intermediate_values for trial in done):
        yield "courses", partial(_courses, study, search)


def _courses(study: optuna.Study, search: Search) -> Any:
    """Intermediate values that the pruner saw."""
    from optuna.visualization import matplotlib as draw

    axes = draw.plot_intermediate_values(study)
    seeds = search.sweep.pruner.kind == "wilcoxon"
    axes.set_xlabel(
        "number of the seed" if seeds else f"validations of the arm's default setting, by {search.sweep.pruner.by}"
    )
    axes.set_ylabel(search.goals[0])
    return axes


def _with_short_names(search: Search, study: optuna.Study) -> optuna.Study:
    """A copy of the Optuna study in memory, with short names of parameters."""
    import optuna

    names = names_of(search)
    copy = optuna.create_study(directions=study.directions)
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.params:
            copy.add_trial(
                optuna.trial.create_trial(
                    state=trial.state,
                    values=trial.values,
                    params={names[name]: value for name, value in trial.params.items()},
                    distributions={names[name]: each for name, each in trial.distributions.items()},
                    intermediate_values=trial.intermediate_values,
                )
            )
    return copy


def _save(draw: Draw, path: Path, title: str) -> bool:
    """Draw and save; False where Optuna has nothing to draw, for example if all trials have one value."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    try:
        axes = draw()
    except (ValueError, RuntimeError):
        plt.close("all")
        return False
    figure = plt.gcf()
    first = axes.flat[0] if hasattr(axes, "flat") else axes
    count = len(axes.flat) if hasattr(axes, "flat") else 1
    figure.set_size_inches(max(6.4, 2.4 * count), 3.8)
    for each in figure.axes:
        if each.get_xscale() == "log":
            scale(each, "x", each.get_xlim(), True)  # Optuna's own ticks cover each other
    for place in ("left", "center"):
        first.set_title("", loc=place)
    figure.suptitle(title)
    figure.savefig(path, bbox_inches="tight")
    plt.close("all")
    return True
