"""From running generations to one answer: reading several as one, and the answer that is sent whole.

`Deltas` reads; a `Shape` gives what was read the form of a dialect; `WholeAnswer` here and `EventStream` in
`sse.py` send it. Closing the generations is the request's exit stack's business, never that of a generator
or a response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from service.api.alarm import Alarm
from service.engine.generation import Delta, FinishReason, Generation, Usage
from service.observability.record import RequestRecord

T = TypeVar("T")

NOTHING = Delta()
"""Wakes who waits for the next delta and has waited long enough."""


class ClientGone(Exception):
    """The client left, or stopped reading: there is nobody to answer."""


@dataclass(slots=True)
class Choice:
    """What one row has said so far."""

    text: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Shape(Protocol):
    """The form of a dialect's answer. A payload is what becomes one event's data, or the whole body."""

    def opening(self) -> list[Mapping[str, Any]]:
        """Payloads before the first token of a stream."""

    def chunk(self, index: int, delta: Delta) -> list[Mapping[str, Any]]:
        """Payloads for what row `index` newly said, its end included."""

    def closing(self, choices: Sequence[Choice]) -> list[Mapping[str, Any]]:
        """Payloads after every row has ended."""

    def body(self, choices: Sequence[Choice]) -> Mapping[str, Any]:
        """The whole answer of a request that does not stream."""


class Deltas:
    """Several generations read as one sequence of (index, delta). Belongs to the event loop.

    A row's error is raised, not returned: it ends the whole answer. `patience`, in seconds, is how long `next` waits.
    """

    def __init__(self, generations: Sequence[Generation], patience: float | None = None) -> None:
        self.choices = [Choice() for _ in generations]
        self._open = dict(enumerate(generations))
        self._reads: dict[asyncio.Task[Delta], int] = {}
        self._patience = patience
        self._alarm = None if patience is None else Alarm(patience, self._wake)

    @property
    def finished(self) -> bool:
        """True when every row has ended."""
        return not self._open

    async def next(self) -> list[tuple[int, Delta]]:
        """What arrived since the last call, at least one delta; nothing when waiting brought nothing.

        Raises the ServiceError of a row that failed. Cancelling loses nothing.
        """
        alone = len(self._open) == 1 and not self._reads  # a pending read may already hold what arrived
        arrived = await (self._next_of_one() if alone else self._next_of_many())
        for index, delta in arrived:
            self._note(index, delta)
        return arrived

    async def close(self) -> None:
        """Stop the pending reads; to be called before the generations are closed."""
        if self._alarm is not None:
            self._alarm.stop()
        reads = list(self._reads)
        self._reads.clear()
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)

    async def _next_of_one(self) -> list[tuple[int, Delta]]:
        """The common case, without a task or a timer for each token."""
        [(index, generation)] = self._open.items()
        if self._alarm is None:
            return [(index, await generation.read())]
        self._alarm.on()
        delta = await generation.read()
        self._alarm.off()
        return [] if delta is NOTHING else [(index, delta)]

    def _wake(self) -> None:
        for generation in self._open.values():
            generation.put(NOTHING)

    async def _next_of_many(self) -> list[tuple[int, Delta]]:
        waited = set(self._reads.values())
        for index, generation in self._open.items():
            if index not in waited:
                self._reads[asyncio.ensure_future(generation.read())] = index
        done, _ = await asyncio.wait(self._reads, timeout=self._patience, return_when=asyncio.FIRST_COMPLETED)
        arrived = [(self._reads.pop(read), read.result()) for read in done]
        return sorted(arrived, key=lambda pair: pair[0])

    def _note(self, index: int, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        choice = self.choices[index]
        choice.text.append(delta.text)
        if delta.final:
            choice.finish_reason = delta.finish_reason
            choice.usage = delta.usage
            del self._open[index]


class WholeAnswer(Response):
    """An answer that is sent when every row has ended, and not at all when the client left before.

    What the request holds, in `stack`, is given back before anything is sent: a client that comes back at once is not
    in its own way.
    """

    def __init__(self, deltas: Deltas, shape: Shape, stack: AsyncExitStack) -> None:
        super().__init__()
        self._deltas = deltas
        self._shape = shape
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._stack:
                await while_connected(self._drain(), receive)
        except ClientGone:
            return
        await JSONResponse(self._shape.body(self._deltas.choices))(scope, receive, send)

    async def _drain(self) -> None:
        while not self._deltas.finished:
            await self._deltas.next()


async def while_connected(
    work: Coroutine[Any, Any, T], receive: Receive, given_up: asyncio.Future[None] | None = None
) -> T:
    """Run `work` and return its result; cancel it and raise ClientGone when the client leaves or is `given_up`."""
    connected = asyncio.timeout(None)  # cancels `work` where it is: a task of its own costs 2 kB for each stream

    def end(_: object) -> None:
        if not connected.expired():
            connected.reschedule(asyncio.get_running_loop().time())

    watch: asyncio.Future[None] = asyncio.ensure_future(_until_disconnect(receive))
    ends = [watch] if given_up is None else [watch, given_up]
    for each in ends:
        each.add_done_callback(end)
    try:
        async with connected:
            return await work
    except TimeoutError:
        if not connected.expired():
            raise
        if watch.done():
            watch.result()  # a watch that failed is a bug of ours, not a departure
        raise ClientGone from None
    finally:
        for each in ends:
            each.remove_done_callback(end)
        watch.cancel()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def note_record(line: dict[str, Any], record: RequestRecord) -> None:
    """Add what the request cost, and how it ended, to its log `line`."""
    line.update(
        model=record.model,
        stream=record.stream,
        finish_reason=record.finish_reason,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
    )
    times = {
        "queue_ms": record.queue_seconds,
        "prefill_ms": record.prefill_seconds,
        "ttft_ms": record.time_to_first_token,
        "tpot_ms": record.time_per_output_token,
    }
    line.update({name: round(seconds * 1000, 2) for name, seconds in times.items() if seconds is not None})
