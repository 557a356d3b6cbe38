"""Background thread that keeps MLflow up to date without delaying the runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lit_llm.tracking.address import without_secrets
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord, SyncBroken, SyncUnavailable

LATER = (
    "Nothing is lost: the runs go on, their results are on disk, and MLflow is caught up once it answers - "
    "by this run, or when the same command is given again, which then trains nothing anew."
)

BROKEN = "Nothing is lost: the runs go on, and their results are on disk."


class SyncThread:
    """Runs `MlflowSync.sync` regularly in a background thread, which also does `import mlflow` (seconds).

    `records` is called in that thread. The thread is a daemon, so a coordinator can end without `close`. Do not fork
    beside it, as a child would inherit locks held in mid-import: use spawn or a fork server for workers.
    """

    def __init__(self, sync: MlflowSync, records: Callable[[], Iterable[RunRecord]], *, seconds: float = 1.0) -> None:
        self._sync, self._records, self._seconds = sync, records, seconds
        self._wanted = threading.Event()
        """Set to sync at once; with `_closing`, for the last time."""
        self._closing = False
        self._turn = threading.Condition()
        self._begun = self._ended = 0
        """Numbers of syncs begun and ended."""
        self._finish: Callable[[], None] | None = None
        self._problem: str | None = None
        self._news: str | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def take_news(self) -> str | None:
        """Message that MLflow is not up to date, or is again; once for each outage, else None."""
        news, self._news = self._news, None
        return news

    def catch_up(self, timeout: float = 10.0) -> bool:
        """Wait until MLflow has the current records; False where it does not answer in time."""
        if self._problem is not None:
            return False  # known not to answer
        with self._turn:
            goal = self._begun + 1  # one that runs now may have read the records before
            self._wanted.set()
            ended = self._turn.wait_for(lambda: self._ended >= goal, timeout)
        return ended and self._problem is None

    def close(
        self,
        state: str,
        files: Iterable[Path] = (),
        metrics: Mapping[str, float | None] | None = None,
        note: str = "",
        complete: str = "",
        *,
        timeout: float = 60.0,
    ) -> bool:
        """Sync a last time, then call `MlflowSync.finish`. True if both succeed within `timeout` seconds.

        Ctrl-C ends the wait at once; the next run of the study replays missing data.
        """
        self._finish = lambda: self._sync.finish(state, files, metrics, note, complete)
        self._closing = True
        self._wanted.set()
        # A server that is known not to answer gets one more chance; requests to one that hangs take 10 s each.
        self._thread.join(timeout if self._problem is None else min(timeout, 15.0))
        if self._thread.is_alive():
            self._note(f"MLflow took longer than {timeout:g} s")
        return self._problem is None

    def _run(self) -> None:
        pause = self._seconds
        while not self._closing:
            self._wanted.wait(pause)
            if not self._closing:
                self._wanted.clear()
                pause = self._seconds if self._attempt() else min(2 * pause, 30.0)
        self._attempt(last=True)

    def _attempt(self, last: bool = False) -> bool:
        with self._turn:
            self._begun += 1
        try:
            self._sync.sync(self._records())
            if last and self._finish:
                self._finish()
            self._note(None)
        except SyncBroken as problem:
            self._note(str(problem), BROKEN)
        except SyncUnavailable as problem:
            self._note(str(problem))
        except Exception as problem:  # no error may stop the training
            self._note(without_secrets(f"{type(problem).__name__}: {problem}"))
        with self._turn:
            self._ended = self._begun
            self._turn.notify_all()
        return self._problem is None

    def _note(self, problem: str | None, later: str = LATER) -> None:
        if problem is not None and self._problem is None:
            self._news = f"{problem}. {later}"
        elif problem is None and self._problem is not None:
            self._news = "MLflow is back and has caught up."
        self._problem = problem
