"""The one encoder of Server-Sent Events: data, keep-alive comments, an error in mid-stream, the terminator.

The status is only sent once something is known, so that an early failure is a proper HTTP error. Each send
has a deadline: a client that does not read is treated like one that left. A stream that fails ends with an
error event and without a terminator: nothing that looks like a normal end.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from service.api.answer import ClientGone, Deltas, Shape, WholeAnswer, while_connected
from service.api.deps import RequestState
from service.api.errors import ErrorRenderer, note
from service.engine.generation import Generation
from service.errors import ServiceError
from service.settings import HttpSettings

MEDIA_TYPE = "text/event-stream"
KEEPALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One event. JSON escapes line breaks, so the data is always a single line."""
    data = json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + data.encode("utf-8", "replace") + b"\n\n"


def events(payloads: Iterable[Mapping[str, Any]]) -> bytes:
    """Several events in one piece."""
    return b"".join(map(event, payloads))


class EventStream(Response):
    """An answer that is sent while it is generated.

    What the request holds, in `stack`, is given back before the last bytes are sent, as in `WholeAnswer`.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self, deltas: Deltas, shape: Shape, *, stack: AsyncExitStack, errors: ErrorRenderer, limits: HttpSettings
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._deltas = deltas
        self._shape = shape
        self._stack = stack
        self._errors = errors
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream. Raises ServiceError only while nothing has been sent."""
        try:
            await while_connected(self._stream(scope, send), receive)
        except ClientGone:
            return

    async def _stream(self, scope: Scope, send: Send) -> None:
        keepalive = self._limits.stream_keepalive
        arrived = await self._deltas.next(keepalive)
        await self._within_deadline(
            send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        payloads = self._shape.opening()
        try:
            while True:
                payloads = [*payloads, *(one for index, delta in arrived for one in self._shape.chunk(index, delta))]
                if payloads or not arrived:
                    await self._write(send, events(payloads) or KEEPALIVE)
                if self._deltas.finished:
                    break
                arrived, payloads = await self._deltas.next(keepalive), []
        except ServiceError as error:
            note(error, scope)
            await self._stack.aclose()
            await self._write(send, event(self._errors.envelope(error)), more=False)
            return
        await self._stack.aclose()
        await self._write(send, events(self._shape.closing(self._deltas.choices)) + DONE, more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await self._within_deadline(send, {"type": "http.response.body", "body": body, "more_body": more})

    async def _within_deadline(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._limits.write_timeout):
                await send(message)
        except TimeoutError:
            raise ClientGone from None


def respond(
    generations: Sequence[Generation], shape: Shape, *, stream: bool, state: RequestState, stack: AsyncExitStack
) -> Response:
    """The answer over `generations`, streamed or whole. `stack` already owns the generations.

    Raises CredentialRevoked when the credential was revoked since it was verified; later that ends the answer.
    """

    def end(error: ServiceError) -> None:
        for generation in generations:
            generation.fail(error)

    deltas = Deltas(generations)
    stack.enter_context(state["access"].running.watching(state["grant"], end))
    stack.push_async_callback(deltas.close)
    if stream:
        return EventStream(deltas, shape, stack=stack, errors=state["errors"], limits=state["settings"].http)
    return WholeAnswer(deltas, shape, stack)
