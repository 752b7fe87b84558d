"""How many tokens a second there were lately: two counters, looked at once a second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import Counter, Gauge

from service.observability.metrics import Metrics

INTERVAL = 1.0

LOOKS = 10
"""What is told goes back by so many looks."""


@dataclass(frozen=True, slots=True)
class TokensPerSecond:
    """Means over the last `seconds`. `prompt` counts a prompt when its prefill begins, cached tokens included."""

    prompt: float
    generation: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    prompt: float
    generation: float


def current(series: Counter | Gauge) -> float:
    """The value of a series without labels. Any thread."""
    return next(sample.value for metric in series.collect() for sample in metric.samples)


class TokenRate:
    """Belongs to the event loop's thread. `clock` is monotonic."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self._looks: deque[_Look] = deque(maxlen=LOOKS)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Look once a second until the block ends."""
        task = asyncio.create_task(self._follow(), name="token-rate")
        try:
            yield
        finally:
            task.cancel()

    async def _follow(self) -> None:
        while True:
            self.look()
            await self._sleep(INTERVAL)

    def look(self) -> None:
        """Remember where the counters are."""
        self._looks.append(self._now())

    def per_second(self) -> TokensPerSecond | None:
        """Since the oldest look that is remembered; None before that is a second ago."""
        if not self._looks:
            return None
        first, now = self._looks[0], self._now()
        seconds = now.at - first.at
        if seconds < INTERVAL:
            return None
        prompt, generation = now.prompt - first.prompt, now.generation - first.generation
        return TokensPerSecond(prompt / seconds, generation / seconds, seconds)

    def _now(self) -> _Look:
        return _Look(self._clock(), current(self._metrics.prompt_tokens), current(self._metrics.generation_tokens))
