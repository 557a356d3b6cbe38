"""Optuna's samplers and pruners, as a sweep names them."""

from __future__ import annotations

import warnings
from bisect import bisect
from itertools import accumulate
from typing import TYPE_CHECKING
from zlib import crc32

from lit_llm.experiment.schema import Experiment
from lit_llm.sweeps.schema import Sweep

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

KEPT = 3
"""Reduction factor: hyperband and successive halving keep one of this many trials at a rung."""


def make_sampler(sweep: Sweep, number: int) -> BaseSampler:
    """The sampler that draws trial `number`; the same for every arm.

    A sampler has no state except the storage, so an interrupted search can be continued: the seed of each draw is
    computed from the sweep's seed and the trial's number.
    """
    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    seed = (sweep.seeds[0] * 1_000_003 + number) % 2**31
    startup = max(4, min(10, sweep.trials // 3))
    population = max(4, min(50, sweep.trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if sweep.sampler == "tpe":
            return samplers.TPESampler(n_startup_trials=startup, seed=seed)
        if sweep.sampler == "gp":
            return samplers.GPSampler(n_startup_trials=startup, seed=seed)
        if sweep.sampler == "cma_es":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if sweep.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=population, seed=seed)
        if sweep.sampler == "nsga3":
            return samplers.NSGAIIISampler(population_size=population, seed=seed)
        if sweep.sampler == "qmc":  # one seed for all draws: the sequence goes by their number
            return _sequence(sweep.seeds[0] % 2**32)
        return samplers.RandomSampler(seed=seed)


def _sequence(seed: int) -> BaseSampler:
    from optuna.samplers import QMCSampler

    class Sequence(QMCSampler):
        """A Sobol sequence whose next point follows from the points that trials have, not from a counter.

        Optuna's counter moves before the trial gets its point, so a kill in between would lose one; and it counts
        trials that repeat the point of a lost one.
        """

        def _find_sample_id(self, study: Study, search_space: object) -> int:
            trials = study.get_trials(deepcopy=False)
            return sum(bool(trial.params) and "fixed_params" not in trial.system_attrs for trial in trials)

    return Sequence(seed=seed, scramble=True, warn_independent_sampling=False)


def make_pruner(sweep: Sweep, arm_experiment: Experiment) -> BasePruner:
    """The sweep's pruner, whose steps are validations of the arm's default setting, or seeds."""
    from optuna import pruners
    from optuna.exceptions import ExperimentalWarning

    times = arm_experiment.pretrain.validation.times
    kind = sweep.pruner.kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if kind == "median":
            # In the first third of the training a long warm-up is hard to tell from a bad learning rate.
            return pruners.MedianPruner(
                n_startup_trials=max(3, min(5, sweep.trials // 4)), n_warmup_steps=1 + times // 3
            )
        if kind == "hyperband":
            return _hyperband(times)
        if kind == "successive_halving":
            return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=KEPT)
        if kind == "wilcoxon":
            return pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=2)
        return pruners.NopPruner()


def _hyperband(times: int) -> BasePruner:
    from optuna.pruners import HyperbandPruner

    class OneSchedule(HyperbandPruner):
        """Hyperband whose brackets depend on a trial's number alone, so they agree in every arm and process.

        Optuna's depend on the study's name too, which holds the arm, and are the first one until a trial is judged.
        """

        def _get_bracket_id(self, study: Study, trial: FrozenTrial) -> int:
            if not self._pruners:
                self._try_initialization(study)
            place = crc32(str(trial.number).encode()) % self._total_trial_allocation_budget
            return bisect(list(accumulate(self._trial_allocation_budgets)), place)

    return OneSchedule(min_resource=1, max_resource=times, reduction_factor=KEPT)


def progress(sweep: Sweep, arm_experiment: Experiment, trial: Experiment, step: int) -> int | None:
    """Progress of a trial after `step` steps, in validations of the arm's default setting, by steps or by tokens.

    None between two of these validations, more than half a step of either from both: the trial is not judged there.
    """
    by_tokens = sweep.pruner.by == "tokens"
    arm_tokens, trial_tokens = (_tokens(arm_experiment), _tokens(trial)) if by_tokens else (1, 1)
    between = arm_experiment.pretrain.training.max_steps * arm_tokens / arm_experiment.pretrain.validation.times
    number = round(step * trial_tokens / between)
    return number if number and abs(step * trial_tokens - number * between) <= (arm_tokens + trial_tokens) / 2 else None


def _tokens(experiment: Experiment) -> int:
    """Number of tokens of one step."""
    return experiment.pretrain.data.batch_size * experiment.pretrain.data.sequence_length
