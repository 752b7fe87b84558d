"""The one line and the metrics of each request."""

import itertools

import pytest
import structlog

from service.engine.generation import Delta
from tests.fakes_api import DONE, Client, FakeInference, Service

pytestmark = pytest.mark.anyio


async def test_one_line_and_one_count_for_each_request() -> None:
    ticks = itertools.count()
    found = Service(inference=FakeInference([Delta("secret text"), DONE]), clock=lambda: float(next(ticks)))
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        await Client(found).post("/generate", {"prompt": "secret prompt"})
    [line] = lines
    assert line == {
        "event": "request",
        "log_level": "info",
        "request_id": "id-1",
        "method": "POST",
        "route": "/generate",
        "status": 200,
        "duration_ms": 2000.0,
        "first_byte_ms": 1000.0,
        "bytes_sent": line["bytes_sent"],
        "complete": True,
        "principal": "local",
        "tenant": "local",
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 3,
        "finish_reason": "stop",
    }
    assert found.count("mlxd_http_requests_total", route="/generate", method="POST", status="200") == 1
    assert found.count("mlxd_http_request_duration_seconds_sum", route="/generate") == 2
    assert found.count("mlxd_http_requests_in_flight") == 0


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
