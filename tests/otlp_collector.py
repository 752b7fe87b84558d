"""A real OTLP/HTTP collector: an HTTP server that decodes what it is sent, and can misbehave in scripted ways."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Manner = Literal["polite", "silent", "failing", "refusing", "redirecting", "endless"]
CHUNK = b"x" * 65536


def value_of(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(each) for each in value.array_value.values]
    return getattr(value, str(kind))


def attributes_of(pairs: Any) -> dict[str, Any]:
    found: list[KeyValue] = list(pairs)
    return {pair.key: value_of(pair.value) for pair in found}


@dataclass
class Delivery:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Collector:
    """What came in. `manner` is how it answers from now on."""

    manner: Manner = "polite"
    elsewhere: str = ""
    deliveries: list[Delivery] = field(default_factory=list)
    sent: int = 0
    """Bytes of an endless answer that were taken."""
    arrived: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """An endless answer was given up."""
    released: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Span]:
        bodies = [each.body for each in self.deliveries if each.path == "/v1/traces"]
        return [
            span
            for body in bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resource(self) -> dict[str, Any]:
        [first, *_] = [each.body for each in self.deliveries if each.path == "/v1/traces"]
        return attributes_of(ExportTraceServiceRequest.FromString(first).resource_spans[0].resource.attributes)

    @property
    def metrics(self) -> dict[str, Any]:
        """The latest state of each metric, by name."""
        bodies = [each.body for each in self.deliveries if each.path == "/v1/metrics"]
        return {
            metric.name: metric
            for body in bodies
            for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, collector: Collector) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.collector = collector


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        collector = self.server.collector
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        collector.deliveries.append(Delivery(self.path, headers, body))
        collector.arrived.set()
        match collector.manner:
            case "polite":
                self._answer(200)
            case "failing":
                self._answer(503)
            case "refusing":
                self._answer(400)
            case "redirecting":
                self._answer(307, ("location", f"{collector.elsewhere}{self.path}"), ("set-cookie", "a=b"))
            case "silent":
                collector.released.wait()
            case "endless":
                self._flood(collector)

    def _answer(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("content-length", "0")):
            self.send_header(name, value)
        self.end_headers()

    def _flood(self, collector: Collector) -> None:
        """A redirection, because of those the client's library reads the body even where it follows none."""
        self.close_connection = True
        self.send_response(302)
        self.send_header("location", "/again")
        self.end_headers()
        try:
            while not collector.released.is_set():
                self.wfile.write(CHUNK)
                collector.sent += len(CHUNK)
        except OSError:
            collector.ended.set()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def otlp_collector(manner: Manner = "polite") -> Iterator[Collector]:
    """A collector on a free port, until the block ends."""
    found = Collector(manner)
    with _Server(found) as server:
        found.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            found.released.set()
            server.shutdown()
            thread.join()
