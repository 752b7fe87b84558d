"""The one line and the metrics of each request."""

import itertools
import json
from collections.abc import Awaitable, Callable

import pytest
import structlog

from service.engine.generation import Delta
from tests.fakes_api import DONE, Answer, Client, FakeInference, Service

pytestmark = pytest.mark.anyio


async def test_one_line_and_one_count_for_each_request() -> None:
    ticks = itertools.count()
    found = Service(inference=FakeInference([Delta("secret text"), DONE]), clock=lambda: float(next(ticks)))
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        answer = await Client(found).post("/generate", {"prompt": "secret prompt"})
    [line] = lines
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "id-1",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "client": "127.0.0.1",
        "duration_ms": 2000.0,
        "first_byte_ms": 1000.0,
        "bytes_received": len(json.dumps({"prompt": "secret prompt"})),
        "bytes_sent": len(answer.body),
        "complete": True,
        "principal": "local",
        "tenant": "local",
        "model": "org/model",
        "stream": False,
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 3,
        "finish_reason": "stop",
    }
    assert found.count("mlxd_http_requests_total", route="/generate", method="POST", status="200") == 1
    assert found.count("mlxd_http_request_duration_seconds_sum", route="/generate") == 2
    assert found.count("mlxd_http_requests_in_flight") == 0


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda client: client.get("/nowhere"), "not_found"),
        (lambda client: client.request("DELETE", "/generate"), "method_not_allowed"),
        (lambda client: client.post("/generate", {"prompt": 1}), "invalid_value"),
        (lambda client: client.post("/v1/completions", {"model": "other", "prompt": "x"}), "model_not_found"),
        (lambda client: client.request("GET", "/health", b"", [("host", "evil.example")]), "invalid_host"),
        (lambda client: client.request("POST", "/generate", b"", [("content-length", "9" * 9)]), "request_too_large"),
    ],
)
async def test_whatever_refuses_a_request_its_line_has_the_code(
    ask: Callable[[Client], Awaitable[Answer]], code: str
) -> None:
    with structlog.testing.capture_logs() as lines:
        answer = await ask(Client(Service()))
    assert answer.error["code"] == code
    assert [line["error"] for line in lines if line["event"] == "request"] == [code]


async def test_a_failure_that_nobody_foresaw_is_an_internal_error_in_the_line_too() -> None:
    found = Service()
    found.inference.refusal = ValueError("a bug")  # type: ignore[assignment]
    with structlog.testing.capture_logs() as lines:
        answer = await Client(found).post("/generate", {"prompt": "x"})
    assert answer.error["code"] == "internal_error"
    [line] = [line for line in lines if line["event"] == "request"]
    assert (line["status"], line["error"]) == (500, "internal_error")
    assert "first_byte_ms" not in line, "the answer of the last resort is made outside"


async def test_labels_are_templates_and_closed_sets_whatever_clients_send() -> None:
    found = Service()
    client = Client(found)
    await client.get("/v1/models/org/model")
    await client.get("/docs")
    for number in range(20):
        await client.get(f"/random/{number}")
        await client.get(f"/v1/models/random-{number}")
        await client.request(f"BREW{number}", "/health")
    labels = {
        tuple(sample.labels.values())
        for metric in found.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "mlxd_http_requests_total"
    }
    assert labels == {
        ("/v1/models/{model_id:path}", "GET", "200"),
        ("/v1/models/{model_id:path}", "GET", "404"),
        ("/docs", "GET", "200"),
        ("unmatched", "GET", "404"),
        ("/health", "other", "405"),
    }


async def test_probes_that_succeed_are_quiet() -> None:
    with structlog.testing.capture_logs() as lines:
        await Client(Service()).get("/health")
        await Client(Service()).get("/metrics")
    assert [line["log_level"] for line in lines] == ["debug", "info"]
