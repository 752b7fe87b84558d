"""From the records of finished requests to their series."""

from __future__ import annotations

from typing import Any

import pytest

from service.observability.metrics import Metrics
from service.observability.record import RequestRecord, RowRecord
from service.observability.request_metrics import RequestMetrics, prompt_size

LATENCIES = (
    "time_to_first_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
)


def row(**changes: Any) -> RowRecord:
    """Queued at 10, begun at 12, first token at 15, ended at 21 with 4 tokens."""
    given: dict[str, Any] = {
        "prefill_at": 12.0,
        "first_token_at": 15.0,
        "ended_at": 21.0,
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "completion_tokens": 4,
        "max_tokens": 4,
        "finish_reason": "length",
    }
    return RowRecord(**{**given, **changes})


def record(*rows: RowRecord, **changes: Any) -> RequestRecord:
    given: dict[str, Any] = {
        "request_id": "r",
        "principal": "key:k1",
        "tenant": "acme",
        "key_id": "k1",
        "model": "org/model",
        "endpoint": "/generate",
        "stream": False,
        "began_at": 9.0,
        "encoded_at": 9.5,
        "submitted_at": 10.0,
        "ended_at": 22.0,
        "rows": rows or (row(),),
    }
    return RequestRecord(**{**given, **changes})


class Counted:
    def __init__(self, max_consumers: int = 10, **more: Any) -> None:
        self.metrics = Metrics()
        self.observe = RequestMetrics(self.metrics, max_consumers=max_consumers, **more)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"mlxd_{name}", labels)

    def seconds(self, name: str, **labels: str) -> tuple[float | None, float | None]:
        """(number, sum) of a histogram."""
        return self.value(f"{name}_count", **labels), self.value(f"{name}_sum", **labels)


@pytest.mark.parametrize(
    ("tokens", "size"),
    [
        (0, "0-1k"),
        (1023, "0-1k"),
        (1024, "1k-4k"),
        (4095, "1k-4k"),
        (4096, "4k-16k"),
        (16_383, "4k-16k"),
        (16_384, "16k-64k"),
        (65_535, "16k-64k"),
        (65_536, "64k+"),
        (10**9, "64k+"),
    ],
)
def test_the_size_of_a_prompt_is_one_of_five(tokens: int, size: str) -> None:
    assert prompt_size(tokens) == size


def test_each_phase_is_measured_from_its_beginning_to_its_end() -> None:
    counted = Counted()
    counted.observe(record())
    assert counted.seconds("time_to_first_token_seconds", prompt_size="0-1k") == (1, 5)
    assert counted.seconds("e2e_request_latency_seconds", prompt_size="0-1k") == (1, 13)
    assert counted.seconds("request_queue_time_seconds") == (1, 2)
    assert counted.seconds("request_prefill_time_seconds", prompt_size="0-1k") == (1, 3)
    assert counted.seconds("request_decode_time_seconds") == (1, 6)
    assert counted.seconds("request_inference_time_seconds") == (1, 9)
    assert counted.seconds("request_time_per_output_token_seconds") == (1, 2)
    assert counted.seconds("request_prompt_tokens") == (1, 100)
    assert counted.seconds("request_generation_tokens") == (1, 4)


def test_of_several_rows_the_request_has_the_first_token_and_the_longest_prompt() -> None:
    counted = Counted()
    late = row(prefill_at=14.0, first_token_at=19.0, prompt_tokens=5000, completion_tokens=1)
    counted.observe(record(row(), late))
    assert counted.seconds("time_to_first_token_seconds", prompt_size="4k-16k") == (1, 5)
    assert counted.seconds("e2e_request_latency_seconds", prompt_size="4k-16k") == (1, 13)
    assert counted.seconds("request_prefill_time_seconds", prompt_size="0-1k") == (1, 3)
    assert counted.seconds("request_prefill_time_seconds", prompt_size="4k-16k") == (1, 5)
    assert counted.seconds("request_queue_time_seconds") == (2, 6)
    assert counted.seconds("request_prompt_tokens") == (2, 5100)
    assert counted.seconds("request_time_per_output_token_seconds") == (1, 2)  # one token has nothing between


def test_who_was_given_up_in_the_queue_has_waited_and_nothing_else() -> None:
    counted = Counted()
    never = row(prefill_at=None, first_token_at=None, prompt_tokens=0, cached_tokens=0, completion_tokens=0)
    counted.observe(record(never))
    assert counted.seconds("request_queue_time_seconds") == (1, 11)
    assert counted.seconds("request_inference_time_seconds") == (0, 0)
    assert counted.seconds("request_prompt_tokens") == (0, 0)
    assert counted.seconds("e2e_request_latency_seconds", prompt_size="0-1k") == (0, 0)
    assert counted.value("consumer_requests_total", tenant="acme", key_id="k1") == 1


def test_who_was_given_up_in_prefill_has_no_first_token() -> None:
    counted = Counted()
    counted.observe(record(row(first_token_at=None, completion_tokens=0, finish_reason="cancelled")))
    assert counted.seconds("time_to_first_token_seconds", prompt_size="0-1k") == (0, 0)
    assert counted.seconds("request_decode_time_seconds") == (0, 0)
    assert counted.seconds("request_inference_time_seconds") == (1, 9)
    assert counted.seconds("e2e_request_latency_seconds", prompt_size="0-1k") == (1, 13)
    assert counted.seconds("request_generation_tokens") == (1, 0)


def test_a_consumer_s_tokens_are_counted_by_kind() -> None:
    counted = Counted()
    counted.observe(record(row(), row()))
    counted.observe(record(key_id=None, tenant="idp/blue"))
    assert counted.value("consumer_requests_total", tenant="acme", key_id="k1") == 1
    tokens = {kind: {"tenant": "acme", "key_id": "k1", "kind": kind} for kind in ("prompt", "cached", "completion")}
    assert {kind: counted.value("consumer_tokens_total", **labels) for kind, labels in tokens.items()} == {
        "prompt": 200,
        "cached": 120,
        "completion": 8,
    }
    assert counted.value("consumer_tokens_total", tenant="idp/blue", key_id="", kind="completion") == 4


def test_beyond_the_most_consumers_the_rest_share_one_series() -> None:
    counted = Counted(max_consumers=2)
    for number in [1, 2, 3, 4, 1, 3]:
        counted.observe(record(key_id=f"k{number}"))
    found = {
        sample.labels["key_id"]: sample.value
        for family in counted.metrics.consumer_requests.collect()
        for sample in family.samples
    }
    assert found == {"k1": 2, "k2": 1, "other": 3}


def test_latencies_carry_the_trace_of_their_request() -> None:
    traces = iter([{"trace_id": "abc"}, None])
    counted = Counted(exemplar=lambda: next(traces))
    counted.observe(record())
    for name in LATENCIES:
        [family] = [each for each in counted.metrics.registry.collect() if each.name == f"mlxd_{name}"]
        assert [each.exemplar.labels for each in family.samples if each.exemplar] == [{"trace_id": "abc"}], name
    counted.observe(record(ended_at=5000.0))
    [family] = [each for each in counted.metrics.registry.collect() if each.name == "mlxd_e2e_request_latency_seconds"]
    assert sum(each.exemplar is not None for each in family.samples) == 1
