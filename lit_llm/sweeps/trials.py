"""Trials of a sweep in Optuna's storage, which any number of coordinators draw, judge and end.

```
studies/<sweep>/sweep.json       the search, and the address of its storage
                optuna.journal   the trials, unless they are in a database
                claims.lock      held while a trial is drawn, so that none is drawn twice and none beyond the budget
                coordinators/    one lock for each coordinator, held for its life: its lease on the trials it runs
```
A running trial has a coordinator. If that coordinator's lock is free, its process is gone, and another one takes the
trial over: the stages of its runs go on from their checkpoints. Only this file and `trial.py` read Optuna's storage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, Problem, SourceLocation, some
from lit_llm.config.tree import difference
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import pretrain_fingerprint
from lit_llm.runs.provenance import provenance, provenance_digest
from lit_llm.runs.trainer_parts import TrainerParts, in_force
from lit_llm.store.files import Damaged
from lit_llm.store.locks import held
from lit_llm.store.store import Store, read_json, write_json
from lit_llm.studies.coordinators import coordinating, is_alive, wait_for_others
from lit_llm.studies.stored import STORED, SWEEP
from lit_llm.sweeps import storage
from lit_llm.sweeps.samplers import make_pruner, make_sampler
from lit_llm.sweeps.space import ArmSpace, Dimension, Point, Value
from lit_llm.sweeps.sweep import Search, content_of_search
from lit_llm.sweeps.trial import ENDED, EXHAUSTED, NOT_COUNTED, PRUNE_DECIDED, RETRY, RUN, Ended, Trial, read_trial
from lit_llm.tracking.address import without_secrets

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

IN_VAIN = 300
"""Consecutive draws without a new, feasible point that end an arm's search."""
PATIENT = 4
"""Consecutive draws without a new, feasible point before an untried feasible point of a finite space is taken."""
COUNTABLE = 20_000
"""Most points of a finite space that are listed, so that the search reaches its last points."""
PATIENCE = 120.0
"""Seconds to wait while others draw."""
LONGEST_ERROR = 4_000
"""Characters of an error in the storage: MySQL holds 65,535 bytes, and Optuna writes up to 12 for a character."""


class Trials:
    """Trials of all arms. Reading needs no lock; a coordinator opens them with `coordinating`."""

    def __init__(self, search: Search, store: Store, storage: str | None = None) -> None:
        """storage: URL of a database; the store's journal when absent. Nothing is created before `coordinating`.

        Raises InputError where the folder belongs to a study, or the trials are in another storage.
        """
        self.search, self.store, self.folder, self.url = search, store, store.study(search.name), storage
        self.journal = self.folder / "optuna.journal"
        self._storage: BaseStorage | None = None
        self._studies: dict[str, optuna.Study] = {}
        self._feasible_points: dict[str, list[tuple[Point, str]] | None] = {}
        """{arm: feasible points of its space, each with its first fingerprint}; None for a large space."""
        self._me: str | None = None
        note = self._read_note()
        if note is None and (self.folder / STORED).exists():
            message = f"{search.name} is the name of a study in this store; give the sweep another"
            raise InputError(Problem(message, "sweep"))
        where = "the store" if storage is None else without_secrets(storage)
        if note is not None and note["storage"] != where:
            message = f"the trials of {search.name} are in {note['storage']}, not in {where}"
            raise InputError(Problem(message, "--storage"))
        self._note = {
            "sweep": search.name,
            "question": search.sweep.question,
            "source": search.ablation.source,
            "storage": where,
        }

    def _read_note(self) -> dict[str, Any] | None:
        """Content of sweep.json; None where it is missing, or damaged but its trials are at the expected address.

        In both cases it is written anew. Raises InputError where the address of the trials is lost.
        """
        file = self.folder / SWEEP
        try:
            note = read_json(file)
            return None if note is None else {"storage": str(note["storage"])}
        except (Damaged, LookupError):
            if self.url is not None or self.journal.exists():
                return {"storage": "the store" if self.url is None else without_secrets(self.url)}
        message = f"is damaged, and there is no {self.journal.name} beside it: the trials are in a database. Give its "
        message += "--storage again, or remove the file to begin the search anew"
        raise InputError(Problem(message, location=SourceLocation(str(file))))

    @property
    def exhausted(self) -> dict[str, str]:
        """{arm: reason why it has no further trial}, of all coordinators."""
        studies = {arm: self.study(arm) for arm in self.search.spaces}
        reasons = {arm: study.user_attrs.get(EXHAUSTED) for arm, study in studies.items() if study is not None}
        return {arm: reason for arm, reason in reasons.items() if reason}

    @property
    def address(self) -> str:
        """Address of the storage for optuna-dashboard."""
        return str(self.journal) if self.url is None else without_secrets(storage.with_driver(self.url))

    # --- reading -------------------------------------------------------------------------------------------------

    def all(self) -> list[Trial]:
        """Every trial so far, arm by arm, in the order in which they were drawn."""
        if self._storage is None and not (self.folder / SWEEP).exists():
            return []
        return [trial for arm in self.search.spaces for trial in self.of(arm)]

    def of(self, arm: str) -> list[Trial]:
        """Every trial of one arm."""
        study = self.study(arm)
        if study is None:
            return []
        stored = study.get_trials(deepcopy=False)
        retried = {frozen.user_attrs[RETRY] for frozen in stored if RETRY in frozen.user_attrs}
        drawn = (frozen for frozen in stored if frozen.state.name != "WAITING")
        return [read_trial(arm, frozen, retried=frozen.number in retried) for frozen in drawn]

    def study(self, arm: str) -> optuna.Study | None:
        """Optuna's study of one arm; None before it has begun."""
        import optuna

        if arm not in self._studies:
            name = f"{self.search.name}/{arm}"
            if not self._is_stored(name):
                return None
            self._studies[arm] = optuna.load_study(
                study_name=name,
                storage=self._open(),
                pruner=make_pruner(self.search.sweep, self.search.ablation.arm(arm).experiment),
            )
        return self._studies[arm]

    def _is_stored(self, name: str) -> bool:
        """True where the storage has a study of this name, not only of one that the database takes for the same."""
        opened = self._open()
        try:
            return opened.get_study_name_from_id(opened.get_study_id_from_name(name)) == name
        except KeyError:
            return False

    def _open(self) -> BaseStorage:
        if self._storage is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            # Constraints are enforced here: a point that breaks one is drawn again, with any sampler.
            warnings.filterwarnings("ignore", message="Constraints have been set, but CmaEsSampler")
            self._storage = storage.database(self.url) if self.url is not None else storage.journal(self.journal)
        return self._storage

    # --- coordinating --------------------------------------------------------------------------------------------

    @contextmanager
    def coordinating(self, rerun: str | None = None, trains: bool = True, joins: bool = False) -> Iterator[None]:
        """Begin or continue the search. In the context this process may draw trials and leases those it runs.

        rerun: "failed" draws failed trials again; "stale" begins anew if the trials are of other code. trains: this
        machine trains; else its device and code are not compared with those of the trials. joins: work for a command
        that has begun the search. Raises InputError if the search, its code, device or threads differ from those that
        were begun under this name.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with coordinating(self.folder) as me:
            self._me = me
            trainer = in_force()  # once, as there may be thousands of trials
            with self._drawing_lock():
                if trains or rerun == "stale":
                    self._check_origins(trainer, begin_anew=rerun == "stale")
                for arm in self.search.spaces:
                    self._begin(arm, rerun, trainer if trains else None)
                    if not joins:
                        self._studies[arm].set_user_attr(EXHAUSTED, None)  # a new command looks for points again
                write_json(self.folder / SWEEP, self._note | content_of_search(self.search), signed=True)
            try:
                yield
            finally:
                self._me = None

    def _begin(self, arm: str, rerun: str | None, trainer: TrainerParts | None) -> None:
        """Begin or continue an arm's study. trainer: what the user adds to the Trainer; None where nothing trains."""
        import optuna

        search = self.search
        name = f"{search.name}/{arm}"
        study = optuna.create_study(
            study_name=name,
            storage=self._open(),
            directions=[goal.direction for goal in search.sweep.optimize],
            pruner=make_pruner(search.sweep, search.ablation.arm(arm).experiment),
            load_if_exists=True,
        )
        if not self._is_stored(name):
            message = f"the database holds a study whose name it takes for {name}, as it ignores case and accents. "
            message += "Give the sweep or the arm another name, or create a database with COLLATE utf8mb4_bin"
            raise InputError(Problem(message, "--storage"))
        self._studies[arm] = study
        identity, wanted = study.user_attrs.get("identity"), search.identity(arm)
        if identity is not None and identity != wanted:
            changed = some(list(difference(identity, wanted)))
            message = f"another search was begun under this name ({changed} changed); give the sweep another name"
            raise InputError(Problem(message, "sweep"))
        study.set_user_attr("identity", wanted)
        if search.trains and trainer is not None:
            study.set_user_attr("origin", _provenance_digest(search.ablation.arm(arm).experiment, trainer))
        if not study.user_attrs.get("begun"):
            for point in search.firsts[arm]:
                study.enqueue_trial(dict(point), skip_if_exists=True)
            study.set_user_attr("begun", True)
        if rerun == "failed":
            for trial in self.of(arm):
                if trial.state in ("failed", "out_of_memory") and not trial.retried:
                    study.enqueue_trial(dict(trial.point), user_attrs={RETRY: trial.number})

    def _check_origins(self, trainer: TrainerParts, begin_anew: bool) -> None:
        """Compare the provenance of arms and trials with this process; on a difference set them aside, or refuse.

        An arm's provenance serves before its first trial has ended; a trial's, where it depends on the setting.
        """
        stale = []
        for arm in self.search.ablation.arms if self.search.trains else ():
            study, now = self.study(arm.name), _provenance_digest(arm.experiment, trainer)
            if study is not None and study.user_attrs.get("origin", now) != now:
                stale.append(arm.name)
            stale += [
                trial.name
                for trial in self.of(arm.name)
                if trial.origin
                and trial.origin != _provenance_digest(self.search.experiment(trial.arm, trial.point), trainer)
            ]
        if not stale:
            return
        if not begin_anew:
            message = (
                f"{some(stale)} {'was' if len(stale) == 1 else 'were'} done with other code, device or threads, and "
            )
            message += "a search does not mix two; `--rerun stale` begins anew, or give the sweep another name"
            raise InputError(Problem(message, "sweep"))
        if wait_for_others(self.folder, self._me):
            message = f"another process works on {self.search.name} with other code; stop it before you begin anew"
            raise InputError(Problem(message, "--rerun"))
        self._put_aside()

    def _put_aside(self) -> None:
        import optuna

        if self.url is None:
            number = 1 + len(list(self.folder.glob("optuna.journal.*[0-9]")))
            self.journal.rename(self.journal.with_name(f"{self.journal.name}.{number}"))
        else:
            for arm in self._studies:
                optuna.delete_study(study_name=f"{self.search.name}/{arm}", storage=self._open())
        self._storage, self._studies = None, {}

    def next(self) -> Trial | None:
        """The next trial: one whose coordinator is gone, or a new one of the arm with fewest; None if none is left."""
        with self._drawing_lock():
            trials = self.all()
            for trial in trials:
                if not (trial.settled or self._is_leased(trial)) and (taken := self._take_over(trial)) is not None:
                    return taken
            wanting, exhausted = self._wanting(trials), self.exhausted
            for arm in sorted(wanting, key=lambda arm: wanting[arm], reverse=True):
                if arm not in exhausted and (drawn := self._draw(arm)) is not None:
                    return drawn
        return None

    def _wanting(self, trials: Sequence[Trial]) -> dict[str, int]:
        """{arm: trials that its budget still has}, of the arms with any."""
        left = {
            arm: self.search.sweep.trials - sum(trial.arm == arm and trial.counts for trial in trials)
            for arm in self.search.spaces
        }
        return {arm: count for arm, count in left.items() if count > 0}

    @property
    def over(self) -> bool:
        """True where every arm has all its trials, and all have ended."""
        trials = self.all()
        running = any(trial.counts and trial.state == "running" for trial in trials)
        return not running and self._wanting(trials).keys() <= self.exhausted.keys()

    @property
    def can_draw(self) -> bool:
        """A trial could be drawn, or taken over from a coordinator that is gone."""
        trials = self.all()
        lost = any(not (trial.settled or self._is_leased(trial)) for trial in trials)
        return lost or not self._wanting(trials).keys() <= self.exhausted.keys()

    def _is_leased(self, trial: Trial) -> bool:
        """True where a live coordinator runs the trial."""
        if trial.coordinator is None:
            return False
        return trial.coordinator == self._me or is_alive(self.folder, trial.coordinator)

    def _take_over(self, trial: Trial) -> Trial | None:
        """Take over a trial whose coordinator is gone; None where it has ended, which is then recorded in Optuna."""
        frozen = self._stored_trial(trial)
        ended = frozen.user_attrs.get(ENDED)
        if ended is not None:
            self._settle(trial, ended["state"], ended["values"])
        elif not trial.fingerprints:
            self.finish(trial, "lost", error="its coordinator ended before it was drawn")
            # Requested and drawn values alike are queued again: a sequence gives each point once.
            if wanted := frozen.system_attrs.get("fixed_params", {}) | frozen.params:
                attributes = {name: value for name, value in frozen.user_attrs.items() if name == RETRY}
                self._studies[trial.arm].enqueue_trial(wanted, user_attrs=attributes)
        else:
            return self._run(trial, trial.fingerprints)
        return None

    def _draw(self, arm: str) -> Trial | None:
        """A trial at a new, feasible point; None if there is none any more, with the reason in `exhausted`."""
        space, study = self.search.spaces[arm], self._studies[arm]
        trials = self.of(arm)
        seen = {name: trial for trial in trials if trial.counts or trial.retried for name in trial.fingerprints}
        count, listed = sum(trial.counts for trial in trials), False
        why = f"{IN_VAIN} draws found no new feasible point after {count} trials"
        for in_vain in range(IN_VAIN):
            if in_vain % PATIENT == PATIENT - 1 and not listed:  # queue an untried point
                untried = self._untried(space, seen)
                listed = untried is not None
                if untried == []:
                    why = f"no further point after {count} trials; the space holds no other that is feasible"
                    break
                if untried:
                    number = len(study.get_trials(deepcopy=False))
                    study.enqueue_trial(dict(untried[(number * 7919) % len(untried)]))
            if (trial := self._attempt(space, study, seen)) is not None:
                return trial
        study.set_user_attr(EXHAUSTED, f"{arm}: {why}")
        return None

    def _attempt(self, space: ArmSpace, study: optuna.Study, seen: Mapping[str, Trial]) -> Trial | None:
        """One draw; None for a point that is infeasible or was tried, with the reason in the storage."""
        study.sampler = make_sampler(self.search.sweep, len(study.get_trials(deepcopy=False)))
        drawn = study.ask()
        point = space.draw(lambda dimension: _suggest(drawn, dimension))
        trial = Trial(space.arm.name, drawn.number, point, "running", coordinator=self._me)
        names, excess, broken = self._judge(space, point)
        for text, amount in excess.items():
            drawn.set_constraint(text, amount)
        if broken:
            self.finish(trial, "infeasible", error=broken)
            return None
        earlier = seen.get(names[0])
        if earlier is not None and RETRY not in self._stored_trial(trial).user_attrs:
            self.finish(trial, "repeated", error=f"the same as trial {earlier.number}")
            return None
        return self._run(trial, names)

    def _judge(self, space: ArmSpace, point: Point) -> tuple[tuple[str, ...], dict[str, float], str]:
        """(fingerprints of its stages, excess of each constraint, reason why it is infeasible or "")."""
        try:
            experiment = space.experiment(point)
            excess = self.search.excess(experiment)
        except (InputError, ValueError) as error:
            return (), {"its values go together": 1.0}, str(error)
        broken = some([text for text, amount in excess.items() if amount > 0])
        return () if broken else self._fingerprints(experiment), excess, broken

    def _run(self, trial: Trial, names: Sequence[str]) -> Trial:
        """Lease a trial to this coordinator."""
        self._optuna_trial(trial).set_user_attr(RUN, {"coordinator": self._me, "fingerprints": list(names)})
        return replace(trial, coordinator=self._me, fingerprints=tuple(names))

    def _untried(self, space: ArmSpace, seen: Mapping[str, Trial]) -> list[Point] | None:
        """Untried feasible points of a finite space; None for a space that is too large to be listed."""
        arm = space.arm.name
        if arm not in self._feasible_points:
            points = space.every_point(COUNTABLE)
            candidates = ((point, self._judge(space, point)) for point in points or ())
            feasible = [(point, names[0]) for point, (names, _, broken) in candidates if not broken]
            self._feasible_points[arm] = None if points is None else feasible
        named_points = self._feasible_points[arm]
        return None if named_points is None else [point for point, name in named_points if name not in seen]

    def _fingerprints(self, experiment: Experiment) -> tuple[str, ...]:
        if not self.search.trains:  # no text is read, so it has no digest
            return (fingerprint(experiment.model_dump(mode="json")),)
        seeds = self.search.sweep.seeds
        return tuple(pretrain_fingerprint(experiment.model_copy(update={"seed": seed})) for seed in seeds)

    def report(self, trial: Trial, progress: int, value: float) -> bool:
        """Report a value to the pruner. Returns whether to prune the trial; the arm's default setting never is."""
        optuna_trial = self._optuna_trial(trial)
        if progress in self._stored_trial(trial).intermediate_values:  # it was resumed from an earlier checkpoint
            return False
        optuna_trial.report(value, progress)
        is_default = trial.point == self.search.firsts[trial.arm][0]
        verdict = bool(optuna_trial.should_prune()) and not is_default  # always called: it records the rungs
        if verdict:  # stored before the trial ends, so that it holds for any coordinator
            optuna_trial.set_user_attr(PRUNE_DECIDED, True)
        return verdict

    def finish(
        self,
        trial: Trial,
        ended: Ended,
        values: Sequence[float] | None = None,
        *,
        error: str | None = None,
        **spent: float,
    ) -> None:
        """Record the end of a trial, unless another coordinator has. values: those of a done one; spent: tokens, flops,
        seconds."""
        if self._stored_trial(trial).state.is_finished():  # this process was stopped, and its trial was taken over
            return
        note: dict[str, Any] = {"state": ended, "error": error and error[:LONGEST_ERROR], **spent}
        note["values"] = list(values) if values is not None else None
        if self.search.trains and ended not in NOT_COUNTED:
            # Its process has read the settings by itself, so they are read again here.
            note["origin"] = _provenance_digest(self.search.experiment(trial.arm, trial.point), in_force())
        self._optuna_trial(trial).set_user_attr(ENDED, note)
        self._settle(trial, ended, values)

    def _settle(self, trial: Trial, ended: Ended, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "infeasible": TrialState.PRUNED}
        # A diverged trial has no loss. As pruned, it counts as bad for the sampler; as failed, it would be ignored.
        states["diverged"] = TrialState.PRUNED if len(self.search.sweep.optimize) == 1 else TrialState.FAIL
        study = self._studies[trial.arm]
        study.tell(trial.number, list(values) if values is not None else None, states.get(ended, TrialState.FAIL))

    def _stored_trial(self, trial: Trial) -> optuna.trial.FrozenTrial:
        return self._studies[trial.arm].get_trials(deepcopy=False)[trial.number]

    def _optuna_trial(self, trial: Trial) -> optuna.Trial:
        import optuna

        return optuna.Trial(self._studies[trial.arm], self._stored_trial(trial)._trial_id)

    def _drawing_lock(self) -> AbstractContextManager[None]:
        message = f"others have been drawing trials of {self.search.name} for {PATIENCE:g} s; try again later"
        return held(self.folder / "claims.lock", PATIENCE, Problem(message, "sweep"))


def _suggest(trial: optuna.Trial, dimension: Dimension) -> Value:
    if dimension.levels:
        return str(trial.suggest_categorical(dimension.name, [level.label for level in dimension.levels]))
    low, high = dimension.bounds
    log, step = dimension.parameter.kind.startswith("log_"), dimension.parameter.step
    if dimension.integer_valued:
        return trial.suggest_int(dimension.name, int(low), int(high), step=int(step or 1), log=log)
    return dimension.stored(trial.suggest_float(dimension.name, low, high, step=step, log=log))


def _provenance_digest(experiment: Experiment, trainer: TrainerParts) -> str:
    """Digest of the provenance that a training would have now. trainer: what the user adds to the Trainer."""
    return provenance_digest(provenance(experiment, trainer=trainer))
