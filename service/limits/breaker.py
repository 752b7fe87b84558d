"""Whether a shared store is asked at all. Opens after failures in a row; only a probe closes it again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from service.observability.logging import get_logger

log = get_logger(__name__)

FAILURES_TO_OPEN = 3


class Breaker:
    """Open at first. Belongs to the event loop's thread.

    `report` is told at the start and whenever it changes: True is closed, the store is asked. What fails together is
    one failure: sixteen requests that all wait while this process itself is busy are no outage.
    """

    def __init__(self, report: Callable[[bool], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._failures = 0
        self._last_failure = clock()
        self.closed = False
        self.opened = asyncio.Event()
        """Set while it is open."""
        self.opened.set()
        report(False)

    def begin(self) -> float:
        """The time at which something is asked, for `failed`."""
        return self._clock()

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, began: float, error: Exception) -> None:
        """What was asked at `began` had no answer. Counts when that was after the last failure that counted."""
        if not self.closed or began < self._last_failure:
            return
        self._last_failure = self._clock()
        self._failures += 1
        if self._failures >= FAILURES_TO_OPEN:
            self.closed = False
            self.opened.set()
            self._report(False)
            log.warning("shared_limits_down", error=type(error).__name__)

    def close(self) -> None:
        """The store answers again."""
        self._failures = 0
        self.closed = True
        self.opened.clear()
        self._report(True)
        log.info("shared_limits_up")
