"""What storage counts; the series are declared in `observability/metrics.py`. Any thread."""

from __future__ import annotations

from service.observability.metrics import Metrics


class Telemetry:
    """Maps storage's events to series. Without `metrics`, as in a command that ends at once, nothing is counted."""

    def __init__(self, metrics: Metrics | None = None) -> None:
        self._metrics = metrics

    def failed(self, reason: str) -> None:
        """A read or a write came back as a StorageFailure."""
        if self._metrics is not None:
            self._metrics.storage_failures.labels(reason).inc()

    def internal_error(self) -> None:
        """Work raised what nobody foresaw."""
        if self._metrics is not None:
            self._metrics.internal_errors.labels("storage").inc()
