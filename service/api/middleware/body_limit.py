"""Bounds a request's body in bytes and in time, before anything reads or parses it.

A declared length over the limit is refused at once, also before `100 Continue`. A chunked body declares
nothing, so received bytes are counted. Inside, reading past a bound raises an exception that no error
handler knows; it comes back out to this layer, which alone answers and closes the connection.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.refusal import refuse_and_close
from service.errors import PayloadTooLarge, RequestTimeout, ServiceError
from service.settings import HttpSettings


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
            await refuse_and_close(_too_large(self._limits), self._errors, scope, receive, send, more_follows=True)
            return
        body = _BoundedBody(receive, self._limits)
        try:
            await self._app(scope, body.receive, send)
        except _Refused as refused:  # routes read the whole body before they answer: nothing was sent yet
            more = refused.more_follows
            await refuse_and_close(refused.error, self._errors, scope, receive, send, more_follows=more)


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
