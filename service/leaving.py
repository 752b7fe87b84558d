"""How the process ends: on the spot, and in time whatever hangs in it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from service.observability.logging import get_logger

log = get_logger(__name__)

LEAVE_TIMEOUT = 5.0
"""Seconds at the end for logs and streams: a pipe that nobody reads must not keep the process."""

TEARDOWN_TIMEOUT = 20.0
"""Seconds after `engine.drain_timeout` at which a process that was told to stop has ended, done or not. What ends it
from outside (launchd's ExitTimeOut) must wait longer."""


class StopGuard:
    """Ends the process by `leave(code())`, from a thread of its own, when the time is over. Any thread may call."""

    def __init__(self, leave: Callable[[int], object]) -> None:
        self._leave = leave
        self._timer: threading.Timer | None = None

    def arm(self, seconds: float, code: Callable[[], int]) -> None:
        """Begin to count; only the first call counts."""
        if self._timer is None:
            self._timer = threading.Timer(seconds, self._overdue, (seconds, code))
            self._timer.daemon = True
            self._timer.start()

    def _overdue(self, seconds: float, code: Callable[[], int]) -> None:
        log.error("stop_overdue", seconds=seconds)
        self._leave(code())

    def disarm(self) -> None:
        """All has ended in time."""
        if self._timer is not None:
            self._timer.cancel()


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
