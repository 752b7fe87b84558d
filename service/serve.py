"""The life of the process: listen, load, serve, drain, stop. The one place that knows signals.

The sockets listen before anything heavy is imported, so a taken port is told at once and early clients wait or get
503 instead of a refusal. The engine loads on its own thread meanwhile. A first SIGTERM or SIGINT drains with the
listeners open; a second one leaves without waiting. Exit codes are listed in `cli/`.

Everything here runs on the event loop's thread. Nothing here may import mlx, directly or not, before `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

from service.console import OWN_KEY, Console, Credential, url
from service.engine.engine import EngineState, EngineStatus
from service.errors import ModelUnavailable, ServiceError
from service.listening import FLUSH_TIMEOUT, Application, CannotListen, Listeners, Sockets, listen
from service.observability.logging import get_logger
from service.settings import Settings

_log = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

STOP_TIMEOUT = 10.0
"""Seconds for the generation thread to leave its step and free the model; then the process leaves without it."""

LEAVE_TIMEOUT = 5.0
"""Seconds at the end for logs and streams: a pipe that nobody reads must not keep the process."""

EX_CANNOT_LISTEN = 1


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


class App(Application, Protocol):
    """What `service.app.build` returns."""

    @property
    def engine(self) -> EngineControl: ...

    def open(self) -> DevelopmentKey | None:
        """Make ready what must be before the first request. Blocks. Raises ConfigurationError."""


def run(
    settings: Settings,
    build: Callable[[Settings], App] | None = None,
    leave: Callable[[int], object] | None = None,
    *,
    supervised: bool = False,
) -> int:
    """Serve until told to stop; returns the process's exit code. Must be called on the main thread.

    `leave` ends the process on the spot, for a second signal and for a generation thread that does not end.
    `supervised` is how the process was started.
    Raises ConfigurationError for what only shows when it is used, such as a certificate.
    """
    try:
        sockets = listen(settings)
    except CannotListen as error:
        sys.stderr.write(f"mlxd: {error}\n")
        return EX_CANNOT_LISTEN
    if leave is None:
        leave = leave_now
    app = (build or partial(_build, supervised=supervised))(settings)
    listeners = Listeners(settings, app, sockets)
    console = _console(settings, sockets, _credential(settings, app.open()))
    process = Process(listeners, app.engine, console, drain_timeout=settings.engine.drain_timeout, leave=leave)
    with asyncio.Runner(loop_factory=listeners.loop_factory) as runner:
        return runner.run(process.run())


def leave_now(code: int) -> NoReturn:
    """End the process with `code`, without the interpreter's own finalisation; what is written is flushed, for as
    long as somebody takes it.

    mlx's thread-local compile cache asks for the interpreter while it finalises, and the process aborts: seen
    with mlx 0.32.4 on Python 3.11 at every fifth clean stop (`Thread.join` returns before they are destroyed).
    """
    flushing = threading.Thread(target=_flush, name="flush", daemon=True)
    flushing.start()
    flushing.join(LEAVE_TIMEOUT)
    os._exit(code)


def _flush() -> None:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody may be reading any more
            stream.flush()


def _build(settings: Settings, *, supervised: bool) -> App:
    from service.app import build  # the first import of mlx

    return build(settings, supervised=supervised)


def _console(settings: Settings, sockets: Sockets, credential: Credential | None) -> Console:
    """Tells the addresses as they came to be: a port that was 0 has a number now."""
    server, ops = settings.server, settings.ops
    tls = server.tls_certificate is not None
    operators = None
    if ops.address is not None and sockets.ops is not None:
        operators = url(ops.address[0], sockets.ops.getsockname()[1], tls=tls and not ops.loopback)
    return Console(
        sys.stdout,
        url=url(server.host, sockets.public.getsockname()[1], tls=tls),
        ops=operators,
        credential=credential,
    )


def _credential(settings: Settings, key: DevelopmentKey | None) -> Credential | None:
    """What the banner's example shows; None where nobody is asked."""
    if not settings.auth.enabled:
        return None
    return OWN_KEY if key is None else Credential(key.text, f"$(cat {shlex.quote(str(key.file))})")


class Process:
    """One run of the service, from listening sockets to an exit code."""

    def __init__(
        self,
        listeners: Listeners,
        engine: EngineControl,
        console: Console,
        *,
        drain_timeout: float,
        leave: Callable[[int], object],
    ) -> None:
        self._listeners = listeners
        self._engine = engine
        self._console = console
        self._drain_timeout = drain_timeout
        self._leave = leave
        self._draining: asyncio.Task[None] | None = None
        self._exit_code = os.EX_OK

    async def run(self) -> int:
        """Serve until a signal or a failed engine ends it; returns the exit code."""
        _log.info("listening", url=self._console.url, ops=self._console.ops)
        with self._signals():
            await self._engine.start()
            beside = [
                asyncio.create_task(self._console.follow(self._engine.status), name="console"),
                asyncio.create_task(self._end_with_engine(), name="end-with-engine"),
            ]
            if not await self._listeners.serve():
                self._exit_code = os.EX_SOFTWARE
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
            await self._stop()
        _log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._draining is not None or self._listeners.closing:
            _log.warning("forced_exit", signal=number.name)
            self._leave(128 + number)
            return
        self._draining = asyncio.create_task(self._drain(), name="drain")
        _log.info("draining", signal=number.name, timeout=self._drain_timeout)
        self._console.draining(self._engine.status(), self._drain_timeout)

    async def _drain(self) -> None:
        """Let running work end while the listeners still answer 503 to new work; then close them."""
        try:
            async with asyncio.timeout(self._drain_timeout + FLUSH_TIMEOUT):
                await self._engine.drain(self._drain_timeout)
        except TimeoutError:
            _log.error("drain_overdue", timeout=self._drain_timeout)
        finally:
            self._listeners.close()

    async def _end_with_engine(self) -> None:
        """When the engine is lost, let the answers that it left behind go out, then end with its code."""
        await self._engine.wait(EngineState.FAILED)
        missing = isinstance(self._engine.failure, ModelUnavailable)
        self._exit_code = os.EX_UNAVAILABLE if missing else os.EX_SOFTWARE
        self._console.failed(self._engine.status())
        self._listeners.close()

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._engine.stop()
        except TimeoutError:
            _log.error("engine_stop_overdue", timeout=STOP_TIMEOUT)
            self._leave(self._exit_code)  # the thread is lost either way: loading, or wedged in a step
