"""What a scrape reads and renders. Rendering takes milliseconds and is done in a thread: it must not stop the loop."""

from __future__ import annotations

import asyncio
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version

from service import __version__
from service.auth.access_control import AccessControl
from service.engine.engine import Engine, EngineState, EngineStatus
from service.limits.limiter import Limits
from service.observability.aliases import WithAliases
from service.observability.exposition import render
from service.observability.logging import lines_dropped
from service.observability.metrics import Metrics
from service.settings import Settings


class Scraper:
    """Reads what is only known at the moment, and renders. Belongs to the event loop's thread.

    There is one rendering of each form at a time: who comes meanwhile gets the same.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        engine: Engine,
        limits: Limits,
        access: AccessControl,
        loop_age: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._engine = engine
        self._limits = limits
        self._access = access
        self._loop_age = loop_age
        self._versions = (__version__, platform.python_version(), version("mlx"), version("mlx-lm"))
        self._dropped = 0
        self._rendering: dict[str, asyncio.Task[bytes]] = {}

    async def scrape(self, form: str) -> bytes:
        """Every series, as one of the forms of `exposition`."""
        task = self._rendering.get(form)
        if task is None:
            self.read()
            task = asyncio.create_task(asyncio.to_thread(self._render, form, self._model), name="metrics")
            self._rendering[form] = task
            task.add_done_callback(lambda _: self._rendering.pop(form))
        return await asyncio.shield(task)  # who leaves must not take it from the others

    @property
    def _model(self) -> str:
        return "" if self._engine.info is None else self._engine.info.name

    def read(self) -> None:
        """Copy into the gauges what can be had at once."""
        metrics = self._metrics
        self._read_engine(self._engine.status())
        metrics.event_loop_tasks.set(len(asyncio.all_tasks()))
        metrics.reservations_open.set(self._limits.open)
        metrics.loop_age.set(self._loop_age())
        up = self._access.storage_up()
        if up is not None:
            metrics.set_known(metrics.storage_up, up)
        for issuer in self._access.issuers:
            health = issuer.keys.health
            metrics.jwks_keys.labels(issuer.settings.name).set(health.keys)
            if health.age is not None:
                metrics.jwks_age.labels(issuer.settings.name).set(health.age)
        dropped, self._dropped = self._dropped, lines_dropped()
        metrics.log_lines_dropped.inc(max(0, self._dropped - dropped))
        device = "" if self._engine.info is None else self._engine.info.device
        metrics.build_info.clear()
        metrics.build_info.labels(*self._versions, self._model, device).set(1)

    def _read_engine(self, status: EngineStatus) -> None:
        metrics, memory = self._metrics, status.memory
        gauges = (
            (metrics.requests_running, status.running),
            (metrics.requests_waiting, status.waiting),
            (metrics.rows_held, status.held),
            (metrics.step_age, status.step_age or 0.0),
            (metrics.progress_age, status.progress_age or 0.0),
            (metrics.memory_active, memory.active),
            (metrics.memory_peak, memory.peak),
            (metrics.memory_buffer_cache, memory.buffer_cache),
            (metrics.memory_reserved, status.reserved),
            (metrics.memory_budget, status.budget),
            (metrics.kv_cache_usage, status.reserved / status.budget if status.budget else 0.0),
            (metrics.prefix_cache_bytes, memory.prefix_cache),
            (metrics.prefix_cache_capacity, memory.prefix_capacity),
            (metrics.prefix_cache_entries, memory.prefix_entries),
        )
        for gauge, value in gauges:
            gauge.set(value)
        if memory.recommended is not None:
            metrics.set_known(metrics.memory_recommended, memory.recommended)
        for state in EngineState:
            metrics.engine_state.labels(state.value).set(state is status.state)

    def _render(self, form: str, model: str) -> bytes:
        """On a thread: a volume that does not answer must not stop the loop."""
        metrics = self._metrics
        metrics.set_known(metrics.state_disk_free, self._disk_free())
        if self._settings.metrics.vllm_aliases and model:
            return render(WithAliases(metrics.registry, model), form)
        return render(metrics.registry, form)

    def _disk_free(self) -> float | None:
        try:
            return shutil.disk_usage(self._settings.server.state_dir.expanduser()).free
        except OSError:
            return None
