"""How late the event loop is, and what held it up: everybody's stream stands still for as long."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from service.observability.logging import get_logger

log = get_logger(__name__)

INTERVAL = 0.1
"""Seconds between two looks; a look costs microseconds."""

TOO_LATE = 0.25
"""Seconds of standing still after which the log says where."""


class Heartbeat:
    """Whether an event loop answers, asked from another thread, one question at a time. `clock` is monotonic.

    `tell` has a call run on the loop, and neither waits nor raises; False where there is no loop to run it.
    """

    def __init__(self, tell: Callable[[Callable[[], None]], bool], *, clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._asked: float | None = None
        self._answered = clock()

    def ask(self) -> None:
        """Ask, unless an answer is due. One thread."""
        if self._asked is None:
            self._asked = self._clock()
            if not self._tell(self._answer):
                self._asked = None

    def _answer(self) -> None:
        self._answered, self._asked = self._clock(), None

    @property
    def age(self) -> float:
        """Seconds since the last answer. Any thread."""
        return self._clock() - self._answered

    @property
    def silence(self) -> float:
        """Seconds for which an answer is due: 0 when none is. Any thread."""
        asked = self._asked
        return 0.0 if asked is None else self._clock() - asked


class LoopWatch:
    """A timer on the loop that measures its own lateness, and a thread that looks at the loop while it stands still.

    `observe` gets each lateness in seconds, on the loop. `clock` is monotonic.
    """

    def __init__(
        self,
        observe: Callable[[float], object],
        *,
        interval: float = INTERVAL,
        too_late: float = TOO_LATE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._observe = observe
        self._interval = interval
        self._too_late = too_late
        self._clock = clock
        self._sleep = sleep
        self._due = clock()
        self._told: float | None = None
        self._loop_thread = 0
        self._stop = threading.Event()

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Watch the running loop until the block ends."""
        self._loop_thread = threading.get_ident()
        self._due = self._clock() + self._interval
        task = asyncio.create_task(self._follow(), name="event-loop-lag")
        thread = threading.Thread(target=self._look_on, name="event-loop-lag", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(thread.join)

    async def _follow(self) -> None:
        while True:
            self._due = self._clock() + self._interval
            await self._sleep(self._interval)
            self._observe(max(0.0, self._clock() - self._due))

    def _look_on(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()

    def look(self) -> None:
        """Log where the loop stands if it is late; once for each time that it is. Any thread but the loop's own."""
        due = self._due
        late = self._clock() - due
        if late <= self._too_late or due == self._told:
            return
        self._told = due
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - the one way to see another thread's stack
        stack = traceback.format_stack(frame) if frame is not None else []
        log.warning("event_loop_lag", late=round(late, 3), stack="".join(stack))
