"""What the engine counts, in its own words; the series are declared in `observability/metrics.py`. Any thread.

Only what must be counted as it happens. Gauges are read off `Engine.status` when somebody scrapes.
"""

from __future__ import annotations

from service.engine.generation import FinishReason, Usage
from service.observability.metrics import Metrics


class Telemetry:
    """Maps the engine's events to series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def capacity(self, *, rows: int, queue: int) -> None:
        """What the engine could hold."""
        self._metrics.rows_capacity.set(rows)
        self._metrics.queue_capacity.set(queue)

    def rejected(self, reason: str) -> None:
        """A submission was refused."""
        self._metrics.admission_rejections.labels(reason).inc()

    def ended(self, reason: FinishReason | str, usage: Usage) -> None:
        """A row that was admitted or queued has ended, normally or not."""
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.prompt_tokens_cached.inc(usage.cached_tokens)
        self._metrics.generation_tokens.inc(usage.completion_tokens)
        if isinstance(reason, FinishReason):
            self._metrics.request_success.labels(reason.value).inc()
        else:
            self._metrics.request_failure.labels(reason).inc()

    def internal_error(self, where: str) -> None:
        """A broad except caught something."""
        self._metrics.internal_errors.labels(where).inc()
