"""`mlxd serve`: the sockets, the application and the process that serves it, put together.

The sockets listen before anything heavy is imported, so a taken port is told at once and early clients wait or get
503 instead of a refusal. Exit codes are listed in `cli/`. Nothing here may import mlx, directly or not, before `run`.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import Callable

from service.console import OWN_KEY, Console, Credential, url
from service.hangup import hangups_of
from service.leaving import StopGuard, leave_now
from service.listening import CannotListen, LateSockets, Listeners, Sockets, listen
from service.process import App, DevelopmentKey, Process
from service.reload import Reloader
from service.settings import Settings
from service.supervision.attempts import Attempts
from service.supervision.start import Start, prepare

__all__ = ["EX_CANNOT_LISTEN", "leave_now", "run"]

EX_CANNOT_LISTEN = 1


def run(
    settings: Settings,
    build: Callable[[Settings], App] | None = None,
    leave: Callable[[int], object] | None = None,
    *,
    supervised: bool = False,
    load: Callable[[], Settings] | None = None,
) -> int:
    """Serve until told to stop; returns the process's exit code. Must be called on the main thread.

    `leave` ends the process on the spot, for a second signal and for what does not end. `supervised`: what may pass is
    waited for, and what will not ends with 0. `load` reads the settings anew, for a reload. Raises ConfigurationError
    for what only shows when it is used, such as a certificate.
    """
    hangups = hangups_of(supervised)
    start = prepare(settings, supervised=supervised)
    as_loaded, settings = settings, start.settings
    start.begin()
    if start.verdict.give_up:
        return start.end(os.EX_OK, start.verdict.give_up)
    sockets = _listen(settings, supervised=supervised)
    if sockets is None:
        return EX_CANNOT_LISTEN
    attempts = start.attempts(sockets.missing) if isinstance(sockets, LateSockets) else start.attempts()
    app = _build(start, attempts) if build is None else build(settings)
    leave = start.leaving(leave or leave_now)
    process = Process(
        Listeners(settings, app, sockets),
        app,
        _console(settings, sockets, _credential(settings, app.open())),
        drain_timeout=settings.engine.drain_timeout,
        leave=leave,
        ready=start.ready,
        supervised=supervised,
        reloader=Reloader(as_loaded, load or (lambda: as_loaded), app, app.reloads),
        hangups=hangups,
        guard=(guard := StopGuard(leave)),
    )
    code = _run(process, app, guard)
    return start.end(code, "" if app.engine.failure is None else app.engine.failure.message)


def _listen(settings: Settings, *, supervised: bool) -> Sockets | LateSockets | None:
    """None where an address cannot be had, which is told; a supervised start tries on."""
    try:
        return LateSockets(settings) if supervised else listen(settings)
    except CannotListen as error:
        sys.stderr.write(f"mlxd: {error}\n")
        return None


def _run(process: Process, app: App, guard: StopGuard) -> int:
    with app.watch(), asyncio.Runner(loop_factory=process.loop_factory) as runner:
        code = runner.run(process.run())
    guard.disarm()
    return code


def _build(start: Start, attempts: Attempts) -> App:
    from service.app import build  # the first import of mlx

    return build(start.settings, start=start, attempts=attempts)


def _console(settings: Settings, sockets: Sockets | LateSockets, credential: Credential | None) -> Console:
    """Tells the addresses as they came to be: a port that was 0 has a number now."""
    server, ops = settings.server, settings.ops
    tls = server.tls_certificate is not None
    operators = None
    if ops.address is not None:
        operators = url(ops.address[0], _port(sockets.ops, ops.address[1]), tls=tls and not ops.loopback)
    return Console(
        sys.stdout,
        url=url(server.host, _port(sockets.public, server.port), tls=tls),
        ops=operators,
        credential=credential,
    )


def _port(had: socket.socket | None, wanted: int) -> int:
    return wanted if had is None else int(had.getsockname()[1])


def _credential(settings: Settings, key: DevelopmentKey | None) -> Credential | None:
    """What the banner's example shows; None where nobody is asked."""
    if not settings.auth.enabled:
        return None
    return OWN_KEY if key is None else Credential(key.text, f"$(cat {shlex.quote(str(key.file))})")
