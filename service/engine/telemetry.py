"""What the engine counts, in its own words; the series are declared in `observability/metrics.py`. Any thread.

Only what must be counted as it happens. Gauges are read off `Engine.status` when somebody scrapes.
"""

from __future__ import annotations

from service.engine.generation import FinishReason
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

    def prefill(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A row's prefill begins; so many of its tokens come from the prefix cache."""
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.prompt_tokens_cached.inc(cached_tokens)

    def decoded(self, tokens: int) -> None:
        """A step has sampled `tokens` for rows that somebody waits for."""
        self._metrics.generation_tokens.inc(tokens)

    def ended(self, reason: FinishReason | str) -> None:
        """A row that was admitted or queued has ended, normally or not."""
        if isinstance(reason, FinishReason):
            self._metrics.request_success.labels(reason.value).inc()
        else:
            self._metrics.request_failure.labels(reason).inc()

    def internal_error(self, where: str) -> None:
        """A broad except caught something."""
        self._metrics.internal_errors.labels(where).inc()
