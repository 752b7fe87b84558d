"""Failed authentication, by client address: who guesses is slowed down, and nobody else.

Credentials are verified first; only a failure charges and consults the bucket, so a valid credential is never
refused because of others behind the same address.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

MAX_ADDRESSES = 10_000
"""Addresses that are remembered; beyond it the one that failed longest ago is forgotten."""

NO_ADDRESS = "none"
"""Key of everything that is no IP address, as the peer of a Unix socket."""

ROUNDING = 1e-6
"""Failures by which a refill may fall short of what was told."""


def address_key(address: str) -> str:
    """What counts as one client: an IPv4 address, also when written as IPv6, or a /64 of IPv6 (RFC 6177)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return NO_ADDRESS
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return f"{int(found) >> 64:x}::/64"
        found = found.ipv4_mapped
    return str(found)


class FailureBuckets:
    """A bucket of failures per address, refilled by the second. Belongs to the event loop's thread.

    `per_minute` failures may come at once. `clock` is monotonic.
    """

    def __init__(
        self,
        per_minute: int,
        *,
        max_addresses: int = MAX_ADDRESSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.resize(per_minute)
        self._max_addresses = max_addresses
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def resize(self, per_minute: int) -> None:
        """So many from now on, for everybody; a bucket that holds more is full."""
        self._capacity = float(per_minute)
        self._refill = per_minute / 60

    def charge(self, address: str) -> None:
        """One failure. An empty bucket stays empty: a flood is not locked out for longer than it lasts."""
        key = address_key(address)
        self._buckets[key] = (max(0.0, self._level(key) - 1.0), self._clock())
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)

    def exhausted(self, address: str) -> float | None:
        """Seconds until one more failure may be answered, or None when it may be now."""
        level = self._level(address_key(address))
        return None if level >= 1.0 - ROUNDING else (1.0 - level) / self._refill

    def _level(self, key: str) -> float:
        found = self._buckets.get(key)
        if found is None:
            return self._capacity
        level, at = found
        return min(self._capacity, level + (self._clock() - at) * self._refill)
