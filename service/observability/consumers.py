"""Who used what, for as many consumers as the operator wants series for; the others share one."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter

from service.observability.metrics import Metrics
from service.observability.record import RequestRecord

OTHER = "other"
"""Tenant and key of those who came when the set was full."""


@dataclass(frozen=True, slots=True)
class _Series:
    requests: Counter
    prompt: Counter
    cached: Counter
    completion: Counter


class Consumers:
    """Counts by tenant and key: the first `most` that come have their own series until the process ends.

    The rows of usage know everybody (docs/usage.md). Belongs to the event loop's thread.
    """

    def __init__(self, metrics: Metrics, most: int) -> None:
        self._metrics = metrics
        self._most = most
        self._known: dict[tuple[str, str], _Series] = {}

    def count(self, record: RequestRecord) -> None:
        """Add what a request used."""
        series = self._series(record.tenant, record.key_id or "")
        series.requests.inc()
        series.prompt.inc(record.prompt_tokens)
        series.cached.inc(record.cached_tokens)
        series.completion.inc(record.completion_tokens)

    def _series(self, tenant: str, key_id: str) -> _Series:
        found = self._known.get((tenant, key_id))
        if found is None:
            if len(self._known) >= self._most:
                return self._of(OTHER, OTHER)
            found = self._known[tenant, key_id] = self._of(tenant, key_id)
        return found

    def _of(self, tenant: str, key_id: str) -> _Series:
        tokens = self._metrics.consumer_tokens
        return _Series(
            self._metrics.consumer_requests.labels(tenant, key_id),
            *(tokens.labels(tenant, key_id, kind) for kind in ("prompt", "cached", "completion")),
        )
