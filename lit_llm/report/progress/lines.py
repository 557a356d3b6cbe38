"""Progress of a place, as lines of its log."""

from __future__ import annotations

import time

from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.trial import Trial


class PlaceLines(SweepObserver):
    """Prints what a place does, with the date and time."""

    def message(self, text: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)

    def stage_started(self, name: str) -> None:
        self.message(f"{name}: running")

    def stage_ended(self, name: str, state: str) -> None:
        self.message(f"{name}: {state}")

    def began(self, trial: Trial) -> None:
        self.message(f"{trial.name}: running")

    def ended(self, trial: Trial) -> None:
        self.message(f"{trial.name}: {trial.state}")
