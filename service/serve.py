"""`mlxd serve`: the sockets, the application and the process that serves it, put together.

The sockets listen before anything heavy is imported, so a taken port is told at once and early clients wait or get
503 instead of a refusal. Exit codes are listed in `cli/`. Nothing here may import mlx, directly or not, before `run`.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable

from service.console import OWN_KEY, Console, Credential, url
from service.hangup import hangups_of
from service.leaving import StopGuard, leave_now
from service.listening import CannotListen, Listeners, Sockets, listen
from service.process import App, DevelopmentKey, Process
from service.reload import Reloader
from service.settings import Settings

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

    `leave` ends the process on the spot, for a second signal and for what does not end. `supervised`: somebody starts
    the process again when its exit code is not 0. `load` reads the settings anew, for a reload.
    Raises ConfigurationError for what only shows when it is used, such as a certificate.
    """
    hangups = hangups_of(supervised)
    try:
        sockets = listen(settings)
    except CannotListen as error:
        sys.stderr.write(f"mlxd: {error}\n")
        return EX_CANNOT_LISTEN
    leave = leave or leave_now
    app = (build or _build)(settings)
    listeners = Listeners(settings, app, sockets)
    process = Process(
        listeners,
        app,
        _console(settings, sockets, _credential(settings, app.open())),
        drain_timeout=settings.engine.drain_timeout,
        leave=leave,
        supervised=supervised,
        reloader=Reloader(settings, load or (lambda: settings), app, app.reloads),
        hangups=hangups,
        guard=(guard := StopGuard(leave)),
    )
    with app.watch(), asyncio.Runner(loop_factory=listeners.loop_factory) as runner:
        code = runner.run(process.run())
    guard.disarm()
    return code


def _build(settings: Settings) -> App:
    from service.app import build  # the first import of mlx

    return build(settings)


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
