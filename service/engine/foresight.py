"""What the books of the worker say of the wait of who comes now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from service.engine.admission import Admission, Ticket
from service.engine.backend import StepResult
from service.engine.expected_wait import Line, Progress, Replay, check_alone, in_time
from service.engine.jobs import Job
from service.engine.lineup import Lineup
from service.engine.rates import Pace, Rates
from service.errors import QueueFull

LONG_LINE = 64
"""Rows waiting, from which on a replay is remembered: for a thousand it takes 4 ms, of which who comes would take one
each."""

CHANGE = 1 / 16
"""Share of the line, and of one's own part of it, that may come or go before it is played anew."""

FRESH = 1.0
"""Seconds for which a replay is remembered at most."""


class Foreseen(NamedTuple):
    """What a replay said `at` a time, while so many rows were `waiting`, of which so many were `mine`.

    `seconds` are those before one's own prompt is read.
    """

    at: float
    seconds: float
    waiting: int
    mine: int

    def then(self, now: float, waiting: int, mine: int) -> float | None:
        """The same for who comes now; None when too much has changed."""
        changed = abs(waiting - self.waiting) > CHANGE * self.waiting or abs(mine - self.mine) > 1 + CHANGE * self.mine
        if changed or now - self.at > FRESH:
            return None
        return self.seconds * (mine + 1) / (self.mine + 1)


class Foresight:
    """Reads the books under their `lock`, and plays them forward without it. `batch` gives the running rows.

    `wait` belongs to the event loop.

    `rates` is for the worker to teach, under the lock; `learn` takes it.
    """

    def __init__(
        self,
        admission: Admission,
        lineup: Lineup,
        batch: Callable[[], Sequence[Job]],
        lock: AbstractContextManager[object],
    ) -> None:
        self.rates = Rates()
        self._admission = admission
        self._lineup = lineup
        self._batch = batch
        self._lock = lock
        self._seen: dict[str | int, Foreseen] = {}

    def learn(self, result: StepResult, seconds: float) -> None:
        """A step of the backend took `seconds`."""
        with self._lock:
            self.rates.step(result, seconds)

    def wait(self, tickets: Sequence[Ticket], now: float) -> float | None:
        """Seconds until the last of one request's rows would have its first token; None when too little is known.

        Raises InvalidRequest for what could never be served, QueueFull and DeadlineUnreachable for what may be later.
        """
        principal = tickets[0].principal
        try:
            with self._lock:
                self._admission.check(tickets)
                pace, line = self.rates.pace(), self._line(principal)
                expected = self._remembered(principal, now, line)
                outlook = self._outlook(tickets, now, pace) if expected is None else None
        except QueueFull as full:
            if full.should_retry is not False:
                full.retry_after = self._room(len(tickets), now) or full.retry_after
            raise
        if pace is None:
            return None
        check_alone(tickets, now, pace)
        own = pace.alone(max(ticket.prompt_tokens for ticket in tickets))
        if outlook is not None:
            expected = outlook.first_tokens(tickets)
            self._remember(principal, now, max(0.0, expected - own), line)
        elif expected is not None:
            expected += own
        return None if expected is None else in_time(expected, tickets, now)

    def _room(self, rows: int, now: float) -> float | None:
        """Seconds until the full queue has room for so many; None when too little is known."""
        with self._lock:
            line = self._line(None)
            if (seconds := self._remembered(rows, now, line)) is not None:
                return seconds
            outlook = self._outlook((), now, self.rates.pace())
        if outlook is None:
            return None
        seconds = outlook.until(lambda o: self._admission.has_room(rows, o.waiting, o.running))
        return self._remember(rows, now, seconds, line)

    def _line(self, principal: str | None) -> tuple[int, int]:
        """Rows that wait, and those of `principal` (None: everybody's)."""
        waiting = self._admission.waiting
        return waiting, waiting if principal is None else self._admission.waiting_of(principal)

    def _remembered(self, what: str | int, now: float, line: tuple[int, int]) -> float | None:
        """What is remembered of a principal's wait, or of that for so many places."""
        seen = self._seen.get(what)
        return None if seen is None else seen.then(now, *line)

    def _remember(self, what: str | int, now: float, seconds: float, line: tuple[int, int]) -> float:
        if line[0] < LONG_LINE or len(self._seen) > line[0]:
            self._seen.clear()
        if line[0] >= LONG_LINE:
            self._seen[what] = Foreseen(now, seconds, *line)
        return seconds

    def _outlook(self, tickets: Sequence[Ticket], now: float, pace: Pace | None) -> Replay | None:
        """The line with `tickets` at their places in it; None when too little is known to play it forward."""
        if pace is None:
            return None
        batch = self._batch()
        places = 1 if self._lineup.stalled else self._admission.places
        return Replay(Line(max(places, len(batch)), _progress(batch, now, pace), self._admission.queues(tickets)), pace)


def _progress(running: Sequence[Job], now: float, pace: Pace) -> list[Progress]:
    """What is left of the running rows. How much of a prompt was read follows from the time since its prefill began."""
    reading = pace.reading(sum(job.meter.first_token_at is not None for job in running))
    found = []
    for job in running:
        request, meter = job.request, job.meter
        if meter.first_token_at is not None:
            unread = 0.0
        elif meter.prefill_at is None:
            unread = pace.to_read(len(request.prompt))
        else:
            unread = meter.prompt_tokens - meter.cached_tokens - (now - meter.prefill_at) / reading
        output = request.max_tokens - meter.completion_tokens
        found.append(Progress(request.principal, request.weight, unread, output))
    return found
