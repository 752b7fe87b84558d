"""Traces and gen_ai metrics of a real service, as a real OTLP collector gets them; and collectors that are none."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider
from starlette.types import Message, Receive, Scope, Send

from service.api.errors import ErrorRenderer
from service.api.middleware.context import RequestContext
from service.engine.backend import ModelInfo
from service.engine.tokenizer import Tokenizer
from service.observability.metrics import Metrics
from service.observability.otlp import CLOSE_TIMEOUT, Collector as Target
from service.observability.tracing import Tracing
from service.settings import Settings
from tests.byte_tokens import CONTROL_TOKENS, byte_tokenizer
from tests.fakes import FakeBackend
from tests.otlp_collector import Collector, Manner, attributes_of, otlp_collector
from tests.serving import Running, bearer, make_key, served, started
from tests.unit.test_tracing import RECORD

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_SPAN = "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{CALLER}-{CALLER_SPAN}-01"}
PROMPT = "canary prompt 31415926"
PHASES = ["authenticate", "tokenise", "queue", "prefill", "decode"]


def settings_for(folder: Path, endpoint: str, **more: Any) -> Settings:
    return Settings.load(
        None,
        {
            "server.port": 0,
            "server.state_dir": folder,
            "auth.enabled": False,
            "tracing.endpoint": endpoint,
            **more,
        },
    )


# One day of a service ---------------------------------------------------------------------------------------


@dataclass
class Day:
    """What a service was asked, and what its collector has of it. Times are wall time in nanoseconds."""

    collector: Collector
    key: str
    began: int
    ended: int = 0
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    exposition: str = ""

    def trace(self, name: str) -> dict[str, Span]:
        """The spans of the request that was sent with the id `name`, by their names."""
        spans = self.collector.spans
        [root] = [span for span in spans if attributes_of(span.attributes).get("mlxd.request_id") == name]
        return {"root": root, **{span.name: span for span in spans if span.parent_span_id == root.span_id}}

    def root(self, name: str) -> dict[str, Any]:
        return attributes_of(self.trace(name)["root"].attributes)


class Chatting(FakeBackend):
    """With a chat template: the messages, one after the other."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **_: object) -> str:
        return "".join(message["content"] for message in conversation)

    def load(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> ModelInfo:
        tokenizer = Tokenizer(byte_tokenizer(), special=CONTROL_TOKENS, bos=None, template=self)
        return replace(super().load(progress), tokenizer=tokenizer)


class Breaks:
    """A step that fails when it is told to."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, number: int) -> None:
        if self.now.is_set():
            self.now.clear()
            raise RuntimeError("scripted")


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Day]:
    folder = tmp_path_factory.mktemp("traces")
    headers_file = folder / "headers"
    headers_file.write_text("authorization: Bearer of-the-collector\n")
    headers_file.chmod(0o600)
    with otlp_collector() as collector:
        more = {"auth.enabled": True, "tracing.metrics": True, "tracing.headers_file": headers_file}
        settings = settings_for(folder, collector.url, **more)
        key = make_key(settings, "inference", "metrics")
        breaks = Breaks()
        found = Day(collector, key.text, began=time.time_ns())
        with (
            served(settings, Chatting(before_step=breaks)) as service,
            httpx.Client(base_url=service.url, headers=bearer(key), timeout=60) as http,
        ):
            _ask(found, http, breaks)
            found.exposition = http.get("/metrics", headers={"accept": "application/openmetrics-text"}).text
        found.ended = time.time_ns()
        yield found


def _ask(day: Day, http: httpx.Client, breaks: Breaks) -> None:
    def post(name: str, path: str, body: Any, **headers: str) -> None:
        named = {"x-request-id": name, **headers}
        day.answers[name] = http.post(path, json=body, headers=named)

    chat = {"model": "default", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20}
    post("chat", "/v1/chat/completions", chat, **TRACEPARENT)
    post("stream", "/v1/completions", {"model": "fake", "prompt": PROMPT, "max_tokens": 20, "stream": True, "n": 2})
    post("native", "/generate/", {"prompt": PROMPT, "max_tokens": 20})
    day.texts += [day.answers["chat"].json()["choices"][0]["message"]["content"], day.answers["native"].json()["text"]]
    post("stranger", "/generate", {"prompt": PROMPT}, authorization="Bearer mlxd_test_nobody", **TRACEPARENT)
    post("malformed", "/generate", {"prompt": PROMPT, "max_tokens": -1})
    post("unknown", "/v1/chat/completions", {**chat, "model": PROMPT})
    post("large", "/generate", {"prompt": "x" * 3_000_000})
    post("unsampled", "/generate", {"prompt": PROMPT}, traceparent=f"00-{CALLER}-{CALLER_SPAN}-00")
    post("hostile", "/generate", {"prompt": PROMPT, "max_tokens": 2}, traceparent="00-" + "f" * 4000, tracestate="=,=")
    endless = {"prompt": PROMPT, "max_tokens": 4000, "stream": True}
    for name in ("broken", "left"):
        with http.stream("POST", "/generate", json=endless, headers={"x-request-id": name}) as answer:
            lines = answer.iter_lines()
            next(lines)
            if name == "broken":
                breaks.now.set()
                list(lines)
            day.answers[name] = answer


def test_a_request_is_a_tree_of_spans_below_its_callers(day: Day) -> None:
    trace = day.trace("chat")
    root = trace.pop("root")
    assert sorted(trace) == sorted(PHASES)
    assert root.name == "POST /v1/chat/completions"
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (CALLER, CALLER_SPAN)
    assert {span.trace_id.hex() for span in trace.values()} == {CALLER}
    assert root.kind == Span.SPAN_KIND_SERVER
    assert len({span.span_id for span in (root, *trace.values())}) == 6
    assert day.answers["chat"].headers["traceparent"] == f"00-{CALLER}-{root.span_id.hex()}-01"


@pytest.mark.parametrize("name", ["chat", "stream", "native"])
def test_its_times_are_nested_and_in_order_and_those_of_the_wall(day: Day, name: str) -> None:
    trace = day.trace(name)
    root = trace.pop("root")
    assert day.began <= root.start_time_unix_nano <= root.end_time_unix_nano <= day.ended
    moments = [root.start_time_unix_nano]
    for phase in PHASES:
        moments += [trace[phase].start_time_unix_nano, trace[phase].end_time_unix_nano]
    moments.append(root.end_time_unix_nano)
    assert moments == sorted(moments)
    assert trace["queue"].end_time_unix_nano == trace["prefill"].start_time_unix_nano
    assert trace["prefill"].end_time_unix_nano == trace["decode"].start_time_unix_nano


def test_its_attributes_are_those_of_the_answer(day: Day) -> None:
    usage = day.answers["chat"].json()["usage"]
    assert day.root("chat") == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mlxd",
        "gen_ai.request.model": "default",
        "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 20,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "mlxd.request_id": "chat",
    }
    assert day.root("stream")["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert day.root("native")["http.route"] == "/generate"


def test_a_request_without_a_caller_begins_a_trace(day: Day) -> None:
    root = day.trace("stream")["root"]
    assert root.parent_span_id == b""
    assert day.answers["stream"].headers["traceparent"].split("-")[1] == root.trace_id.hex()
    assert len({day.trace(name)["root"].trace_id for name in ("stream", "native", "hostile")}) == 3


@pytest.mark.parametrize(
    ("name", "status", "error", "phases"),
    [
        ("stranger", 401, "invalid_credentials", ["authenticate"]),
        ("malformed", 400, "invalid_value", ["authenticate"]),
        ("unknown", 404, "model_not_found", ["authenticate"]),
        ("large", 413, "request_too_large", ["authenticate"]),
    ],
)
def test_a_refusal_is_a_span_without_the_engines_phases(
    day: Day, name: str, status: int, error: str, phases: list[str]
) -> None:
    trace = day.trace(name)
    attributes = attributes_of(trace.pop("root").attributes)
    assert day.answers[name].status_code == attributes["http.response.status_code"] == status
    assert attributes["error.type"] == error
    assert list(trace) == phases
    assert "traceparent" in day.answers[name].headers


def test_a_failure_amid_a_stream_is_an_error_and_a_departure_is_none(day: Day) -> None:
    broken, left = day.trace("broken")["root"], day.trace("left")["root"]
    assert day.root("broken")["error.type"] == "generation_failed"
    assert broken.status.code == Status.STATUS_CODE_ERROR
    assert day.root("left")["error.type"] == "cancelled"
    assert day.root("left")["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert left.status.code == Status.STATUS_CODE_UNSET
    for root in (broken, left):
        assert not root.events
        assert attributes_of(root.attributes)["http.response.status_code"] == 200


def test_what_the_caller_does_not_record_is_not_sent_but_answered(day: Day) -> None:
    flags = day.answers["unsampled"].headers["traceparent"].rpartition("-")[2]
    assert day.answers["unsampled"].status_code == 200
    assert int(flags, 16) & 1 == 0
    names = [attributes_of(span.attributes).get("mlxd.request_id") for span in day.collector.spans]
    assert "unsampled" not in names


def test_only_inference_has_spans_and_an_answer_that_names_one(day: Day) -> None:
    roots = [span for span in day.collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    sampled = len(day.answers) - 1
    assert len(roots) == sampled
    assert {span.name for span in roots} == {"POST /generate", "POST /v1/completions", "POST /v1/chat/completions"}


def test_neither_prompt_nor_output_nor_credential_leaves(day: Day) -> None:
    outgoing = b"".join(delivery.body for delivery in day.collector.deliveries)
    assert all(len(text) == 20 for text in day.texts)
    for secret in (PROMPT, "31415926", *day.texts, day.key, day.key.split("_")[-2], "nobody", "scripted"):
        assert secret.encode() not in outgoing
    assert {each.headers["authorization"] for each in day.collector.deliveries} == {"Bearer of-the-collector"}


def test_gen_ai_metrics_are_the_sums_of_the_requests(day: Day) -> None:
    metrics = day.collector.metrics
    assert set(metrics) == {
        "gen_ai.client.token.usage",
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    chats = {
        attributes_of(point.attributes)["gen_ai.token.type"]: point.sum
        for point in metrics["gen_ai.client.token.usage"].histogram.data_points
        if attributes_of(point.attributes)["gen_ai.operation.name"] == "chat"
    }
    usage = day.answers["chat"].json()["usage"]
    assert chats == {"input": usage["prompt_tokens"], "output": usage["completion_tokens"]}
    durations = metrics["gen_ai.server.request.duration"].histogram.data_points
    ends = {attributes_of(point.attributes).get("error.type", "") for point in durations}
    assert ends == {"", "generation_failed", "cancelled"}
    assert sum(point.count for point in durations) == 7  # what reached the queue
    [bounds] = {tuple(point.explicit_bounds) for point in durations}
    assert len(bounds) == 14


def test_a_histograms_exemplar_is_the_trace(day: Day) -> None:
    for series in ("mlxd_time_to_first_token_seconds", "mlxd_e2e_request_latency_seconds"):
        found = re.findall(rf'{series}_bucket{{[^}}]*}} \S+ # {{trace_id="([0-9a-f]{{32}})"}}', day.exposition)
        assert found, series
        assert set(found) <= {span.trace_id.hex() for span in day.collector.spans}


# Collectors that are none -----------------------------------------------------------------------------------


@contextmanager
def endpoint(manner: Manner | None) -> Iterator[str]:
    """Of a collector with that manner; without one, of nobody."""
    if manner is None:
        yield "http://127.0.0.1:9"
        return
    with otlp_collector(manner) as collector:
        yield collector.url


@pytest.mark.parametrize("manner", [None, "silent", "failing", "endless"])
def test_no_collector_keeps_a_request_or_the_end_of_the_service(manner: Manner | None, tmp_path: Path) -> None:
    with endpoint(manner) as url:
        with served(settings_for(tmp_path, url, **{"tracing.metrics": True}), FakeBackend()) as service:
            with httpx.Client(base_url=service.url, timeout=10) as http:
                slowest = 0.0
                for _ in range(50):
                    began = time.perf_counter()
                    answer = http.post("/generate", json={"prompt": "ab", "max_tokens": 2})
                    slowest = max(slowest, time.perf_counter() - began)
                    assert answer.status_code == 200
            began = time.perf_counter()
        seconds = time.perf_counter() - began
    print(f"collector {manner}: slowest request {slowest * 1000:.0f} ms, end of the service {seconds:.2f} s")
    assert seconds < CLOSE_TIMEOUT + 3
    assert slowest < 1


# A whole process --------------------------------------------------------------------------------------------


def hostile(decoy: str, folder: Path) -> dict[str, Any]:
    """An environment that wants telemetry elsewhere, or none, or no start."""
    netrc = folder / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": decoy,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{decoy}/v1/traces",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-stray=1",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": "/nonexistent",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.001",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=stray,stray=1",
        "OTEL_SERVICE_NAME": "stray",
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_BSP_MAX_QUEUE_SIZE": "1",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "-1",
        "OTEL_PROPAGATORS": "nonsense",
        "OTEL_PYTHON_CONTEXT": "nonsense",
        "OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider",
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "HTTP_PROXY": decoy,
        "ALL_PROXY": decoy,
        "NETRC": str(netrc),
    }


def request_line(running: Running) -> dict[str, Any]:
    """The log line of the one request, as soon as it is written."""
    ends = time.monotonic() + 20
    while True:
        lines = [json.loads(line) for line in running.output.read_text().splitlines() if line.startswith("{")]
        found = [line for line in lines if line["event"] == "request"]
        if found:
            return dict(found[0])
        assert time.monotonic() < ends, lines
        time.sleep(0.02)


def test_a_stray_environment_redirects_nothing_and_the_log_names_the_span(tiny_model_dir: Path, tmp_path: Path) -> None:
    with otlp_collector() as collector, otlp_collector() as decoy:
        ours: dict[str, Any] = {
            "MLXD_MODEL__REFERENCE": str(tiny_model_dir),
            "MLXD_TRACING__ENDPOINT": collector.url,
            "MLXD_LOG__FORMAT": "json",
        }
        with started(tmp_path, **ours, **hostile(decoy.url, tmp_path)) as running:
            body = {"prompt": "ab", "max_tokens": 5}
            answer = httpx.post(f"{running.url}/generate", json=body, headers=TRACEPARENT, timeout=60, trust_env=False)
            assert answer.status_code == 200
            line = request_line(running)
        assert not decoy.deliveries
        assert sorted(span.name for span in collector.spans) == sorted(["POST /generate", *PHASES])
        assert collector.resource["service.name"] == "mlxd"
        assert "stray" not in collector.resource
        [root] = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
        assert (line["trace_id"], line["span_id"]) == (CALLER, root.span_id.hex())
        for delivery in collector.deliveries:
            assert {"x-stray", "authorization", "content-encoding"}.isdisjoint(delivery.headers)


def test_fastapis_own_telemetry_stays_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the environment asks for it, and nobody has emptied it."""
    with otlp_collector() as decoy:
        monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", decoy.url)
        with served(settings_for(tmp_path, ""), FakeBackend()) as service:
            service.generate("ab", max_tokens=2)
        assert not decoy.deliveries
    assert type(get_tracer_provider()) is ProxyTracerProvider


# What it costs ----------------------------------------------------------------------------------------------


async def _seconds(tracing: Tracing | None, headers: list[tuple[bytes, bytes]], *, times: int) -> float:
    """Of one request through RequestContext alone; the best of several runs."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        if tracing is not None:
            tracing.observe(RECORD)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        raise AssertionError("nobody asks")

    async def send(message: Message) -> None:
        pass

    layer = RequestContext(
        inner, errors=ErrorRenderer(lambda: 0.0), metrics=Metrics(), new_id=lambda: "id", tracing=tracing
    )
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            scope: Scope = {"type": "http", "method": "POST", "path": "/generate", "headers": headers}
            await layer(scope, receive, send)
        best = min(best, (time.perf_counter() - began) / times)
    return best


@pytest.mark.anyio
async def test_the_cost_of_a_request_is_microseconds_and_of_a_token_nothing() -> None:
    given = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"user-agent", b"x")]
    traced = [*given, (b"traceparent", TRACEPARENT["traceparent"].encode())]
    with otlp_collector() as collector:
        target = Target(endpoint=collector.url, version="0", instance="i")
        processor = target.spans()
        tracing = Tracing(processor, resource=Resource({}), sample_ratio=1.0, paths=["/generate"], clock=time.monotonic)
        none = Tracing(processor, resource=Resource({}), sample_ratio=0.0, paths=["/generate"], clock=time.monotonic)
        off = await _seconds(None, given, times=5000)
        named = await _seconds(None, traced, times=5000)
        unsampled = await _seconds(none, given, times=2000)
        on = await _seconds(tracing, traced, times=500)
        unsent = Tracing(
            SpanProcessor(), resource=Resource({}), sample_ratio=1.0, paths=["/generate"], clock=time.monotonic
        )
        loop = await _seconds(unsent, traced, times=500)
        processor.shutdown()
    print(
        f"\nmicroseconds a request in RequestContext: off {off * 1e6:.1f}, off with a traceparent {named * 1e6:.1f}, "
        f"on but not sampled {unsampled * 1e6:.1f}, on with 5 spans {on * 1e6:.1f}, of which {loop * 1e6:.1f} are the "
        "event loop's own"
    )
    assert named - off < 50e-6
    assert on - off < 1e-3
