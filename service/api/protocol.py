"""uvicorn's httptools protocol with the bounds that it lacks: bytes, lines and time, and one plain reading of HTTP.

What stock httptools lets pass (measured): a 50 MB header, 20,000 header lines, silence for ever, no Host or
two, an absolute target, a reader that never reads. Refusals here happen before there is a request, so they
are written by hand, in the same form as everywhere else. The time of a body that a route waits for is bounded
by `middleware/body_limit.py`; here only bodies that nobody waits for.

Builds on uvicorn's internals (pinned exactly): `tests/unit/test_protocol.py` is the contract with them.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.api.errors import ErrorRenderer
from service.errors import InvalidRequest, RequestHeadTooLarge, RequestTimeout, ServiceError
from service.observability.metrics import Metrics
from service.settings import HttpSettings

HEAD_SLICE = 4096
"""Bytes fed to the parser at once while a head is read: how far a head may overrun its limit unnoticed."""

LINGER_SECONDS = 1.0
"""How long a refused client may still talk: closing on unread bytes could reset the answer away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What connections are held to, and what renders and counts their refusal."""

    limits: HttpSettings
    errors: ErrorRenderer
    metrics: Metrics
    new_id: Callable[[], str]


def bounded_protocol(policy: Policy) -> type[BoundedProtocol]:
    """The class to give to uvicorn as `http`."""
    return type("ConfiguredProtocol", (BoundedProtocol,), {"policy": policy})


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A request that comes before the last one's answer is complete is not read: the
    connection closes after that answer, as HTTP allows, and a client's departure stays visible meanwhile.
    """

    policy: ClassVar[Policy]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most = self.limit_concurrency
        self.limit_concurrency = None  # uvicorn refuses in plain text, and only who has sent a request
        self._current: RequestResponseCycle | None = None
        self._refusal: ServiceError | None = None
        self._head_bytes = 0
        self._in_head = False
        self._in_body = False
        self._offered = False  # the request offers to change the protocol
        self._deaf = False
        self._phase_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None

    # Time -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self.policy.metrics.http_refused.labels("too_many_connections").inc()
            transport.abort()  # an answer would hold the connection, and with it a file, for longer
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_phase_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._time_write()  # the close waits for a reader that may never read

    def _time_head(self) -> None:
        if self._phase_timer is None:
            self._phase_timer = self.loop.call_later(self.policy.limits.head_timeout, self._head_overdue)

    def _time_write(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.policy.limits.write_timeout, self.transport.abort)

    def _stop_phase_timer(self) -> None:
        if self._phase_timer is not None:
            self._phase_timer.cancel()
            self._phase_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _head_overdue(self) -> None:
        self._phase_timer = None
        if self._in_head:
            self._refuse(RequestTimeout("The request's head did not arrive in time."))
        else:  # it said nothing: an unasked answer could be taken for that to its next request
            self.transport.close()

    # Bytes ----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self._deaf and not self.transport.is_closing():
            if self._idle():
                self._time_head()
            size = len(data) if self._in_body else HEAD_SLICE
            piece = data[at : at + size]
            at += size
            if self._in_head:
                self._head_bytes += len(piece)
            self._feed(piece)
            self._check_unfinished_head()
        if self._idle():
            self._time_head()  # line breaks, or the rest of an answered body: uvicorn's idle timer is off now

    def _feed(self, piece: bytes) -> None:
        """Give bytes to the parser. Without uvicorn's warnings: a client could fill the log with them."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed_without_upgrade(piece[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _feed_without_upgrade(self, rest: bytes) -> None:
        """Read a request again as if it had not offered another protocol; `rest` follows its head.

        The parser skips the body of such a request, and Java's client offers HTTP/2 with every first POST.
        """
        offers = (b"upgrade", b"connection", b"http2-settings")
        lines = [name + b": " + value for name, value in self.headers if name not in offers]
        version = self.parser.get_http_version().encode()
        target = self.parser.get_method() + b" " + self.url + b" HTTP/" + version
        self.parser = httptools.HttpRequestParser(self)
        self._offered = False
        self._feed(b"\r\n".join([target, *lines, b"", b""]) + rest)

    def _idle(self) -> bool:
        """True while neither a request is being read nor an answer being made."""
        return not (self._in_head or self._in_body or self._deaf or self._answering())

    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    def on_message_begin(self) -> None:
        if self._answering():
            self._stop_listening()
            raise RuntimeError("pipelined request")  # leaves the parser; `send_400_response` sees that we are deaf
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self.policy.limits.max_headers:
            raise self._refused(RequestHeadTooLarge("The request has too many header lines."))

    def on_headers_complete(self) -> None:
        self._check_head()
        if self.parser.should_upgrade():
            self._offered = True
            return
        self._in_head = False
        self._stop_phase_timer()
        super().on_headers_complete()
        self._current = self.cycle
        self._in_body = True
        # A backstop for answers that did not wait for the body: a route that waits has given up by then.
        patience = self.policy.limits.body_timeout + LINGER_SECONDS
        self._phase_timer = self.loop.call_later(patience, self.transport.close)

    def on_message_complete(self) -> None:
        if self._offered:
            return
        self._in_body = False
        self._stop_phase_timer()
        super().on_message_complete()

    def _check_unfinished_head(self) -> None:
        if self._in_head and not self._deaf and self._head_bytes > self.policy.limits.max_header_bytes:
            self._refuse(RequestHeadTooLarge("The request's head is too large."))

    def _check_head(self) -> None:
        """Raise unless the head is within its bounds and there is one way to read it."""
        if len(self.url) + sum(len(n) + len(v) + 4 for n, v in self.headers) > self.policy.limits.max_header_bytes:
            raise self._refused(RequestHeadTooLarge("The request's head is too large."))
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) != 1 or not hosts[0].strip():
            raise self._refused(InvalidRequest("The request needs exactly one Host header.", code="invalid_host"))
        if not self.url.startswith(b"/") or self.parser.get_method() == b"CONNECT":
            raise self._refused(InvalidRequest("The request's target must be a path.", code="invalid_target"))

    # Refusal --------------------------------------------------------------------------------------------

    def _refused(self, error: ServiceError) -> ServiceError:
        self._refusal = error
        return error

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 -- uvicorn's signature
        """Answer whatever the parser, or a callback of ours, did not accept."""
        if not self._deaf:
            self._refuse(self._refusal or InvalidRequest("The request is not valid HTTP.", code="invalid_http"))

    def _stop_listening(self) -> None:
        """Drop what still comes, finish the answer, then close. Reading goes on, so a departure is noticed."""
        self._deaf = True
        if self._current is not None:
            self._current.keep_alive = False

    def _refuse(self, error: ServiceError) -> None:
        """Answer and close; without an answer when another one has begun."""
        self._stop_phase_timer()
        self._stop_listening()
        self.policy.metrics.http_refused.labels(error.code).inc()
        if self._answering() and self._current is not None and self._current.response_started:
            self.transport.close()
            return
        if self._current is not None:  # its route is still waiting for the body: it must neither wait nor write
            self._current.disconnected = True
            self._current.message_event.set()
        self.transport.write(self._answer(error))
        if self.can_half_close():
            self.transport.write_eof()
            self._phase_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        else:
            self.transport.close()

    def can_half_close(self) -> bool:
        """False over TLS."""
        return self.transport.can_write_eof()

    def _answer(self, error: ServiceError) -> bytes:
        body = self.policy.errors.body(error)
        headers = [
            *((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.server_state.default_headers),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("x-request-id", self.policy.new_id()),
            *self.policy.errors.headers(error),
            ("connection", "close"),
        ]
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return STATUS_LINE[error.status] + lines.encode("latin-1") + b"\r\n" + body
