"""What the engine counts, in its own words; the series are declared in `observability/metrics.py`. Any thread.

Only what must be counted as it happens. Gauges are read off `Engine.status` when somebody scrapes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from service.engine.generation import FinishReason
from service.observability.metrics import Metrics


class Telemetry:
    """Maps the engine's events to series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gaps: dict[float, int] = {}

    def capacity(self, *, rows: int, queue: int) -> None:
        """What the engine could hold."""
        self._metrics.rows_capacity.set(rows)
        self._metrics.queue_capacity.set(queue)

    def loading(self) -> AbstractContextManager[object]:
        """To be held while the model is loaded."""
        return self._metrics.model_load_seconds.time()

    def warming(self) -> AbstractContextManager[object]:
        """To be held while it is warmed up."""
        return self._metrics.model_warmup_seconds.time()

    def rejected(self, reason: str) -> None:
        """A submission was refused."""
        self._metrics.admission_rejections.labels(reason).inc()

    def prefill(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A row's prefill begins; so many of its tokens come from the prefix cache."""
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.prompt_tokens_cached.inc(cached_tokens)
        self._metrics.prefix_cache_queries.inc(prompt_tokens)
        self._metrics.prefix_cache_hits.inc(cached_tokens)

    def stepped(self, seconds: float, rows: int) -> None:
        """A step is done, in which `rows` decoded."""
        self._metrics.step_duration.observe(seconds)
        self._metrics.step_rows.observe(rows)

    def gap(self, seconds: float) -> None:
        """A row has its next token, so long after the last one; counted by `decoded`. One thread, as that."""
        self._gaps[seconds] = self._gaps.get(seconds, 0) + 1

    def decoded(self, tokens: int) -> None:
        """A step has sampled `tokens` for rows that somebody waits for."""
        self._metrics.generation_tokens.inc(tokens)
        for seconds, times in self._gaps.items():  # one for all rows that decoded in the step before, too
            self._metrics.inter_token_latency.observe_times(seconds, times)
        self._gaps.clear()

    def ended(self, reason: FinishReason | str) -> None:
        """A row that was admitted or queued has ended, normally or not."""
        if isinstance(reason, FinishReason):
            self._metrics.request_success.labels(reason.value).inc()
        else:
            self._metrics.request_failure.labels(reason).inc()

    def tripped(self, watch: str) -> None:
        """The watchdog ends the process."""
        self._metrics.watchdog_trips.labels(watch).inc()

    def internal_error(self, where: str) -> None:
        """A broad except caught something."""
        self._metrics.internal_errors.labels(where).inc()
