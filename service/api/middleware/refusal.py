"""A refusal to a client that may still be sending its body."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from service.api.errors import ErrorRenderer, note
from service.errors import ServiceError

LINGER_SECONDS = 1.0
"""How long a refused body is still read (and dropped): closing on unread bytes resets the connection, and a
reset may destroy the answer before the client has read it."""


async def refuse(error: ServiceError, errors: ErrorRenderer, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before a byte of the body was read; the connection is kept where no body was announced."""
    headers = Headers(scope=scope)
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        await refuse_and_close(error, errors, scope, receive, send, more_follows=True)
    else:
        note(error, scope)
        await errors.response(error)(scope, receive, send)


async def refuse_and_close(
    error: ServiceError, errors: ErrorRenderer, scope: Scope, receive: Receive, send: Send, *, more_follows: bool
) -> None:
    """Answer at once, before `100 Continue`, and close the connection; `more_follows`: a body is on its way."""
    note(error, scope)
    response = errors.response(error, [("connection", "close")])
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if more_follows:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await _discard(receive)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    more = True
    while more:
        more = (await receive()).get("more_body", False)
