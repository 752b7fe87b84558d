"""Spans and gen_ai metrics of requests, on scripted clocks; and that without an endpoint there is nothing of it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import structlog
from opentelemetry.metrics import get_meter_provider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics
from opentelemetry.trace import ProxyTracerProvider, SpanKind, StatusCode, get_tracer_provider
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.context import RequestContext
from service.app import build
from service.observability import otlp, otlp_metrics
from service.observability.metrics import Metrics
from service.observability.otlp_metrics import GenAiMetrics
from service.observability.record import RequestRecord, RowRecord
from service.observability.trace_context import TraceParent
from service.observability.tracing import RequestTrace, Tracing
from service.settings import ConfigurationError, Settings, TracingSettings, forget_outside_telemetry

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
CALLER = TraceParent(TRACE, SPAN, 1, (("congo", "t61"),))
HEADER = f"00-{TRACE}-{SPAN}-01"
BEGAN = 1_700_000_000_000_000_000
"""Wall time in nanoseconds when the scripted clock shows 100."""

ROW = RowRecord(
    prefill_at=103.0,
    first_token_at=105.0,
    ended_at=109.0,
    prompt_tokens=12,
    cached_tokens=4,
    completion_tokens=5,
    max_tokens=50,
    finish_reason="stop",
)
RECORD = RequestRecord(
    request_id="r",
    principal="key:1",
    tenant="acme",
    key_id="k1",
    model="org/model",
    asked_model="default",
    endpoint=PATH,
    stream=True,
    began_at=101.0,
    encoded_at=101.5,
    submitted_at=102.0,
    ended_at=110.0,
    rows=(ROW,),
)


def recorded(*rows: RowRecord, **changes: Any) -> RequestRecord:
    return replace(RECORD, rows=rows or RECORD.rows, **changes)


@dataclass
class World:
    """Tracing on scripted clocks, and what has ended."""

    ratio: float = 1.0
    time: float = 100.0
    wall: int = BEGAN
    exporter: InMemorySpanExporter = field(default_factory=InMemorySpanExporter)

    def __post_init__(self) -> None:
        self.tracing = Tracing(
            SimpleSpanProcessor(self.exporter),
            resource=Resource({}),
            sample_ratio=self.ratio,
            paths=[PATH, "/generate"],
            clock=lambda: self.time,
            wall=lambda: self.wall,
        )

    def begin(self, parent: TraceParent | None = None, *, path: str = PATH) -> RequestTrace:
        found = self.tracing.begin("POST", path, request_id="r", parent=parent)
        assert found is not None
        return found

    def finish(self, record: RequestRecord | None, *, status: int | None = 200, error: str | None = None) -> None:
        """One request with `record`, over at 111."""
        trace = self.begin()
        if record is not None:
            self.tracing.observe(record)
        self.time = 111.0
        trace.finish(status=status, error=error)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    @property
    def root(self) -> ReadableSpan:
        return self.spans[f"POST {PATH}"]

    def times(self) -> dict[str, tuple[float, float]]:
        """Each span's beginning and end, on the scripted clock."""

        def moment(nanoseconds: int | None) -> float:
            assert nanoseconds is not None
            return 100 + (nanoseconds - BEGAN) / 1e9

        return {name: (moment(span.start_time), moment(span.end_time)) for name, span in self.spans.items()}


# Spans ------------------------------------------------------------------------------------------------------


async def test_a_request_is_one_span_with_its_phases_below_it() -> None:
    world = World()
    trace = world.begin(CALLER)
    world.time = 100.25

    async def verify() -> str:
        world.time = 100.5
        return "grant"

    assert await trace.during("authenticate", verify()) == "grant"
    world.wall -= 3_600_000_000_000  # somebody sets the clock: no span bends
    world.tracing.observe(RECORD)
    world.time = 111.0
    trace.finish(status=200, error=None)
    assert world.times() == {
        f"POST {PATH}": (100, 111),
        "authenticate": (100.25, 100.5),
        "tokenise": (101, 101.5),
        "queue": (102, 103),
        "prefill": (103, 105),
        "decode": (105, 109),
    }
    root = world.root
    assert root.context is not None
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, SPAN)
    assert dict(root.context.trace_state) == {"congo": "t61"}
    assert root.kind is SpanKind.SERVER
    assert root.status.status_code is StatusCode.UNSET
    for name, span in world.spans.items():
        if span is not root:
            assert span.parent == root.context, name
            assert span.kind is SpanKind.INTERNAL


def test_its_attributes_are_the_conventions() -> None:
    world = World()
    world.finish(recorded(ROW, replace(ROW, finish_reason="length", cached_tokens=0)))
    assert dict(world.root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": PATH,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mlxd",
        "gen_ai.request.model": "default",
        "gen_ai.response.model": "org/model",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.usage.input_tokens": 24,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 10,
        "mlxd.request_id": "r",
    }
    assert dict(world.spans["prefill"].attributes or {}) == {
        "gen_ai.usage.input_tokens": 24,
        "gen_ai.usage.cache_read.input_tokens": 4,
    }
    assert dict(world.spans["decode"].attributes or {}) == {"gen_ai.usage.output_tokens": 10}


def test_every_gen_ai_name_is_one_of_the_convention() -> None:
    world = World()
    world.finish(RECORD)
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    used = {key for span in world.spans.values() for key in span.attributes or {} if key.startswith("gen_ai.")}
    assert used <= known
    assert not any("DEPRECATED" in name for name in used)


@pytest.mark.parametrize(("path", "operation"), [("/generate", "text_completion"), ("/v1/chat/completions", "chat")])
def test_each_path_is_an_operation(path: str, operation: str) -> None:
    world = World()
    world.begin(path=path).finish(status=200, error=None)
    [span] = world.exporter.get_finished_spans()
    assert (span.name, (span.attributes or {})["gen_ai.operation.name"]) == (f"POST {path}", operation)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(
            [replace(ROW, prefill_at=None, first_token_at=None, ended_at=107.0)],
            {"tokenise": (101, 101.5), "queue": (102, 107)},
            id="given up in the queue",
        ),
        pytest.param(
            [replace(ROW, first_token_at=None, ended_at=107.0)],
            {"tokenise": (101, 101.5), "queue": (102, 103), "prefill": (103, 107)},
            id="given up in prefill",
        ),
        pytest.param(
            [ROW, replace(ROW, prefill_at=104.0, first_token_at=106.0, ended_at=109.5)],
            {"tokenise": (101, 101.5), "queue": (102, 103), "prefill": (103, 105), "decode": (105, 109.5)},
            id="two rows, from the first to the last",
        ),
        pytest.param(
            [replace(ROW, ended_at=104.5)],
            {"tokenise": (101, 101.5), "queue": (102, 103), "prefill": (103, 105), "decode": (105, 105)},
            id="a row that ended while its first token was noted",
        ),
    ],
)
def test_phases_are_as_far_as_the_request_came(rows: list[RowRecord], expected: dict[str, tuple[float, float]]) -> None:
    world = World()
    world.finish(recorded(*rows))
    assert world.times() == {f"POST {PATH}": (100, 111), **expected}


ERROR, UNSET = StatusCode.ERROR, StatusCode.UNSET


@pytest.mark.parametrize(
    ("finish", "status", "error", "kind", "code"),
    [
        pytest.param("stop", 200, None, None, UNSET, id="normal"),
        pytest.param("length", 200, None, None, UNSET, id="at its length"),
        pytest.param(None, 401, "invalid_api_key", "invalid_api_key", UNSET, id="refused"),
        pytest.param(None, 413, None, "413", UNSET, id="refused without a code"),
        pytest.param(None, 503, "queue_full", "queue_full", ERROR, id="our overload"),
        pytest.param(None, 500, "internal_error", "internal_error", ERROR, id="our failure"),
        pytest.param("generation_failed", 200, "generation_failed", "generation_failed", ERROR, id="amid a stream"),
        pytest.param("generation_failed", 200, None, "generation_failed", ERROR, id="only the record knows"),
        pytest.param("cancelled", 200, None, "cancelled", UNSET, id="the client left amid a stream"),
        pytest.param("cancelled", None, None, "cancelled", UNSET, id="the client left before its answer"),
        pytest.param(None, None, None, "cancelled", UNSET, id="the client left while it sent"),
    ],
)
def test_how_a_request_ended_is_in_its_span(
    finish: str | None, status: int | None, error: str | None, kind: str | None, code: StatusCode
) -> None:
    world = World()
    record = None if finish is None else recorded(replace(ROW, finish_reason=finish))
    world.finish(record, status=status, error=error)
    attributes = world.root.attributes or {}
    assert (attributes.get("http.response.status_code"), attributes.get("error.type")) == (status, kind)
    assert world.root.status.status_code is code
    assert not world.root.events


async def test_a_phase_that_raises_is_a_phase() -> None:
    world = World()
    trace = world.begin()

    async def refuse() -> None:
        world.time = 104.0
        raise PermissionError

    with pytest.raises(PermissionError):
        await trace.during("authenticate", refuse())
    trace.finish(status=401, error="invalid_api_key")
    assert world.times()["authenticate"] == (100, 104)


# Which requests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("POST", "/metrics"), ("POST", f"{PATH}/x")])
def test_other_requests_have_no_span(method: str, path: str) -> None:
    world = World()
    assert world.tracing.begin(method, path, request_id="r", parent=None) is None
    world.tracing.observe(RECORD)
    assert world.tracing.exemplar() is None
    assert not world.spans


@pytest.mark.parametrize(
    ("ratio", "flags", "sampled"), [(1.0, None, True), (0.0, None, False), (0.0, 1, True), (1.0, 0, False)]
)
def test_a_share_of_our_traces_is_kept_and_of_others_what_the_caller_decided(
    ratio: float, flags: int | None, sampled: bool
) -> None:
    world = World(ratio=ratio)
    trace = world.begin(None if flags is None else replace(CALLER, flags=flags))
    world.tracing.observe(RECORD)
    assert trace.sampled is sampled
    assert int(trace.traceparent[-2:], 16) & 1 == sampled
    assert world.tracing.exemplar() == ({"trace_id": trace.trace_id} if sampled else None)
    trace.finish(status=200, error=None)
    assert bool(world.spans) is sampled


async def test_requests_at_the_same_time_keep_to_their_own_spans() -> None:
    world = World()

    async def one(model: str) -> None:
        trace = world.begin()
        await asyncio.sleep(0)
        world.tracing.observe(recorded(model=model))
        assert world.tracing.exemplar() == {"trace_id": trace.trace_id}
        await asyncio.sleep(0)
        trace.finish(status=200, error=None)

    await asyncio.gather(*(one(str(number)) for number in range(20)))
    roots = [span for span in world.exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert {(span.attributes or {})["gen_ai.response.model"] for span in roots} == {str(n) for n in range(20)}
    assert len({span.context.trace_id for span in roots if span.context}) == 20


def test_a_request_without_a_span_forgets_the_one_before_it() -> None:
    """A pipelined request begins in the context of the one that was answered before it."""
    world = World()
    trace = world.begin()
    world.tracing.begin("GET", "/health", request_id="r", parent=None)
    world.tracing.observe(RECORD)
    assert trace.record is None
    assert world.tracing.exemplar() is None


# In and out over HTTP ---------------------------------------------------------------------------------------


async def answered(
    tracing: Tracing | None, headers: list[tuple[bytes, bytes]], *, status: int | None = 200
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
    """One request through RequestContext: headers of the answer, the log context inside, the scope's state."""
    seen: dict[str, Any] = {}
    sent: list[Message] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(structlog.contextvars.get_contextvars())
        if status is None:
            raise RuntimeError("scripted")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        raise AssertionError("nobody asks")

    async def send(message: Message) -> None:
        sent.append(message)

    layer = RequestContext(
        inner, errors=ErrorRenderer(lambda: 0.0), metrics=Metrics(), new_id=lambda: "id-1", tracing=tracing
    )
    scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": headers}
    await layer(scope, receive, send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return found, seen, scope["state"]


async def test_without_tracing_the_callers_trace_is_in_the_log_and_nowhere_else() -> None:
    headers, seen, state = await answered(None, [(b"traceparent", HEADER.encode())])
    assert seen == {"request_id": "id-1", "trace_id": TRACE}
    assert "traceparent" not in headers
    assert state["trace"] is None


async def test_the_answer_and_the_log_name_the_requests_span() -> None:
    world = World()
    headers, seen, _ = await answered(world.tracing, [(b"traceparent", HEADER.encode()), (b"tracestate", b"congo=t61")])
    assert world.root.context is not None
    assert seen == {"request_id": "id-1", "trace_id": TRACE, "span_id": f"{world.root.context.span_id:016x}"}
    assert headers["traceparent"] == f"00-{TRACE}-{seen['span_id']}-01"
    assert dict(world.root.context.trace_state) == {"congo": "t61"}


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize(
    "given", [b"", b"\xff\xfe", b"00-" + b"0" * 32 + b"-" + SPAN.encode() + b"-01", HEADER.encode() * 1000, b"\x00" * 9]
)
async def test_a_hostile_header_fails_nothing_and_is_not_kept(on: bool, given: bytes) -> None:
    world = World()
    hostile = [(b"traceparent", given), (b"tracestate", b"," * 9000), (b"tracestate", b"\xff=\xff")]
    headers, seen, _ = await answered(world.tracing if on else None, hostile)
    assert headers["x-request-id"] == "id-1"
    assert TRACE not in str(headers) + str(seen)
    assert ("trace_id" in seen) is on
    assert all(span.parent is None for name, span in world.spans.items() if name.startswith("POST"))


async def test_a_state_that_looks_like_a_credential_is_dropped() -> None:
    world = World()
    states = [(b"tracestate", b"congo=t61"), (b"tracestate", b"rojo=mlxd_live_abc")]
    await answered(world.tracing, [(b"traceparent", HEADER.encode()), *states])
    assert world.root.context is not None
    assert dict(world.root.context.trace_state) == {}


async def test_the_last_resort_is_an_error_in_the_span() -> None:
    world = World()
    headers, _, _ = await answered(world.tracing, [], status=None)
    assert "traceparent" in headers
    attributes = world.root.attributes or {}
    assert (attributes["http.response.status_code"], attributes["error.type"]) == (500, "internal_error")
    assert not world.root.events


# Metrics ----------------------------------------------------------------------------------------------------


def points(*records: RequestRecord) -> dict[str, list[HistogramDataPoint]]:
    """What the four histograms hold after `records`."""
    reader = InMemoryMetricReader()
    metrics = GenAiMetrics(reader, Resource({}))
    for record in records:
        metrics.observe(record)
    data = reader.get_metrics_data()
    assert data is not None
    [resource] = data.resource_metrics
    [scope] = resource.scope_metrics
    found: dict[str, Any] = {metric.name: list(metric.data.data_points) for metric in scope.metrics}
    return found


LABELS = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "mlxd",
    "gen_ai.request.model": "default",
    "gen_ai.response.model": "org/model",
}


def test_a_request_is_counted_once_in_each_histogram() -> None:
    found = points(RECORD)
    assert {name: [(dict(p.attributes or {}), p.sum, p.count) for p in each] for name, each in found.items()} == {
        "gen_ai.client.token.usage": [
            ({**LABELS, "gen_ai.token.type": "input"}, 12, 1),
            ({**LABELS, "gen_ai.token.type": "output"}, 5, 1),
        ],
        "gen_ai.server.request.duration": [(LABELS, 9.0, 1)],
        "gen_ai.server.time_to_first_token": [(LABELS, 3.0, 1)],
        "gen_ai.server.time_per_output_token": [(LABELS, 1.0, 1)],
    }
    known = {value for name, value in vars(gen_ai_metrics).items() if name.startswith("GEN_AI_")}
    assert set(found) <= known


def test_what_failed_has_a_duration_with_its_reason_and_no_latencies() -> None:
    found = points(recorded(replace(ROW, finish_reason="generation_failed"), asked_model=None))
    assert set(found) == {"gen_ai.client.token.usage", "gen_ai.server.request.duration"}
    [duration] = found["gen_ai.server.request.duration"]
    assert dict(duration.attributes or {}) == {
        **{name: value for name, value in LABELS.items() if name != "gen_ai.request.model"},
        "error.type": "generation_failed",
    }


def test_one_token_has_no_time_between_tokens() -> None:
    found = points(recorded(replace(ROW, completion_tokens=1)), recorded(replace(ROW, first_token_at=None)))
    assert "gen_ai.server.time_per_output_token" not in found
    assert [point.count for point in found["gen_ai.server.time_to_first_token"]] == [1]


def test_the_buckets_are_the_conventions() -> None:
    found = points(RECORD)
    bounds = {name: list(each[0].explicit_bounds) for name, each in found.items()}
    assert bounds["gen_ai.server.request.duration"] == pytest.approx(
        [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]
    )
    assert bounds["gen_ai.client.token.usage"] == [
        *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536),
        *(262144, 1048576, 4194304, 16777216, 67108864),
    ]
    assert bounds["gen_ai.server.time_to_first_token"] == list(otlp_metrics.FIRST_TOKEN_SECONDS)
    assert bounds["gen_ai.server.time_per_output_token"] == list(otlp_metrics.TOKEN_SECONDS)


# The end ----------------------------------------------------------------------------------------------------


async def test_a_collector_that_does_not_answer_is_given_up() -> None:
    never, done = threading.Event(), threading.Event()
    await otlp.close([never.wait, done.set], timeout=0.05)
    assert done.is_set()
    never.set()


async def test_no_provider_is_made_global() -> None:
    collector = otlp.Collector(endpoint="http://127.0.0.1:9", version="0", instance="i")
    telemetry = otlp.OpenTelemetry(collector, sample_ratio=1.0, metrics=True, paths=[PATH], clock=lambda: 0.0)
    async with telemetry.run():
        assert type(get_tracer_provider()) is ProxyTracerProvider
        assert type(get_meter_provider()).__name__ == "_ProxyMeterProvider"
    assert len(telemetry.observers) == 2


# Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "kept"),
    [
        ("", ""),
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
        ("https://collector.example/otlp/", "https://collector.example/otlp"),
        ("http://[::1]:4318/", "http://[::1]:4318"),
    ],
)
def test_an_endpoint_is_a_base_url(endpoint: str, kept: str) -> None:
    assert TracingSettings(endpoint=endpoint).endpoint == kept


@pytest.mark.parametrize(
    "endpoint",
    [
        *("127.0.0.1:4318", "grpc://collector:4317", "http://", "file:///etc/passwd", "http://a:b@collector"),
        *("http://collector?x=1", "http://collector#x", "http://collector:x", "http://coll ector", "http://coll\u00e9"),
    ],
)
def test_another_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^tracing\.endpoint: "):
        Settings.load(None, {"tracing.endpoint": endpoint})


def headers_file(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    file = folder / "headers"
    file.write_bytes(text.encode())
    file.chmod(mode)
    return file


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [("http://collector.example", "a: b"), ("", "a: b")],
)
def test_headers_go_nowhere_in_clear(endpoint: str, text: str, tmp_path: Path) -> None:
    file = headers_file(tmp_path, text)
    with pytest.raises(ConfigurationError, match=r"^tracing: .*headers_file"):
        Settings.load(None, {"tracing.endpoint": endpoint, "tracing.headers_file": file})


def test_metrics_need_an_endpoint() -> None:
    with pytest.raises(ConfigurationError, match=r"^tracing: .*endpoint"):
        Settings.load(None, {"tracing.metrics": True})


@pytest.mark.parametrize("endpoint", ["https://collector.example", "http://localhost:4318", "http://127.0.0.9"])
def test_headers_are_read_from_a_private_file(endpoint: str, tmp_path: Path) -> None:
    text = "# for the collector\n\nAuthorization: Bearer s3cret \nX-Scope-OrgID:\tacme\n"
    found = TracingSettings(endpoint=endpoint, headers_file=headers_file(tmp_path, text))
    assert found.headers() == {"authorization": "Bearer s3cret", "x-scope-orgid": "acme"}
    assert TracingSettings(endpoint=endpoint).headers() == {}


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        ("s3cret", 0o600, "line 1"),
        ("a: b\nb s3cret: c", 0o600, "line 2"),
        ("a: s3cret\nA: c", 0o600, "line 2"),
        ("a: s3cret\x07", 0o600, "line 1"),
        ("a:", 0o600, "line 1"),
        ("a: s3cr\u00e9t", 0o600, "ASCII"),
        ("a: s3cret", 0o644, "chmod 600"),
        (None, 0o600, "no such file"),
    ],
)
def test_a_wrong_file_is_an_error_that_tells_no_secret(
    text: str | None, mode: int, complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "absent" if text is None else headers_file(tmp_path, text, mode=mode)
    with pytest.raises(ConfigurationError, match=complaint) as error:
        TracingSettings(endpoint="http://127.0.0.1", headers_file=file).headers()
    assert "s3cr" not in str(error.value)


def test_telemetry_of_the_environment_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "otel_sdk_disabled", "FASTAPI_OTEL_AUTO_CONFIGURE"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("NOT_OTEL_X", "kept")
    forget_outside_telemetry()
    assert [name for name in os.environ if "OTEL" in name.upper()] == ["NOT_OTEL_X"]


# Off --------------------------------------------------------------------------------------------------------

BUILDS = """
import sys, fastapi
before = set(sys.modules)
from service.app import build
from service.settings import Settings
build(Settings.load(None, {"server.state_dir": sys.argv[1], "auth.enabled": False}), object())
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] in sys.argv[2:]))
print("sdk", "opentelemetry.sdk" in sys.modules)
"""


def test_without_an_endpoint_opentelemetry_is_not_imported(tmp_path: Path) -> None:
    """By nobody but fastapi, which imports OpenTelemetry's API (and not its SDK) for itself."""
    done = subprocess.run(
        [sys.executable, "-c", BUILDS, str(tmp_path), "opentelemetry", "requests", "google", "urllib3"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.split() == ["sdk", "False"]


@pytest.mark.parametrize("missing", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http", "requests"])
def test_an_endpoint_without_the_extra_is_an_error_of_the_configuration(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, missing)
    with pytest.raises(ConfigurationError, match=r"tracing\.endpoint.*mlxd\[otlp\]"):
        build(settings(tmp_path), backend())


def test_a_bug_of_ours_is_not_taken_for_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "service.observability.gen_ai")
    with pytest.raises(ImportError):
        build(settings(tmp_path), backend())


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name in ("otlp", "otlp_metrics", "tracing", "gen_ai"):
        monkeypatch.delitem(sys.modules, f"service.observability.{name}", raising=False)
        monkeypatch.delattr(f"service.observability.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)


def settings(folder: Path) -> Settings:
    return Settings.load(
        None, {"server.state_dir": folder, "auth.enabled": False, "tracing.endpoint": "http://127.0.0.1:9"}
    )


def backend() -> Any:
    """Nobody starts it."""
    return object()
