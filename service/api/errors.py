"""ServiceError -> wire. The one place where an exception becomes a status, headers and bytes.

Every dialect so far speaks OpenAI's envelope, `/generate` too; `dialect` is where a path prefix will choose.
The answer never repeats what the client sent: messages are ours, and `param` is a name, not a value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service.errors import InvalidRequest, MethodNotAllowed, NotFound, ServiceError

Header = tuple[str, str]

DEFAULT_RETRY_AFTER = 1.0
"""Seconds, for a 429 or 503 whose cause does not know better."""

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}\Z")
"""Shorter than any credential: the name of an unknown field is the client's text, and it is sent back."""


class ErrorRenderer:
    """Renders errors. `jitter` returns numbers in [0, 1): clients that were refused together come back apart."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter

    def envelope(self, error: ServiceError) -> dict[str, Any]:
        """The body of an error, also as the data of an event in a stream."""
        return {
            "error": {
                "message": error.message,
                "type": _error_type(error.status),
                "param": error.param,
                "code": error.code,
            }
        }

    def headers(self, error: ServiceError) -> list[Header]:
        """What an SDK reads to decide whether and when to try again."""
        found: list[Header] = []
        if error.status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            base = DEFAULT_RETRY_AFTER if error.retry_after is None else error.retry_after
            seconds = base * (1 + 0.25 * self._jitter())
            found.append(("retry-after", str(max(1, math.ceil(seconds)))))
            found.append(("retry-after-ms", str(math.ceil(seconds * 1000))))
        if error.status == HTTPStatus.UNAUTHORIZED:
            found.append(("www-authenticate", "Bearer"))  # RFC 9110, 15.5.2
        if error.should_retry is not None:
            found.append(("x-should-retry", "true" if error.should_retry else "false"))
        return found

    def body(self, error: ServiceError) -> bytes:
        return json.dumps(self.envelope(error), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

    def response(self, error: ServiceError, extra: Iterable[Header] = ()) -> Response:
        """A whole answer for `error`, for use inside and outside the router."""
        headers = dict(self.headers(error))
        headers.update(extra)
        return Response(self.body(error), error.status, headers, media_type="application/json")

    def install(self, app: FastAPI) -> None:
        """Make `app` answer each error it knows in this form."""

        def answer(request: Request, error: ServiceError, extra: Iterable[Header] = ()) -> Response:
            note(error, request.scope)
            return self.response(error, extra)

        async def service_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, ServiceError)
            return answer(request, error)

        async def http_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return answer(request, from_http(error), (error.headers or {}).items())

        async def validation_error(request: Request, error: Exception) -> Response:
            assert isinstance(error, RequestValidationError)
            return answer(request, from_validation(error.errors(), error.body))

        app.add_exception_handler(ServiceError, service_error)
        app.add_exception_handler(HTTPException, http_error)
        app.add_exception_handler(RequestValidationError, validation_error)


def note(error: ServiceError, scope: Scope) -> None:
    """Name the error in the request's log line."""
    scope["state"]["line"]["error"] = error.code


def _error_type(status: int) -> str:
    """OpenAI's coarse class of an error."""
    match status:
        case HTTPStatus.UNAUTHORIZED:
            return "authentication_error"
        case HTTPStatus.FORBIDDEN:
            return "permission_error"
        case HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        case _ if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return "invalid_request_error"
        case _:
            return "server_error"


def from_http(error: HTTPException) -> ServiceError:
    """What the router itself refuses: no such path, no such method there."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return NotFound("There is nothing at this path.")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return MethodNotAllowed("This path does not take this method.")
        case _:
            return InvalidRequest("The request could not be read.")


def from_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> InvalidRequest:
    """The most telling of pydantic's complaints: the one that got deepest into the body.

    A union complains once for each of its members; the member that matched furthest is the one meant.
    """
    found = [(_path(error, body), error) for error in errors]
    path, error = max(found, key=lambda pair: len(pair[0]))
    return InvalidRequest(_message(error), param=_spell(path), code=_code(str(error["type"])))


def _code(kind: str) -> str:
    match kind:
        case "missing":
            return "missing_required_parameter"
        case "extra_forbidden":
            return "unknown_parameter"
        case _:
            return "invalid_value"


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "missing":
            return "A required parameter is missing."
        case "extra_forbidden":
            return "This parameter is not known here."
        case "union_tag_invalid" | "union_tag_not_found":  # pydantic's own text repeats the input
            return "The value is not one of the known kinds."
        case _:
            text = str(error["msg"]).removeprefix("Value error, ").replace("Input should be", "The value should be")
            return text if text.endswith(".") else f"{text}."


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The steps of pydantic's location through the body (without names of union members), or a name in the query.

    Ends before a name that is not plainly a field's: that would be the client's own text.
    """
    source, *location = error["loc"]
    if source == "query":
        return [step for step in location[:1] if isinstance(step, str) and _FIELD.match(step)]
    steps: list[str | int] = []
    here = body
    for position, step in enumerate(location):
        if isinstance(step, int) and isinstance(here, list) and step < len(here):
            here = here[step]
        elif isinstance(step, str) and isinstance(here, dict):
            absent = step not in here
            if absent and not (error["type"] == "missing" and position == len(location) - 1):
                continue
            if not _FIELD.match(step):
                break
            here = here.get(step)
        else:
            continue
        steps.append(step)
    return steps


def _spell(path: Sequence[str | int]) -> str | None:
    """`["messages", 0, "content"]` as `messages[0].content`."""
    spelled = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return spelled.removeprefix(".") or None
