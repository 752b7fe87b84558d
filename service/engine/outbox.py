"""When text is handed to the event loop: after every step, or after some of them where steps are short.

A hand-over wakes one task for each stream and writes to its socket, which takes more time than many a step: 32 streams
of a model whose steps take four milliseconds had half of a core for it. Nobody reads that fast. It also takes the
interpreter from the thread that launches the next step, 57 us for each stream on the host of an H100; so it comes when
that step has been launched, where one follows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum, auto

from service.engine.backend import nothing
from service.engine.generation import Delta, Generation

FEW, MOST = 16, 2.0
"""Streams up to which the interval is as configured, and times as long that it gets for more of them."""

Delivery = tuple[Generation, Delta]

Deliver = Callable[[Sequence[Delivery], Callable[[], object]], object]
"""Bring deltas to the event loop, which calls what comes with them when it has the interpreter."""

HEARD = 0.001
"""Seconds for which the generation thread waits at most until the loop has a first text: it would go on to launch the
next step, which keeps the interpreter from the loop for half a millisecond or more."""

ALONE = 4
"""Streams up to which it does: the loop takes its time for many, and other prompts may be waiting for the next step (32
streams in waves of a tiny model on two cores had first tokens 4.6 ms later, in the median of ten rounds)."""


class When(Enum):
    """Where the generation thread is when it looks into the outbox."""

    NOW = auto()
    """Nobody knows when it looks again."""
    BEFORE = auto()
    """A step begins, of the rows that had the one before, and it has just looked."""
    DURING = auto()
    """The step has been launched, and the interpreter is not needed."""
    AFTER = auto()
    """The step has ended."""


class Outbox:
    """What waits for the hand-over to `deliver`, a delta for each generation. Whoever posts holds the worker's `lock`.

    Text may wait for the next step while that is no further from `interval` seconds after the last hand-over than now
    is; from 16 to 32 streams the interval grows to twice as much. Where the next step `overlaps` with the hand-over it
    waits until that has been launched. A row's first text, its end and an error never wait, and whatever waits goes
    with them. Where there are few streams the next step waits until the loop has a first text.
    """

    def __init__(
        self,
        interval: float,
        *,
        lock: AbstractContextManager[object],
        clock: Callable[[], float],
        deliver: Deliver,
    ) -> None:
        self._interval = interval
        self._lock = lock
        self._clock = clock
        self._deliver = deliver
        self._waiting: dict[Generation, Delta] = {}
        self._urgent = self._first = False
        self._handed_over = float("-inf")
        self._pace: float | None = None
        self._overlaps = False

    def post(self, generation: Generation, delta: Delta, *, urgent: bool) -> None:
        before = self._waiting.get(generation)
        self._waiting[generation] = delta if before is None else before.merged(delta)
        self._urgent |= urgent
        self._first |= urgent and not delta.final

    def stepped(self, pace: float | None, *, overlaps: bool) -> None:
        """A step has ended, and one as long as `pace` comes; None: nobody knows. `overlaps` as `StepResult`'s."""
        self._pace, self._overlaps = pace, overlaps and pace is not None

    def hand_over(self, when: When = When.NOW) -> None:
        """Deliver what is not to wait any longer. Takes the lock; either thread."""
        with self._lock:
            first = self._first and when is When.AFTER
            taken = self._take(self._clock(), when)
        if first and len(taken) <= ALONE:
            heard = threading.Event()
            self._deliver(taken, heard.set)
            heard.wait(HEARD)
        elif taken:
            self._deliver(taken, nothing)

    def _take(self, now: float, when: When) -> list[Delivery]:
        if not self._waiting or (not self._urgent and self._may_wait(now, when)):
            return []
        taken, self._waiting, self._urgent, self._first = self._waiting, {}, False, False
        self._handed_over = now
        return list(taken.items())

    def _may_wait(self, now: float, when: When) -> bool:
        if when is When.NOW or self._pace is None:
            return False
        if when is When.BEFORE or (when is When.AFTER and self._overlaps):
            return True
        interval = self._interval * min(MOST, max(1.0, len(self._waiting) / FEW))
        return now - self._handed_over + self._pace / 2 < interval
