"""Outermost: the request's id, trace and log context, the headers of every answer, and the last resort.

Outermost because all of this must also hold for a 404, a 413 and a 500. An exception that nothing inside
knew ends here: a log line, a count, and the standard error if the answer has not begun.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.sse import MEDIA_TYPE, event
from service.errors import Internal
from service.observability.logging import get_logger
from service.observability.metrics import Metrics
from service.observability.trace_context import TraceParent, trace_parent

if TYPE_CHECKING:  # it needs an extra
    from service.observability.tracing import RequestTrace, Tracing

log = get_logger(__name__)

_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_LOOKS_SECRET = re.compile(r"mlxd_|eyJ")
"""How an API key and a JWT begin: an id is logged and sent back, and one that holds either is not kept."""


class RequestContext:
    """Accepts a well-formed `X-Request-ID` or mints one; `new_id` must return well-formed ids.

    Without `tracing` a caller's trace is only named in the log. With it, the `trace` of a request is in the scope's
    state (None where none is kept), and its answer names it.

    A layer inside may put `answer_headers` into the scope's state: a function whose pairs every answer then has. Nobody
    else may give a header of such a name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        errors: ErrorRenderer,
        metrics: Metrics,
        new_id: Callable[[], str],
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._errors = errors
        self._metrics = metrics
        self._new_id = new_id
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _WELL_FORMED.match(given) and not _LOOKS_SECRET.search(given) else self._new_id()
        scope.setdefault("state", {}).update(request_id=request_id, line={}, answer_headers=list)
        # A trailing slash means the same path. Done here, so that every layer judges the path that is routed.
        scope["path"] = scope["path"].rstrip("/") or "/"
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        scope["state"]["trace"] = trace = self._begin_trace(headers, scope)
        responder = _Responder(send, scope["state"])
        try:
            await self._app(scope, receive, responder.send)
        except ClientDisconnect:
            return  # it left while sending its body; nobody is there to answer
        except Exception:  # the last resort
            log.exception("request_failed")
            self._metrics.internal_errors.labels("request").inc()
            scope["state"]["line"]["error"] = Internal.code
            await responder.fail(self._errors, scope, receive)
        finally:
            if trace is not None:
                trace.finish(status=responder.status, error=scope["state"]["line"].get("error"))

    def _begin_trace(self, headers: Headers, scope: Scope) -> RequestTrace | None:
        """The request's own span where it has one; the ids in the log are its, or else the caller's trace."""
        given = headers.getlist("traceparent")
        parent = _caller(given, headers) if given else None
        trace = None
        if self._tracing is not None:
            request_id = scope["state"]["request_id"]
            trace = self._tracing.begin(scope["method"], scope["path"], request_id=request_id, parent=parent)
        if trace is not None:
            structlog.contextvars.bind_contextvars(trace_id=trace.trace_id, span_id=trace.span_id)
        elif parent is not None:
            structlog.contextvars.bind_contextvars(trace_id=parent.trace_id)
        return trace


def _caller(traceparent: list[str], headers: Headers) -> TraceParent | None:
    state = headers.getlist("tracestate")
    return trace_parent(traceparent, [] if any(map(_LOOKS_SECRET.search, state)) else state)


class _Responder:
    """The state of one answer on its way out."""

    def __init__(self, send: Send, state: Mapping[str, Any]) -> None:
        self._send = send
        self._state = state
        self.status: int | None = None
        self._finished = False
        self._is_stream = False

    def send(self, message: Message) -> Awaitable[None]:
        """No coroutine of its own, as in the access log."""
        if message["type"] == "http.response.start":
            self._start(message)
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        return self._send(message)

    def _start(self, message: Message) -> None:
        self.status = message["status"]
        headers = MutableHeaders(scope=message)
        headers["x-request-id"] = self._state["request_id"]
        headers["x-content-type-options"] = "nosniff"
        headers.setdefault("cache-control", "no-store")
        if (trace := self._state["trace"]) is not None:
            headers["traceparent"] = trace.traceparent
        headers.raw.extend((name.encode(), value.encode()) for name, value in self._state["answer_headers"]())
        self._is_stream = headers.get("content-type", "").startswith(MEDIA_TYPE)

    async def fail(self, errors: ErrorRenderer, scope: Scope, receive: Receive) -> None:
        """Answer with an internal error as far as that is still possible.

        A stream gets an error event. Any other answer that has begun is left incomplete, and the server
        breaks the connection: a client must not take half an answer for a whole one.
        """
        error = Internal("The service met an unexpected error.")
        if self.status is None:
            await errors.response(error)(scope, receive, self.send)
        elif self._is_stream and not self._finished:
            await self.send({"type": "http.response.body", "body": event(errors.envelope(error)), "more_body": False})
