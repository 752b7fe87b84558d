"""The way to an OTLP/HTTP collector: in the background, bounded, and out of every request's way.

The SDK reads the environment for whatever it is not told. So it is told everything that it takes as a parameter, no
provider is made global, and `forget_outside_telemetry` has removed the rest. Needs the extra `otlp`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final, Literal

import certifi
import requests
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from service.observability.logging import get_logger
from service.observability.otlp_metrics import GenAiMetrics
from service.observability.record import RequestRecord
from service.observability.tracing import Tracing

log = get_logger(__name__)

Signal = Literal["traces", "metrics"]

EXPORT_TIMEOUT: Final = 5.0
"""Seconds for one batch, attempts together."""

QUEUE: Final = 4096
"""Spans that wait to be sent; beyond it the oldest are dropped."""

BATCH: Final = 512
SPAN_INTERVAL: Final = 2.0
METRIC_INTERVAL: Final = 30.0

CLOSE_TIMEOUT: Final = 2.0
"""Seconds that the end of the service waits for the collector, at most."""


class CollectorSession(requests.Session):
    """A session that takes nothing from the environment, and of an answer nothing but its head.

    A body is not read, a redirection not followed, a cookie not kept: a collector may be anybody. Each attempt that
    fails is counted through `failed`; the first of an episode is logged, and its end.
    """

    def __init__(self, signal: Signal, failed: Callable[[Signal], object]) -> None:
        super().__init__()
        self.trust_env = False  # no proxy, no .netrc
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # it has a line for each attempt
        self._signal = signal
        self._failed = failed
        self._down = False

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        try:
            answer = super().send(request, **{**options, "stream": True})
        except requests.RequestException as error:
            self._note(type(error).__name__)
            raise
        answer.close()
        self._note(None if answer.status_code // 100 == 2 else str(answer.status_code))  # noqa: PLR2004 - success
        return answer

    def get_redirect_target(self, resp: requests.Response) -> str | None:  # noqa: ARG002 - read even when not followed
        return None

    def _note(self, reason: str | None) -> None:
        if reason is not None:
            self._failed(self._signal)
        if (reason is not None) != self._down:
            self._down = reason is not None
            if self._down:
                log.warning("collector_failed", signal=self._signal, reason=reason)
            else:
                log.info("collector_back", signal=self._signal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collector:
    """Where telemetry goes. `endpoint` is the base URL, `headers` may hold a credential, `failed` counts attempts."""

    endpoint: str
    version: str
    instance: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    failed: Callable[[Signal], object] = lambda _: None

    @property
    def resource(self) -> Resource:
        """Who sends. Made without `Resource.create`, which asks the environment."""
        return Resource({"service.name": "mlxd", "service.version": self.version, "service.instance.id": self.instance})

    def spans(self) -> SpanProcessor:
        """Sends ended spans from a thread of its own. Ending one is an append to a bounded queue."""
        return BatchSpanProcessor(
            OTLPSpanExporter(**self._target("traces")),
            max_queue_size=QUEUE,
            schedule_delay_millis=SPAN_INTERVAL * 1000,
            max_export_batch_size=BATCH,
            export_timeout_millis=EXPORT_TIMEOUT * 1000,
            meter_provider=NoOpMeterProvider(),
        )

    def metrics(self) -> MetricReader:
        """Sends what was recorded every METRIC_INTERVAL seconds, from a thread of its own."""
        return PeriodicExportingMetricReader(
            OTLPMetricExporter(**self._target("metrics")),
            export_interval_millis=METRIC_INTERVAL * 1000,
            export_timeout_millis=EXPORT_TIMEOUT * 1000,
        )

    def _target(self, signal: Signal) -> dict[str, Any]:
        return {
            "endpoint": f"{self.endpoint}/v1/{signal}",
            "headers": dict(self.headers),
            "timeout": EXPORT_TIMEOUT,
            "compression": Compression.NoCompression,
            "certificate_file": certifi.where(),
            "session": CollectorSession(signal, self.failed),
            "meter_provider": NoOpMeterProvider(),
        }


class OpenTelemetry:
    """Everything that leaves by OTLP. Its threads run from now on; `run` is the life of the service.

    `observers` take the record of each request, on the event loop's thread.
    """

    def __init__(
        self,
        collector: Collector,
        *,
        sample_ratio: float,
        metrics: bool,
        paths: Collection[str],
        clock: Callable[[], float],
    ) -> None:
        spans, resource = collector.spans(), collector.resource
        self.tracing = Tracing(spans, resource=resource, sample_ratio=sample_ratio, paths=paths, clock=clock)
        self.observers: list[Callable[[RequestRecord], None]] = [self.tracing.observe]
        self._parts: list[Callable[[], object]] = [spans.shutdown]
        if metrics:
            reader = collector.metrics()
            self.observers.append(GenAiMetrics(reader, resource).observe)
            self._parts.append(reader.shutdown)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Flush at the end, within CLOSE_TIMEOUT."""
        try:
            yield
        finally:
            await close(self._parts)


async def close(parts: Sequence[Callable[[], object]], timeout: float = CLOSE_TIMEOUT) -> None:
    """Flush: run every shutdown at once, and give up on what is not done after `timeout` seconds.

    The SDK's own shutdown waits for half a minute. What is given up is in daemon threads, which end with the process.
    """
    threads = [threading.Thread(target=part, name="telemetry-close", daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout
    for thread in threads:
        await asyncio.to_thread(thread.join, max(0.0, ends - loop.time()))
    if any(thread.is_alive() for thread in threads):
        log.warning("telemetry_not_flushed", timeout=timeout)
