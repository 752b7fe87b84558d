"""Request bodies: one strict JSON reader, and the route class that plugs it under FastAPI's validation.

Refused here and nowhere else: another media type or a content encoding (415), bytes that are not UTF-8,
NaN and infinities, a key given twice, NUL characters, lone surrogates, too many values or levels (400).
The size was bounded by `middleware/body_limit.py` before a byte came here.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from email.message import Message
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from service.api.deps import Requires, request_state
from service.errors import InvalidRequest, UnsupportedMediaType

MAX_DEPTH = 32
MAX_CONTAINERS = 20_000
MAX_VALUES = 150_000
"""Objects and arrays, and values of all kinds, in one body. The parser holds the GIL throughout: two megabytes of
small arrays stopped the event loop for 0.35 s, even from a thread."""

INLINE_BYTES = 32 * 1024
"""A larger body is parsed in a thread: ten megabytes of small keys take a second."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""Possessive, and content with a missing end: a body of escaped quotes must not be searched again from each."""
_ESCAPED_TROUBLE = re.compile(r"\\u(?:0000|[dD][89abAB][0-9a-fA-F]{2}|[dD][c-fC-F][0-9a-fA-F]{2})")
"""The escapes through which a NUL or a surrogate can enter a string of valid UTF-8 JSON."""
_TROUBLE = re.compile("[\x00\ud800-\udfff]")


class StrictRequest(Request):
    """A request whose JSON body has been read and checked."""

    def __init__(self, request: Request, parsed: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._body = b"{}"  # FastAPI asks for the bytes only to see that there are some
        self._parsed = parsed

    async def json(self) -> Any:
        return self._parsed


class StrictJSONRoute(APIRoute):
    """A route with a JSON body. FastAPI still validates it and describes it in the OpenAPI document.

    The scope is checked before the body is read: FastAPI would run its dependencies afterwards. What the request
    holds (its state's `stack`) is given back before an exception is answered, and at the latest when the request is
    over. As a dependency that yields, the stack would cost a tenth of the request: a task group, a scope and a second
    stack.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as scope["state"]["stack"]:
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        needs = [each.dependency for each in self.dependencies if isinstance(each.dependency, Requires)]

        async def strict(request: Request) -> Response:
            for need in needs:
                await need(request)
            check_media_type(request.headers.get("content-type"), request.headers.get("content-encoding"))
            body = await request.body()
            if len(body) > INLINE_BYTES:
                parsed = await asyncio.to_thread(parse, body)
            else:
                parsed = parse(body)
            async with AsyncExitStack() as unanswered:
                unanswered.push_async_callback(request_state(request)["stack"].aclose)
                response = await handler(StrictRequest(request, parsed))
                unanswered.pop_all()
            return response

        return strict


def check_media_type(content_type: str | None, content_encoding: str | None) -> None:
    """Raise UnsupportedMediaType unless the body is said to be plain UTF-8 JSON.

    A form or text/plain body would also be what a foreign web page may send without asking.
    """
    if content_encoding is not None and content_encoding.strip().lower() != "identity":
        raise UnsupportedMediaType("Compressed request bodies are not accepted.", code="unsupported_content_encoding")
    if content_type == "application/json":
        return
    header = Message()
    header["content-type"] = content_type or ""
    charset = header.get_content_charset("utf-8")
    if header.get_content_type() != "application/json" or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("The content type must be application/json, in UTF-8.")


def parse(body: bytes) -> Any:
    """Parse one JSON document strictly. Raises InvalidRequest; pure, any thread."""
    _count(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid("The body is not valid UTF-8.") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise _invalid(f"The body is not valid JSON (line {error.lineno}, column {error.colno}).") from None
    except ValueError:  # an integer of thousands of digits
        raise _invalid("The body holds a number that is too long.") from None
    _walk(value, suspicious=_ESCAPED_TROUBLE.search(text) is not None)
    return value


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_json")


def _too_deep() -> InvalidRequest:
    return _invalid(f"The body is nested deeper than {MAX_DEPTH} levels.")


def _count(body: bytes) -> None:
    """Refuse more values than `MAX_*`; strings are only cut out, to count outside them, when it looks like it."""
    if not _within_bounds(body) and not _within_bounds(_STRING.sub(b"", body)):
        raise _invalid("The body holds too many values.")


def _within_bounds(structure: bytes) -> bool:
    containers = structure.count(b"[") + structure.count(b"{")
    return containers <= MAX_CONTAINERS and structure.count(b",") < MAX_VALUES


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _invalid("The body gives a key twice in one object.")
    return found


def _constant(_: str) -> NoReturn:
    raise _invalid("The body holds NaN or Infinity, which JSON does not have.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _invalid("The body holds a number that is too large.")
    return value


def _walk(value: Any, *, suspicious: bool) -> None:
    """Check the depth, and where an escape gave reason to, every string. Iterative: depth is what it bounds."""
    level = [value]
    depth = 0
    while level:
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below.extend(node.values())
                if suspicious:
                    below.extend(node)
            elif isinstance(node, list):
                below.extend(node)
            elif suspicious and isinstance(node, str) and _TROUBLE.search(node):
                raise _invalid("The body holds a NUL character or half of a surrogate pair.")
        if any(isinstance(node, dict | list) for node in level):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep()
        level = below
