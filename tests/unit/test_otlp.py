"""The session with a collector that may be anybody, over real sockets."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from structlog.testing import capture_logs

from service.observability.otlp import Collector, CollectorSession
from service.observability.record import RequestRecord, RowRecord
from service.observability.trace_context import TraceParent
from service.observability.tracing import Tracing
from tests.otlp_collector import CHUNK, attributes_of, otlp_collector

RECORD = RequestRecord(
    request_id="r",
    principal="p",
    tenant="t",
    key_id=None,
    model="m",
    endpoint="/generate",
    stream=False,
    began_at=1.0,
    encoded_at=1.0,
    submitted_at=1.0,
    ended_at=2.0,
    rows=(
        RowRecord(
            prefill_at=1.0,
            first_token_at=1.5,
            ended_at=2.0,
            prompt_tokens=1,
            cached_tokens=0,
            completion_tokens=1,
            max_tokens=1,
            finish_reason="stop",
        ),
    ),
)


def post(session: requests.Session, url: str) -> int:
    """As the exporter does it."""
    return session.request("POST", f"{url}/v1/traces", data=b"x", timeout=5, allow_redirects=False).status_code


def end_one(processor: SpanProcessor, resource: Resource | None = None) -> None:
    """One request with a caller."""
    tracing = Tracing(
        processor, resource=resource or Resource({}), sample_ratio=1.0, paths=["/generate"], clock=lambda: 2.0
    )
    caller = TraceParent("ab" * 16, "cd" * 8, 1, (("congo", "t61"),))
    trace = tracing.begin("POST", "/generate", request_id="r", parent=caller)
    assert trace is not None
    tracing.observe(RECORD)
    trace.finish(status=200, error=None)


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_what_was_ended_arrives_at_shutdown_with_its_headers() -> None:
    with otlp_collector() as collector:
        target = Collector(endpoint=collector.url, version="1.2", instance="i", headers={"authorization": "Bearer x"})
        processor = target.spans()
        tracing = Tracing(processor, resource=target.resource, sample_ratio=1.0, paths=["/generate"], clock=lambda: 2.0)
        caller = TraceParent("ab" * 16, "cd" * 8, 1, (("congo", "t61"),))
        trace = tracing.begin("POST", "/generate", request_id="r", parent=caller)
        assert trace is not None
        tracing.observe(RECORD)
        trace.finish(status=200, error=None)
        processor.shutdown()
        [delivery] = collector.deliveries
        assert delivery.path == "/v1/traces"
        assert delivery.headers["authorization"] == "Bearer x"
        assert delivery.headers["content-type"] == "application/x-protobuf"
        assert {span.name for span in collector.spans} == {"POST /generate", "tokenise", "queue", "prefill", "decode"}
        assert {span.trace_id.hex() for span in collector.spans} == {"ab" * 16}
        assert {span.trace_state for span in collector.spans} == {"congo=t61"}
        assert collector.resource == {"service.name": "mlxd", "service.version": "1.2", "service.instance.id": "i"}
        assert attributes_of(collector.spans[-1].attributes)["gen_ai.response.finish_reasons"] == ["stop"]


def test_a_redirection_is_a_failure_and_is_not_followed_and_a_cookie_is_not_kept() -> None:
    failures: list[str] = []
    with otlp_collector() as elsewhere, otlp_collector("redirecting") as collector:
        collector.elsewhere = elsewhere.url
        with CollectorSession("traces", failures.append) as session:
            assert [post(session, collector.url) for _ in range(2)] == [307, 307]
        assert not elsewhere.deliveries
        assert ["cookie" in each.headers for each in collector.deliveries] == [False, False]
    assert failures == ["traces", "traces"]


def test_an_endless_answer_is_not_read() -> None:
    with otlp_collector("endless") as collector, CollectorSession("traces", lambda _: None) as session:
        assert post(session, collector.url) == 302
        assert collector.ended.wait(30)
        assert collector.sent < 512 * len(CHUNK)  # what the sockets' buffers took


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_neither_a_proxy_nor_a_password_comes_from_the_environment(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password s3cret\n")
    netrc.chmod(0o600)
    with otlp_collector() as collector, otlp_collector() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        monkeypatch.setenv("NETRC", str(netrc))
        with CollectorSession("traces", lambda _: None) as session:
            assert post(session, collector.url) == 200
        assert not proxy.deliveries
        [delivery] = collector.deliveries
        assert "authorization" not in delivery.headers


def test_an_episode_of_failures_is_two_lines_and_every_attempt_is_counted() -> None:
    failures: list[str] = []
    with (
        otlp_collector("failing") as collector,
        CollectorSession("metrics", failures.append) as session,
        capture_logs() as lines,
    ):
        for _ in range(3):
            post(session, collector.url)
        with pytest.raises(requests.ConnectionError):
            post(session, f"http://127.0.0.1:{closed_port()}")
        collector.manner = "polite"
        for _ in range(2):
            post(session, collector.url)
    expected: list[dict[str, Any]] = [
        {"event": "collector_failed", "signal": "metrics", "reason": "503", "log_level": "warning"},
        {"event": "collector_back", "signal": "metrics", "log_level": "info"},
    ]
    assert lines == expected
    assert failures == ["metrics"] * 4


def test_the_sdk_has_no_line_of_its_own_for_an_attempt(caplog: pytest.LogCaptureFixture) -> None:
    failures: list[str] = []
    with otlp_collector("refusing") as collector, capture_logs() as lines:
        processor = Collector(endpoint=collector.url, version="0", instance="i", failed=failures.append).spans()
        end_one(processor)
        processor.shutdown()
    assert failures == ["traces"]
    assert [line["event"] for line in lines] == ["collector_failed"]
    assert not caplog.records
