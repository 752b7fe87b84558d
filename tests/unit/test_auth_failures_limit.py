"""Failed authentication by address: bounded, by network, and on monotonic time."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from hypothesis import given, strategies as st

from service.limits.failures import MAX_ADDRESSES, FailureBuckets, address_key

ADDRESS = "203.0.113.9"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_so_many_failures_are_answered_and_then_one_whenever_it_is_refilled() -> None:
    clock = Clock()
    buckets = FailureBuckets(6, clock=clock)
    for _ in range(6):
        assert buckets.exhausted(ADDRESS) is None
        buckets.charge(ADDRESS)
    assert buckets.exhausted(ADDRESS) == 10.0
    assert buckets.exhausted("203.0.113.10") is None
    clock.now = 9.0
    assert buckets.exhausted(ADDRESS) == pytest.approx(1.0)
    clock.now = 10.0
    assert buckets.exhausted(ADDRESS) is None
    clock.now = 10_000.0
    for _ in range(6):
        assert buckets.exhausted(ADDRESS) is None
        buckets.charge(ADDRESS)
    assert buckets.exhausted(ADDRESS) is not None


def test_a_flood_is_locked_out_no_longer_than_it_lasts() -> None:
    buckets = FailureBuckets(60, clock=Clock())
    for _ in range(100_000):
        buckets.charge(ADDRESS)
    assert buckets.exhausted(ADDRESS) == 1.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("2001:db8::1", "2001:db8:0:0:ffff::1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("2001:DB8::1", "2001:db8::0:2", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "testclient", True),
        ("", "0.0.0.0", False),
        ("::", "0.0.0.0", False),
    ],
)
def test_what_counts_as_one_client(one: str, other: str, same: bool) -> None:
    buckets = FailureBuckets(1, clock=Clock())
    buckets.charge(one)
    assert (buckets.exhausted(other) is not None) is same


@given(st.text() | st.ip_addresses().map(str))
def test_any_address_has_a_short_key(address: str) -> None:
    assert 0 < len(address_key(address)) <= 24


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=50))
def test_who_waits_as_told_is_answered(steps: list[tuple[bool, float]]) -> None:
    clock = Clock()
    buckets = FailureBuckets(7, clock=clock)
    for charges, gap in steps:
        clock.now += gap
        if charges:
            buckets.charge(ADDRESS)
        wait = buckets.exhausted(ADDRESS)
        if wait is not None:
            assert 0 < wait <= 60 / 7 + 1e-6
            clock.now += wait
            assert buckets.exhausted(ADDRESS) is None


def test_the_address_that_failed_longest_ago_is_forgotten_first() -> None:
    buckets = FailureBuckets(1, max_addresses=2, clock=Clock())
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.3"):
        buckets.charge(address)
    assert len(buckets) == 2
    assert buckets.exhausted("192.0.2.2") is None
    assert buckets.exhausted("192.0.2.1") is not None


def test_asking_remembers_nobody() -> None:
    buckets = FailureBuckets(1)
    assert buckets.exhausted(ADDRESS) is None
    assert len(buckets) == 0


@pytest.mark.no_cover  # many turns of what others cover
def test_memory_and_latency_stay_flat_over_any_number_of_addresses() -> None:
    buckets = FailureBuckets(60)

    def flood(network: int) -> float:
        """Ten thousand new addresses; seconds for each."""
        addresses = [f"10.{network}.{number // 256}.{number % 256}" for number in range(10_000)]
        begin = time.perf_counter()
        for address in addresses:
            buckets.exhausted(address)
            buckets.charge(address)
        return (time.perf_counter() - begin) / len(addresses)

    first = flood(0)
    tracemalloc.start()
    try:
        flood(1)
        before, _ = tracemalloc.get_traced_memory()
        later = [flood(network) for network in range(2, 6)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    untraced = min(flood(network) for network in range(6, 10))
    print(
        f"\n{first * 1e6:.1f} us a failure for the first 10 000 addresses, {untraced * 1e6:.1f} us after 90 000; "
        f"{before / 1e6:.2f} MB held, {(after - before) / 1e6:+.2f} MB after 40 000 more"
    )
    assert len(buckets) == MAX_ADDRESSES
    assert len(later) == 4
    assert after - before < 500_000
    assert untraced < 5 * first + 20e-6
