"""A drain: new work and what waits is refused, what runs may finish for a while, and the rest ends with a typed error.

It lies over the engine's state and changes nothing below: loading goes on meanwhile, and one that is undone leaves
the engine as it would be without it. A signal and an operator drain by the same code; only the operator's is undone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from service.engine.generation import Generation
from service.engine.worker import Worker
from service.errors import Draining

STEP_PATIENCE = 2.0
"""Seconds for the step boundary at which the rest is to end. Then its readers get the error without one."""


class Drain:
    """Begins when it is made. `finished(seconds)` waits until none of `live` is; False when that took longer.

    `for_good` is set by whoever ends the process, also when an operator drains already. Event loop's thread.
    """

    def __init__(
        self,
        worker: Worker | None,
        live: Collection[Generation],
        finished: Callable[[float], Awaitable[bool]],
        timeout: float,
        *,
        retry_after: float,
    ) -> None:
        self.for_good = False
        self._worker = worker
        self._live = live
        self._finished = finished
        self._retry_after = retry_after
        self.task = asyncio.create_task(self._run(timeout), name="engine-drain")

    @property
    def detail(self) -> str:
        """Why, for probes."""
        return "shutting down" if self.for_good else "asked for by an operator"

    def refusal(self) -> Draining:
        """What everybody is told who asks for work."""
        why = "The service is shutting down." if self.for_good else "The service takes no new work at the moment."
        return Draining(why, retry_after=self._retry_after)

    def refuse_waiting(self) -> None:
        """Empty the queue. Those of an operator's drain are gone when a signal comes."""
        if self._worker is not None:
            self._worker.refuse_waiting(self.refusal())

    async def _run(self, timeout: float) -> None:
        if await self._finished(timeout):
            return
        if self._worker is not None:
            self._worker.abort_running(self.refusal())
        if not await self._finished(STEP_PATIENCE):
            for generation in tuple(self._live):
                generation.fail(self.refusal())
