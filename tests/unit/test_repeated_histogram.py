"""A value taken many times at once counts as so many values."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram

from service.observability.repeated import RepeatedHistogram

BUCKETS = (0.01, 0.1, 1.0)


@pytest.mark.parametrize("amount", [0.0, 0.01, 0.05, 1.0, 30.0])
def test_it_is_as_if_each_had_been_observed(amount: float) -> None:
    one, other = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("gap", "Seconds.", buckets=BUCKETS, registry=one)
    repeated = RepeatedHistogram("gap", "Seconds.", buckets=BUCKETS, registry=other)
    for value, times in ((amount, 3), (0.05, 2)):
        for _ in range(times):
            plain.observe(value)
        repeated.observe_times(value, times)
    expected = {(sample.name, *sample.labels.values()): sample.value for m in one.collect() for sample in m.samples}
    found = {(sample.name, *sample.labels.values()): sample.value for m in other.collect() for sample in m.samples}
    created = [key for key in expected if key[0].endswith("_created")]
    assert {key: found[key] for key in found if key not in created} == pytest.approx(
        {key: expected[key] for key in expected if key not in created}
    )
    assert found["gap_count",] == 5
