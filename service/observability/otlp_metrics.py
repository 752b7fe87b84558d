"""OpenTelemetry's gen_ai metrics of finished requests, with the buckets that the convention gives.

The convention is in development (semantic-conventions-genai, docs/gen-ai/gen-ai-metrics.md). Needs the extra `otlp`.
"""

from __future__ import annotations

from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource

from service.observability import gen_ai
from service.observability.record import RequestRecord

REQUEST_SECONDS = tuple(0.01 * 2**power for power in range(14))
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = tuple(float(4**power) for power in range(14))


class GenAiMetrics:
    """Four histograms; `reader` sends them. Any thread may observe."""

    def __init__(self, reader: MetricReader, resource: Resource) -> None:
        provider = MeterProvider([reader], resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False)
        meter = provider.get_meter(gen_ai.PROVIDER)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            "s",
            "Seconds from the request's prompt to its last token.",
            explicit_bucket_boundaries_advisory=REQUEST_SECONDS,
        )
        self._first = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Seconds from the queue to the first token, of requests that ended normally.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN_SECONDS,
        )
        self._per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Mean seconds of each token after the first, of rows of requests that ended normally.",
            explicit_bucket_boundaries_advisory=TOKEN_SECONDS,
        )

    def observe(self, record: RequestRecord) -> None:
        """Take the record of a finished request."""
        labels = gen_ai.bounded(record)
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            self._tokens.record(tokens, {**labels, "gen_ai.token.type": kind})
        error, seconds = gen_ai.error_type(record), record.ended_at - record.began_at
        if error is not None:
            self._duration.record(seconds, {**labels, "error.type": error})
            return
        self._duration.record(seconds, labels)
        if record.time_to_first_token is not None:
            self._first.record(record.time_to_first_token, labels)
        for row in record.rows:
            if row.time_per_output_token is not None:
                self._per_token.record(row.time_per_output_token, labels)
