"""A deadline for what is done again and again, such as one write of a stream.

`asyncio.timeout` makes a timer each time, which took 5 of the 75 microseconds that a streamed token cost, twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Alarm:
    """Calls `ring` when it has been on for `seconds`. Belongs to the running event loop; to be switched off at the end.

    Its timer is not moved with each deadline: one that comes too early sets itself again.
    """

    def __init__(self, seconds: float, ring: Callable[[], object]) -> None:
        self._seconds = seconds
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def on(self) -> None:
        """`seconds` from now."""
        self._due = self._loop.time() + self._seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._early_or_late)

    def off(self) -> None:
        self._due = None

    def stop(self) -> None:
        """Off, and not to be switched on again."""
        self._due = None
        if self._timer is not None:
            self._timer.cancel()

    def _early_or_late(self) -> None:
        self._timer = None
        if self._due is None:
            return
        if self._due > self._loop.time():
            self._timer = self._loop.call_at(self._due, self._early_or_late)
        else:
            self._due = None
            self._ring()
