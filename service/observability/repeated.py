"""A histogram that takes one value many times at once."""

from __future__ import annotations

from prometheus_client import Histogram


class RepeatedHistogram(Histogram):
    """`Histogram`, for values of which many are equal: those of all rows that one step decodes."""

    def observe_times(self, amount: float, times: int) -> None:
        """As `times` calls of `observe(amount)`. Any thread. Relies on the parent's fields, which a test compares."""
        self._sum.inc(amount * times)
        for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
            if amount <= bound:
                bucket.inc(times)
                return
