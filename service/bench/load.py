"""How much is asked at a time: a closed loop of streams, or arrivals that wait for nobody. On the event loop."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from service.bench.client import Api, Client, Outcome
from service.bench.workload import Workload

PAUSE = 0.1
"""Seconds after a failure for which a stream waits where the server does not say; a loop of refusals is no load."""

MOST_PATIENCE = 10.0
"""Seconds of a `Retry-After` that are waited for at most."""

MOST_OPEN = 4096
"""Requests of an open loop that may be under way. What comes then is not sent, and counted as `not sent`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """When to begin nothing more: after so many conversations, or so many seconds. What runs is finished."""

    conversations: int | None = None
    seconds: float | None = None

    def reached(self, begun: int, seconds: float) -> bool:
        """Whether nothing is begun any more, after so many and so long."""
        if self.conversations is not None and begun >= self.conversations:
            return True
        return self.seconds is not None and seconds >= self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """A closed loop of `streams`, or an open one of `rate` conversations a second on average: one of the two."""

    streams: int | None = None
    rate: float | None = None

    @property
    def amount(self) -> float:
        return self.streams or self.rate or 0.0

    @property
    def label(self) -> str:
        return f"{self.streams} streams" if self.rate is None else f"{self.rate:g} a second"


@dataclass(slots=True, kw_only=True)
class Run:
    """What came of one load; times are the client's clock."""

    arrivals: Arrivals
    began: float = 0.0
    ended: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    tell: Callable[[Outcome], object] = lambda _: None
    """Hears of each outcome as it comes."""

    def note(self, outcome: Outcome) -> None:
        """Take an outcome in."""
        self.outcomes.append(outcome)
        self.tell(outcome)


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which arrivals come, `rate` a second on average, independent of each other."""
    rng = random.Random(f"{seed}/arrivals")  # noqa: S311 - drawn to be drawn again
    return itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())


class Load:
    """Puts a workload on a server. `clock` is the client's. No conversation is had twice: the second time its prefix
    would be cached."""

    def __init__(
        self,
        client: Client,
        workload: Workload,
        *,
        api: Api,
        model: str,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._workload = workload
        self._api = api
        self._model = model
        self._clock = clock
        self._sleep = sleep
        self._numbers = itertools.count()

    async def put(self, arrivals: Arrivals, limit: Limit, tell: Callable[[Outcome], object] = lambda _: None) -> Run:
        """Put one load on the server until its limit is reached and everything begun has ended."""
        run = Run(arrivals=arrivals, began=self._clock(), tell=tell)
        if arrivals.rate is None:
            begun = itertools.count()
            await asyncio.gather(*(self._stream(run, limit, begun) for _ in range(arrivals.streams or 1)))
        else:
            async with asyncio.TaskGroup() as group:
                await self._arrive(run, limit, arrivals.rate, group)
        run.ended = self._clock()
        return run

    async def _stream(self, run: Run, limit: Limit, begun: Iterator[int]) -> None:
        """One conversation after the other."""
        while not limit.reached(next(begun), self._clock() - run.began):
            last = await self._converse(run, due=None)
            if last.error is not None:
                await self._sleep(min(PAUSE if last.retry_after is None else last.retry_after, MOST_PATIENCE))

    async def _arrive(self, run: Run, limit: Limit, rate: float, group: asyncio.TaskGroup) -> None:
        """Begin conversations at their times, whatever has become of the ones before."""
        under_way: set[asyncio.Task[Outcome]] = set()
        for number, offset in enumerate(poisson(rate, self._workload.seed)):
            due = run.began + offset
            if limit.reached(number, offset):
                return
            if (ahead := due - self._clock()) > 0:
                await self._sleep(ahead)
            if len(under_way) >= MOST_OPEN:
                run.note(Outcome(due=due, sent=due, ended=due, error="not sent"))
                continue
            task = group.create_task(self._converse(run, due=due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def _converse(self, run: Run, due: float | None) -> Outcome:
        """One conversation, turn by turn, until its end or a failure; the last outcome. Only its first turn is due."""
        conversation = self._workload.conversation(next(self._numbers))
        answers: list[str] = []
        while True:
            body = self._workload.body(conversation, answers, api=self._api, model=self._model)
            more = len(answers) + 1 < len(conversation.turns)
            outcome = await self._client.ask(body, due=due, keep_text=more)
            run.note(outcome)
            if outcome.error is not None or not more:
                return outcome
            answers.append(outcome.text.replace("\0", ""))  # a model may say it, but servers refuse to hear it
            due = None
