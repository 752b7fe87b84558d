"""A histogram that takes one value many times at once."""

from __future__ import annotations

from bisect import bisect_left

from prometheus_client import Histogram


class RepeatedHistogram(Histogram):
    """`Histogram`, for values of which many are equal: those of all rows that one step decodes."""

    def observe_times(self, amount: float, times: int) -> None:
        """As `times` calls of `observe(amount)`. Any thread. Relies on the parent's fields, which a test compares."""
        self._sum.inc(amount * times)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(times)  # the first bound that is not below it
