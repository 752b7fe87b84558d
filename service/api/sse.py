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
from pydantic_core import PydanticSerializationError, to_json
from starlette.types import Message, Receive, Scope, Send

from service.api.alarm import Alarm
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
    try:
        data = to_json(payload)
    except PydanticSerializationError:  # half a character, which UTF-8 does not have
        data = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return b"data: " + data + b"\n\n"


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
        given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        alarm = Alarm(self._limits.write_timeout, lambda: given_up.set_result(None))

        async def within_deadline(message: Message) -> None:
            alarm.on()
            await send(message)
            alarm.off()

        try:
            async with self._stack:
                await while_connected(self._stream(scope, within_deadline), receive, given_up)
        except ClientGone:
            return
        finally:
            alarm.stop()

    async def _stream(self, scope: Scope, send: Send) -> None:
        arrived = await self._deltas.next()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        payloads = self._shape.opening()
        try:
            while True:
                payloads = [*payloads, *(one for index, delta in arrived for one in self._shape.chunk(index, delta))]
                if payloads or not arrived:
                    await _write(send, events(payloads) or KEEPALIVE)
                if self._deltas.finished:
                    break
                arrived, payloads = await self._deltas.next(), []
        except ServiceError as error:
            note(error, scope)
            await self._stack.aclose()
            await _write(send, event(self._errors.envelope(error)), more=False)
            return
        await self._stack.aclose()
        await _write(send, events(self._shape.closing(self._deltas.choices)) + DONE, more=False)


async def _write(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def respond(generations: Sequence[Generation], shape: Shape, *, stream: bool, state: RequestState) -> Response:
    """The answer over `generations`, streamed or whole. `stack` already owns the generations.

    Raises CredentialRevoked when the credential was revoked since it was verified; later that ends the answer.
    """

    def end(error: ServiceError) -> None:
        for generation in generations:
            generation.fail(error)

    limits, stack = state["settings"].http, state["stack"]
    deltas = Deltas(generations, limits.stream_keepalive if stream else None)
    stack.enter_context(state["access"].running.watching(state["grant"], end))
    stack.push_async_callback(deltas.close)
    if stream:
        return EventStream(deltas, shape, stack=stack, errors=state["errors"], limits=limits)
    return WholeAnswer(deltas, shape, stack)
