"""From nothing to a warm model: loading as often as it takes, then warm-up, each telling how far it is.

Belongs to the generation thread, but for reports of a download, which come from its own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from service.engine.backend import Backend, ModelInfo
from service.engine.progress import Phase, Progress
from service.engine.states import EngineState
from service.engine.telemetry import Telemetry
from service.supervision.attempts import Attempts


class StoppedLoading(Exception):
    """The service stops while the model loads or warms."""


class Heard(Protocol):
    """Hears the state, what of it is done, and how many of how many (0 of 0 where that is unknown)."""

    def __call__(self, state: EngineState, detail: str, done: int, total: int) -> None: ...


class Startup:
    """One start of a backend, tried as `attempts` says until `stopping` is set. Any thread may call `heard`."""

    def __init__(
        self,
        backend: Backend,
        *,
        attempts: Attempts,
        telemetry: Telemetry,
        progress: Progress,
        stopping: threading.Event,
        heard: Heard,
    ) -> None:
        self._backend = backend
        self._attempts = attempts
        self._telemetry = telemetry
        self._progress = progress
        self._stopping = stopping
        self._heard = heard

    def run(self, loaded: Callable[[ModelInfo], None]) -> ModelInfo:
        """Load, call `loaded`, and warm up. Raises ModelUnavailable, and StoppedLoading between two stages."""
        waits = partial(self._stage, EngineState.STARTING)
        info = self._attempts.run(self._load, tell=waits, pause=self._pause)
        loaded(info)
        self._progress.enter(Phase.WARMING)
        self._stage(EngineState.WARMING, "warming up")
        with self._telemetry.warming():
            self._backend.warm_up(
                lambda what, done, total: self._stage(EngineState.WARMING, f"{what} ({done}/{total})", done, total)
            )
        return info

    def _load(self) -> ModelInfo:
        with self._telemetry.loading():
            return self._backend.load(self._report_loading)

    def _pause(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise StoppedLoading

    def _report_loading(self, what: str, done: int, total: int) -> None:
        """How far a download or conversion is. Raises nothing through its code."""
        self._progress.reported()
        self._heard(EngineState.STARTING, what, done, total)

    def _stage(self, state: EngineState, detail: str, done: int = 0, total: int = 0) -> None:
        if self._stopping.is_set():
            raise StoppedLoading
        self._progress.reported()
        self._heard(state, detail, done, total)
