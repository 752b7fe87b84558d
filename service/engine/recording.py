"""The real backend, leaving a record of its speed: what `mlxd doctor` compares."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from service.engine.loading import LoadedModel, Report, load_model, unheard
from service.engine.mlx_backend import MlxBackend
from service.engine.speed_record import Speed, Started, record
from service.settings import ConfigurationError, Settings


class RecordingBackend(MlxBackend):
    """Writes what warm-up measured into the state directory, as of a process `started` like this."""

    def __init__(
        self,
        settings: Settings,
        started: Started,
        *,
        load: Callable[[Settings, Report], LoadedModel] = load_model,
        now: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(settings, load=load)
        self._folder = settings.server.state_dir
        self._started = started
        self._now = now

    @property
    def speed(self) -> Speed:
        """What warm-up measured."""
        return Speed.of(self.pacer.costs, model=self.info.name, device=self.info.device, at=self._now())

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """As MlxBackend's. A record that cannot be written is logged, and no more."""
        super().warm_up(progress)
        try:
            record(self._folder, self._started, self.speed)
        except ConfigurationError as error:
            structlog.get_logger("engine").warning("speed_not_recorded", reason=str(error))


def measure(settings: Settings) -> Speed:
    """Load and warm the configured model, and leave the record of a shell. Takes a start's time. Any thread.

    Raises ModelUnavailable.
    """
    with ThreadPoolExecutor(1, "generation") as own:  # mlx's streams of a thread end with the backend
        return own.submit(_measure, settings).result()


def _measure(settings: Settings) -> Speed:
    backend = RecordingBackend(settings, Started.SHELL)
    try:
        backend.load()
        backend.warm_up(unheard)
        return backend.speed
    finally:
        backend.close()
