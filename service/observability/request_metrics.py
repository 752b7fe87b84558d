"""The histograms and counters of whole answers and requests: nothing of it is on the path of a token."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import lru_cache

from prometheus_client import Counter, Histogram

from service.observability.consumers import Consumers
from service.observability.metrics import Metrics
from service.observability.record import RequestRecord, RowRecord

SIZES = ("0-1k", "1k-4k", "4k-16k", "16k-64k", "64k+")
"""Prompts by their tokens, a k being 1024: latencies of short and long ones together say nothing about either."""

_BOUNDS = (1024, 4 * 1024, 16 * 1024, 64 * 1024)

Exemplar = Callable[[], Mapping[str, str] | None]
"""The labels of an exemplar (`trace_id`) for the request that is being settled, or None."""


def prompt_size(tokens: int) -> str:
    """The label of a prompt of so many tokens."""
    return SIZES[bisect_right(_BOUNDS, tokens)]


def no_exemplar() -> None:
    """There are no traces."""


KNOWN_ANSWERS = 1024
"""Kinds of answers whose series are kept at hand."""


class AnswerMetrics:
    """Counts answers of any kind. `route` is a template, `method` one of a few: clients must not choose labels."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._series = lru_cache(KNOWN_ANSWERS)(self._look_up)

    def __call__(self, route: str, method: str, status: int, seconds: float) -> None:
        """An answer is over, so long after its request began."""
        requests, duration = self._series(route, method, status)
        requests.inc()
        duration.observe(seconds)

    def _look_up(self, route: str, method: str, status: int) -> tuple[Counter, Histogram]:
        metrics = self._metrics
        return metrics.http_requests.labels(route, method, str(status)), metrics.http_request_duration.labels(route)


class RequestMetrics:
    """An observer of `Inference`. Latencies of a request as its client saw it are per request, the rest is per row,
    the unit of the engine. Belongs to the event loop's thread.
    """

    def __init__(self, metrics: Metrics, *, max_consumers: int, exemplar: Exemplar = no_exemplar) -> None:
        self._metrics = metrics
        self._consumers = Consumers(metrics, max_consumers)
        self._exemplar = exemplar
        self._first_token = {size: metrics.time_to_first_token.labels(size) for size in SIZES}
        self._e2e = {size: metrics.e2e_latency.labels(size) for size in SIZES}
        self._prefill = {size: metrics.prefill_time.labels(size) for size in SIZES}

    def __call__(self, record: RequestRecord) -> None:
        """Count a request that is over."""
        exemplar = self._labels()
        self._consumers.count(record)
        for row in record.rows:
            self._count_row(row, record.submitted_at, exemplar)
        if record.prefill_at is None:
            return  # given up in the queue: the size of its prompt is not known, its rows' queue time is
        size = prompt_size(max(row.prompt_tokens for row in record.rows))
        self._e2e[size].observe(record.ended_at - record.began_at, exemplar)
        if record.time_to_first_token is not None:
            self._first_token[size].observe(record.time_to_first_token, exemplar)

    def _labels(self) -> dict[str, str] | None:
        found = self._exemplar()
        return None if found is None else dict(found)

    def _count_row(self, row: RowRecord, submitted_at: float, exemplar: dict[str, str] | None) -> None:
        metrics = self._metrics
        if row.prefill_at is None:
            metrics.queue_time.observe(row.ended_at - submitted_at, exemplar)
            return
        metrics.queue_time.observe(row.prefill_at - submitted_at, exemplar)
        metrics.inference_time.observe(row.ended_at - row.prefill_at, exemplar)
        metrics.request_prompt_tokens.observe(row.prompt_tokens)
        metrics.request_generation_tokens.observe(row.completion_tokens)
        if row.first_token_at is None or row.decode_seconds is None:
            return
        self._prefill[prompt_size(row.prompt_tokens)].observe(row.first_token_at - row.prefill_at, exemplar)
        metrics.decode_time.observe(row.decode_seconds, exemplar)
        if row.time_per_output_token is not None:
            metrics.time_per_output_token.observe(row.time_per_output_token, exemplar)
