"""What a SIGHUP means: that a file was rotated or edited, or that the window in which we run was closed."""

from __future__ import annotations

import asyncio
import os
import signal


def hangups_of(supervised: bool) -> asyncio.Event | None:
    """Set by each SIGHUP from now on; None where a SIGHUP is the window that was closed, and is left as it is.

    Under nohup it is ignored at the start: somebody wants the service to outlive the window.
    """
    with_window = not supervised and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    if with_window and _has_terminal():
        return None
    hangups = asyncio.Event()
    signal.signal(signal.SIGHUP, lambda *_: hangups.set())
    return hangups


def _has_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
