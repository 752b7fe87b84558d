"""When a request would get its first token: from what waits and runs before it, and what work takes at the moment.

`Replay` plays the batch forward on paper: who is next by admission's order, prompts one after the other, one decode
step between two chunks. Arithmetic only: no mlx, no threads, no clock of its own. All times are seconds.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from service.engine.admission import Queues, Ticket
from service.engine.rates import Pace
from service.errors import DeadlineTooShort, DeadlineUnreachable

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Progress:
    """A running row: tokens of its prompt that are still to be read, and of output that may still come."""

    principal: str
    weight: float
    prompt: float
    output: int


@dataclass(frozen=True, slots=True)
class Line:
    """Everybody before the engine: who runs, in order of admission, who waits, and how many may run together."""

    places: int
    running: Sequence[Progress]
    queues: Queues


@dataclass(slots=True)
class _Reading:
    """A prompt in the row of prompts to read; `uid` NOBODY when it is of no interest."""

    uid: int
    prompt: float
    output: float


@dataclass(slots=True)
class Replay:
    """Plays a line forward from now, event by event. O(log n) an event; a row has two.

    A row is charged to its principal as a whole when it is admitted, what is expected of its output included.
    """

    line: Line
    pace: Pace
    seconds: float = 0.0
    waiting: int = 0
    _steps: float = 0.0
    _live: list[float] = field(default_factory=list)
    """Decode steps after which rows leave; a heap."""
    _reading: deque[_Reading] = field(default_factory=deque)
    _next: list[tuple[float, int, str]] = field(default_factory=list)
    """Principals with rows waiting, the least served first; a heap."""

    def __post_init__(self) -> None:
        served = self.line.queues.served
        for row in self.line.running:
            output = self._expected(row.output)
            served[row.principal] += output / row.weight
            if row.prompt > 0:
                self._reading.append(_Reading(NOBODY, row.prompt, output))
            else:
                heapq.heappush(self._live, output)
        waiting = self.line.queues.waiting
        self.waiting = sum(len(queue) for queue in waiting.values())
        for queue in waiting.values():
            queue.reverse()  # the next one is the last: popped in no time
        self._next = [(served[principal], queue[-1].uid, principal) for principal, queue in waiting.items()]
        heapq.heapify(self._next)

    @property
    def running(self) -> int:
        return len(self._live) + len(self._reading)

    def in_time(self, tickets: Sequence[Ticket], now: float) -> float:
        """`first_tokens` of one request's rows. Raises what `check_alone` and `in_time` raise."""
        check_alone(tickets, now, self.pace)
        return in_time(self.first_tokens(tickets), tickets, now)

    def first_tokens(self, tickets: Sequence[Ticket]) -> float:
        """Seconds until the last of these waiting rows has its first token."""
        unread = {ticket.uid for ticket in tickets}
        while unread:
            unread.discard(self.advance())
        return self.seconds + self.pace.decode(len(self._live))

    def until(self, condition: Callable[[Replay], bool]) -> float:
        """Seconds until `condition` holds; it must hold when nobody is left."""
        while not condition(self):
            self.advance()
        return self.seconds

    def advance(self) -> int:
        """Go on to the next event; the uid of the row whose prompt was read by then, NOBODY for another event.

        Raises IndexError when nobody is left.
        """
        while self._next and self.running < self.line.places:
            self._admit()
        if not self._reading:
            self._until_one_leaves()
            return NOBODY
        row = self._reading.popleft()
        rows = len(self._live)
        self.seconds += row.prompt * self.pace.reading(rows)
        self._steps += row.prompt / self.pace.chunk if rows else 0.0
        heapq.heappush(self._live, self._steps + row.output)
        self._let_go()
        return row.uid

    def _admit(self) -> None:
        served, _, principal = self._next[0]
        queue = self.line.queues.waiting[principal]
        ticket = queue.pop()
        self.waiting -= 1
        prompt = self.pace.to_read(ticket.prompt_tokens)
        output = self._expected(ticket.length - ticket.prompt_tokens)
        self._reading.append(_Reading(ticket.uid, prompt, output))
        if queue:
            heapq.heapreplace(self._next, (served + (prompt + output) / ticket.weight, queue[-1].uid, principal))
        else:
            heapq.heappop(self._next)

    def _until_one_leaves(self) -> None:
        self.seconds += (self._live[0] - self._steps) * self.pace.decode(len(self._live))
        self._steps = self._live[0]
        self._let_go()

    def _let_go(self) -> None:
        while self._live and self._live[0] <= self._steps:
            heapq.heappop(self._live)

    def _expected(self, output: int) -> float:
        """Tokens that are expected where so many may come. What has come already says nothing about the rest."""
        return max(1.0, self.pace.used * output)


def check_alone(tickets: Sequence[Ticket], now: float, pace: Pace) -> None:
    """Raise DeadlineTooShort when these rows would have no token before their deadline even without anybody else."""
    if now + pace.alone(max(ticket.prompt_tokens for ticket in tickets)) > _deadline(tickets):
        raise DeadlineTooShort(
            "Reading this prompt takes longer here than the request may. Shorten the prompt, or allow more time."
        )


def in_time(expected: float, tickets: Sequence[Ticket], now: float) -> float:
    """`expected` seconds. Raises DeadlineUnreachable when they end after the deadline of these rows."""
    if (late := now + expected - _deadline(tickets)) > 0:
        raise DeadlineUnreachable(
            "The service is too busy to begin this request before its deadline.", retry_after=late
        )
    return expected


def _deadline(tickets: Sequence[Ticket]) -> float:
    return min((ticket.deadline for ticket in tickets if ticket.deadline is not None), default=math.inf)
