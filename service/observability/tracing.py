"""Spans of inference requests, by OpenTelemetry's HTTP and GenAI conventions. Needs the extra `otlp`.

A request's span begins with the request, because its id goes into logs and answer. Everything else is made when the
request is over, from times that were taken anyway: a token costs nothing. Never a prompt, an output or a credential.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import TypeVar

from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from service.observability import gen_ai
from service.observability.record import CANCELLED, RequestRecord
from service.observability.trace_context import TraceParent

T = TypeVar("T")
Phase = tuple[str, float, float, gen_ai.Attributes]

CLIENT_ERROR = 400
SERVER_ERROR = 500


class RequestTrace:
    """One request's span, from head to last byte. Belongs to the event loop's thread.

    `clock` is the engine's, in which records have their times; `wall` is the time of day in nanoseconds when it
    showed `began`, so that a clock that is set meanwhile bends nothing.
    """

    __slots__ = ("_began", "_clock", "_phases", "_span", "_tracer", "_wall", "record")

    def __init__(self, tracer: Tracer, span: Span, clock: Callable[[], float], *, began: float, wall: int) -> None:
        self.record: RequestRecord | None = None
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._began = began
        self._wall = wall
        self._phases: list[Phase] = []

    @property
    def sampled(self) -> bool:
        """Whether it will be sent."""
        return self._span.is_recording()

    @property
    def trace_id(self) -> str:
        return format_trace_id(self._span.get_span_context().trace_id)

    @property
    def span_id(self) -> str:
        return format_span_id(self._span.get_span_context().span_id)

    @property
    def traceparent(self) -> str:
        """The header that names this span."""
        return f"00-{self.trace_id}-{self.span_id}-{self._span.get_span_context().trace_flags:02x}"

    async def during(self, phase: str, work: Awaitable[T]) -> T:
        """The result of `work`, whose time becomes a span, however it ends."""
        began = self._clock()
        try:
            return await work
        finally:
            self._phases.append((phase, began, self._clock(), {}))

    def finish(self, *, status: int | None, error: str | None) -> None:
        """End the span; `status` is what was sent, if anything was, and `error` the code of what went wrong."""
        if not self.sampled:
            return
        record = self.record
        if record is not None:
            self._phases += phases(record)
            self._span.set_attributes({**gen_ai.bounded(record), **gen_ai.details(record)})
            error = error or gen_ai.error_type(record)
        if status is None:
            error = error or CANCELLED  # the client left before there was an answer
        else:
            self._span.set_attribute("http.response.status_code", status)
            error = error or (str(status) if status >= CLIENT_ERROR else None)
        if error is not None:
            self._span.set_attribute("error.type", error)
        if _is_fault(status, error):
            self._span.set_status(StatusCode.ERROR)
        parent = set_span_in_context(self._span, Context())
        for name, began, ended, attributes in self._phases:
            child = self._tracer.start_span(name, parent, attributes=attributes, start_time=self._at(began))
            child.end(self._at(max(began, ended)))
        self._span.end(self._at(self._clock()))

    def _at(self, moment: float) -> int:
        return self._wall + round((moment - self._began) * 1e9)


def phases(record: RequestRecord) -> Iterator[Phase]:
    """What the request went through, as far as it came; of several rows, from the first's to the last's."""
    yield "tokenise", record.began_at, record.encoded_at, {}
    prefill, first = record.prefill_at, record.first_token_at
    ended = max(row.ended_at for row in record.rows)
    yield "queue", record.submitted_at, ended if prefill is None else prefill, {}
    if prefill is not None:
        read: gen_ai.Attributes = {
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
        }
        yield "prefill", prefill, ended if first is None else first, read
    if first is not None:
        yield "decode", first, ended, {"gen_ai.usage.output_tokens": record.completion_tokens}


def _is_fault(status: int | None, error: str | None) -> bool:
    """Whether the span is an error: ours, or one in an answer that had begun; not a refusal, not a departure."""
    if status is None or CLIENT_ERROR <= status < SERVER_ERROR:
        return False
    return status >= SERVER_ERROR or error not in {None, CANCELLED}


class Tracing:
    """Begins the spans of requests to `paths`; `processor` sends what has ended. One for each service.

    The share `sample_ratio` of the traces that begin here is sent; of others, what the caller decided.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        resource: Resource,
        sample_ratio: float,
        paths: Collection[str],
        clock: Callable[[], float],
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        limits = SpanLimits(
            max_attributes=64, max_span_attributes=64, max_attribute_length=256, max_span_attribute_length=256,
            max_events=0, max_event_attributes=0, max_links=0, max_link_attributes=0,
        )  # fmt: skip
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=resource,
            span_limits=limits,
            shutdown_on_exit=False,
            meter_provider=NoOpMeterProvider(),
        )
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer(gen_ai.PROVIDER)
        self._paths = frozenset(paths)
        self._clock = clock
        self._wall = wall
        self._current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)

    def begin(self, method: str, path: str, *, request_id: str, parent: TraceParent | None) -> RequestTrace | None:
        """A span for the request that this task answers; None where none is kept."""
        trace = None
        if method == "POST" and path in self._paths:
            began, wall = self._clock(), self._wall()
            attributes: gen_ai.Attributes = {
                "http.request.method": method,
                "http.route": path,
                "gen_ai.operation.name": gen_ai.operation(path),
                "gen_ai.provider.name": gen_ai.PROVIDER,
                "mlxd.request_id": request_id,
            }
            span = self._tracer.start_span(
                f"{method} {path}", _context(parent), SpanKind.SERVER, attributes, start_time=wall
            )
            trace = RequestTrace(self._tracer, span, self._clock, began=began, wall=wall)
        self._current.set(trace)  # also to None: a pipelined request begins in the context of the one before
        return trace

    def observe(self, record: RequestRecord) -> None:
        """Take the record of the request that this task answers."""
        trace = self._current.get()
        if trace is not None:
            trace.record = record

    def exemplar(self) -> Mapping[str, str] | None:
        """What links an observation of a metric to the trace of the request that this task answers."""
        trace = self._current.get()
        return {"trace_id": trace.trace_id} if trace is not None and trace.sampled else None


def _context(parent: TraceParent | None) -> Context:
    """The caller's span as the SDK wants it. Never the context that happens to be current."""
    if parent is None:
        return Context()
    caller = SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState(parent.state),
    )
    return set_span_in_context(NonRecordingSpan(caller), Context())
