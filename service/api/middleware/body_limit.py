"""Bounds a request's body in bytes and in time, before anything reads or parses it.

A declared length over the limit is refused at once, also before `100 Continue`. A chunked body declares
nothing, so received bytes are counted. Inside, reading past a bound raises an exception that no error
handler knows; it comes back out to this layer, which alone answers and closes the connection.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.errors import PayloadTooLarge, RequestTimeout, ServiceError
from service.settings import HttpSettings

LINGER_SECONDS = 1.0
"""How long a refused body is still read (and dropped): closing on unread bytes resets the connection, and a
reset may destroy the answer before the client has read it."""


class BodyLimit:
    def __init__(self, app: ASGIApp, *, limits: HttpSettings, errors: ErrorRenderer) -> None:
        self._app = app
        self._limits = limits
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limits.max_body_bytes:
            await self._refuse(_Refused(_too_large(self._limits), more_follows=True), receive, send)
            return
        body = _BoundedBody(receive, self._limits)
        try:
            await self._app(scope, body.receive, send)
        except _Refused as refused:  # routes read the whole body before they answer: nothing was sent yet
            await self._refuse(refused, receive, send)

    async def _refuse(self, refused: _Refused, receive: Receive, send: Send) -> None:
        response = self._errors.response(refused.error, [("connection", "close")])
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        if refused.more_follows:
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await self._discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _discard(self, receive: Receive) -> None:
        more = True
        while more:
            more = (await receive()).get("more_body", False)


class _Refused(Exception):
    """`more_follows`: the client is still sending, and will go on to."""

    def __init__(self, error: ServiceError, *, more_follows: bool = False) -> None:
        super().__init__(error.code)
        self.error = error
        self.more_follows = more_follows


class _BoundedBody:
    """The `receive` of one request."""

    def __init__(self, receive: Receive, limits: HttpSettings) -> None:
        self._receive = receive
        self._limits = limits
        self._read = 0
        self._complete = False
        self._deadline: float | None = None

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limits.body_timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise _Refused(RequestTimeout("The request's body did not arrive in time.")) from None
        self._read += len(message.get("body", b""))
        if self._read > self._limits.max_body_bytes:
            raise _Refused(_too_large(self._limits), more_follows=message.get("more_body", False))
        self._complete = not message.get("more_body", False)
        return message


def _too_large(limits: HttpSettings) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request's body is larger than {limits.max_body_bytes} bytes.")
