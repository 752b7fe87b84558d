"""The life of the process: load, serve, drain, stop. The one place that handles signals.

The engine loads on its own thread while the listeners answer already. A first SIGTERM or SIGINT stops, in this order:

    not ready, and new work 503 while the listeners stay open
    what waits 503
    what runs ends, or gets a typed error after `engine.drain_timeout`
    the listeners close, and requests' exit stacks settle
    the ledger of usage and the audit log are written
    the engine is freed
    the database is closed, and then the log

A second one skips to the last line. SIGHUP reloads (`reload.py`), or stops where it says that a window was closed
(`hangup.py`). Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from service.console import Console
from service.engine.engine import EngineState, EngineStatus
from service.errors import ModelUnavailable, ServiceError
from service.leaving import TEARDOWN_TIMEOUT, StopGuard
from service.listening import FLUSH_TIMEOUT, Application, Listeners
from service.observability.logging import get_logger
from service.observability.reloads import Reloads
from service.reload import Reloadable, Reloader

_log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

STOP_TIMEOUT = 10.0
"""Seconds for the generation thread to leave its step and free the model; then the process leaves without it."""

YOUNG_OBJECTS = 20_000
"""Made and not freed since the last collection, from which on another one comes: most live as long as a request."""

CLOSE_TIMEOUT = 5.0
"""Seconds for the database to be closed, and before it for what must still be written."""


class EngineControl(Protocol):
    """What the process needs of the engine. All of it belongs to the event loop's thread."""

    @property
    def failure(self) -> ServiceError | None:
        """Why the state is `failed`."""

    def status(self) -> EngineStatus: ...

    async def wait(self, *states: EngineState) -> EngineState:
        """Wait for one of the states."""

    async def start(self) -> None:
        """Begin to load and warm; may return before that is done."""

    async def drain(self, timeout: float) -> None:
        """Refuse new work and wait for running work; what is left after `timeout` seconds ends with an error."""

    async def stop(self) -> None:
        """End the generation thread and free the model. Harmless in every state."""


class DevelopmentKey(Protocol):
    """The one key that is kept in clear, in a file that only we may read."""

    @property
    def text(self) -> str: ...

    @property
    def file(self) -> Path: ...


class App(Application, Reloadable, Protocol):
    """What `service.app.build` returns."""

    @property
    def engine(self) -> EngineControl: ...

    @property
    def reloads(self) -> Reloads: ...

    def watch(self) -> AbstractContextManager[object]:
        """Watch over engine and event loop until the block ends; what is stuck ends the process."""

    def open(self) -> DevelopmentKey | None:
        """Make ready what must be before the first request. Blocks. Raises ConfigurationError."""

    async def close(self) -> None:
        """Write what is noted, and close what `open` opened. Harmless in every state, and twice."""


class Process:
    """One run of the service, from listening sockets to an exit code.

    `hangups` None: a SIGHUP is a first SIGTERM. A thread calls `ready` when it serves.
    """

    def __init__(
        self,
        listeners: Listeners,
        app: App,
        console: Console,
        *,
        drain_timeout: float,
        leave: Callable[[int], object],
        reloader: Reloader,
        guard: StopGuard,
        ready: Callable[[], object] = bool,
        supervised: bool = False,
        hangups: asyncio.Event | None = None,
    ) -> None:
        self._listeners = listeners
        self._app = app
        self._engine = app.engine
        self._console = console
        self._drain_timeout = drain_timeout
        self._leave = leave
        self._reloader = reloader
        self._guard = guard
        self._ready = ready
        self._supervised = supervised
        self._hangups = hangups
        self._draining: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._exit_code = os.EX_OK

    @property
    def loop_factory(self) -> Callable[[], asyncio.AbstractEventLoop] | None:
        """Makes the event loop that it is to run on."""
        return self._listeners.loop_factory

    async def run(self) -> int:
        """Serve until a signal or a failed engine ends it; returns the exit code."""
        if self._listeners.bound:  # what is waited for is told by who tries it
            _log.info("listening", url=self._console.url, ops=self._console.ops)
        with self._signals():
            await self._engine.start()
            beside = [
                self._beside("console", self._console.follow(self._engine.status)),
                self._beside("end-with-engine", self._end_with_engine()),
                self._beside("tell-ready", self._tell_ready()),
                self._beside("freeze", self._freeze()),
            ]
            if self._hangups is not None:
                beside.append(self._beside("reload", self._reloader.follow(self._hangups)))
            if not await self._listeners.serve():
                self._exit_code = os.EX_SOFTWARE
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
            freed = await _in_time(STOP_TIMEOUT, "engine_stop_overdue", self._engine.stop())
            await self._close_app()
            if not freed:
                self._leave(self._exit_code)  # its thread is lost: loading, or wedged in a step
        _log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    def _beside(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_what_it_died_of)
        return task

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """At the end they are ignored: what is left to do is short, and its exit code is known."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        try:
            yield
        finally:
            for number in (*SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)

    @property
    def _stopping(self) -> bool:
        return self._draining is not None or self._listeners.closing

    def _on_hangup(self) -> None:
        """A terminal that goes away hangs up twice, by the kernel and by the shell; so it never hurries a stop."""
        if self._hangups is not None:
            self._hangups.set()
        elif not self._stopping:
            self._on_signal(signal.SIGHUP)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping:
            self._hurry(number)
            return
        self._guard.arm(self._drain_timeout + TEARDOWN_TIMEOUT, lambda: self._exit_code)
        self._draining = asyncio.create_task(self._drain(), name="drain")
        _log.info("draining", signal=number.name, timeout=self._drain_timeout)
        self._console.draining(self._engine.status(), self._drain_timeout)

    def _hurry(self, number: signal.Signals) -> None:
        """Close the database and leave, at the second signal; only leave, at the third."""
        code = os.EX_OK if self._supervised else 128 + number
        if self._leaving is not None:
            self._leave(code)
            return
        _log.warning("forced_exit", signal=number.name, exit_code=code)
        self._leaving = asyncio.create_task(self._leave_early(code), name="leave")

    async def _leave_early(self, code: int) -> None:
        await self._close_app()
        self._leave(code)

    async def _drain(self) -> None:
        """Let running work end while the listeners still answer 503 to new work; then close them."""
        try:
            limit = self._drain_timeout + FLUSH_TIMEOUT
            await _in_time(limit, "drain_overdue", self._engine.drain(self._drain_timeout))
        finally:
            self._listeners.close()

    async def _end_with_engine(self) -> None:
        """When the engine is lost, let the answers that it left behind go out, then end with its code."""
        await self._engine.wait(EngineState.FAILED)
        missing = isinstance(self._engine.failure, ModelUnavailable)
        self._exit_code = os.EX_UNAVAILABLE if missing else os.EX_SOFTWARE
        self._guard.arm(TEARDOWN_TIMEOUT, lambda: self._exit_code)
        self._console.failed(self._engine.status())
        self._listeners.close()

    async def _freeze(self) -> None:
        """What has been imported and loaded stays. A full collection that visits it all again stops every thread: 73
        ms on two slow cores, 9 without that. Nor need one come every 700 objects: that took 4 % of the event loop."""
        await self._engine.wait(EngineState.WARMING, EngineState.READY)
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])

    async def _tell_ready(self) -> None:
        await self._engine.wait(EngineState.READY)
        await asyncio.to_thread(self._ready)

    async def _close_app(self) -> None:
        await _in_time(CLOSE_TIMEOUT, "close_overdue", self._app.close())


async def _in_time(seconds: float, overdue: str, work: Awaitable[object]) -> bool:
    """Wait for `work`; after so many seconds it is given up, the event `overdue` is logged, and the answer is False."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        _log.error(overdue, timeout=seconds)
        return False
    return True


def _log_what_it_died_of(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task_died", task=task.get_name(), exc_info=error)
