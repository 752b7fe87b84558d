"""What the books of the worker say of the wait of who comes now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from service.engine.admission import Admission, Ticket
from service.engine.backend import StepResult
from service.engine.expected_wait import Line, Progress, Replay
from service.engine.jobs import Job
from service.engine.lineup import Lineup
from service.engine.rates import Pace, Rates
from service.errors import QueueFull


class Foresight:
    """Reads the books under their `lock`, and plays them forward without it. `batch` gives the running rows.

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

    def learn(self, result: StepResult, seconds: float) -> None:
        """A step of the backend took `seconds`."""
        with self._lock:
            self.rates.step(result, seconds)

    def wait(self, tickets: Sequence[Ticket], now: float) -> float | None:
        """Seconds until the last of one request's rows would have its first token; None when too little is known.

        Raises InvalidRequest for what could never be served, QueueFull and DeadlineUnreachable for what may be later.
        """
        try:
            with self._lock:
                self._admission.check(tickets)
                outlook = self._outlook(tickets, now)
        except QueueFull as full:
            with self._lock:
                outlook = self._outlook((), now)
            if outlook is not None and full.should_retry is not False:
                full.retry_after = outlook.until(lambda o: self._admission.has_room(len(tickets), o.waiting, o.running))
            raise
        return None if outlook is None else outlook.in_time(tickets, now)

    def _outlook(self, tickets: Sequence[Ticket], now: float) -> Replay | None:
        """The line with `tickets` at their places in it; None when too little is known to play it forward."""
        if (pace := self.rates.pace()) is None:
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
