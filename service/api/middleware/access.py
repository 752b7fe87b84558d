"""One canonical log line and the HTTP metrics of each request, written when it is over, however it ended.

`docs/logs.md` has the fields of the line.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.health import PUBLIC_PATHS
from service.errors import Internal
from service.observability.logging import get_logger
from service.observability.metrics import Metrics
from service.observability.request_metrics import AnswerMetrics

log = get_logger(__name__)

CLIENT_LEFT = 499
"""What is recorded when the client left before its answer began (nginx's number; never sent)."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class AccessLog:
    """`clock` is monotonic seconds. Labels are route templates, never paths: a client chooses its paths."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock
        self._count = AnswerMetrics(metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _Record(self._clock, receive, send)
        self._metrics.http_in_flight.inc()
        try:
            await self._app(scope, record.receive, record.send)
        finally:
            self._metrics.http_in_flight.dec()
            self._write(scope, record)

    def _write(self, scope: Scope, record: _Record) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        status = record.outcome()
        seconds = self._clock() - record.began
        self._count(route, method, status, seconds)
        client = scope.get("client")
        fields: dict[str, Any] = {
            "method": method,
            "route": route,
            "status": status,
            "client": client[0] if client else None,
            "duration_ms": round(seconds * 1000, 2),
            "first_byte_ms": None if record.first is None else round((record.first - record.began) * 1000, 2),
            "bytes_received": record.received,
            "bytes_sent": record.sent,
            "complete": record.complete,
            **scope["state"]["line"],
        }
        if record.failed:
            fields["error"] = Internal.code
        quiet = route in PUBLIC_PATHS and status < 400  # noqa: PLR2004 -- the start of the errors
        known = {name: value for name, value in fields.items() if value is not None}
        (log.debug if quiet else log.info)("request", **known)


class _Record:
    """What was seen of one request's answer."""

    def __init__(self, clock: Callable[[], float], receive: Receive, send: Send) -> None:
        self._clock = clock
        self._receive = receive
        self._send = send
        self.began = clock()
        self.first: float | None = None
        self.received = 0
        self.sent = 0
        self.complete = False
        self._status: int | None = None
        self._left = False

    def outcome(self) -> int:
        """The status that was sent; without one, 499 for a client that left and 500 for a failure."""
        if self._status is not None:
            return self._status
        return CLIENT_LEFT if self._left else Internal.status

    @property
    def failed(self) -> bool:
        """Whether it is left to the last resort to answer."""
        return self._status is None and not self._left

    async def receive(self) -> Message:
        message = await self._receive()
        self.received += len(message.get("body", b""))
        self._left = self._left or message["type"] == "http.disconnect"
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """No coroutine of its own: a stream has a message for each hand-over."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self.first = self._clock()
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
            if not message.get("more_body", False):
                return self._send_last(message)
        return self._send(message)

    async def _send_last(self, message: Message) -> None:
        await self._send(message)
        self.complete = not self._left
