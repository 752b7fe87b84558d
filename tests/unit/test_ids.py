"""Ids: each its own, well-formed, and the system is asked once for many."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from service.observability.ids import BYTES, STOCK, Ids


def test_each_is_its_own_whoever_asks() -> None:
    ids = Ids()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: ids(), range(10 * STOCK)))
    assert len(set(found)) == len(found)
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in found)


def test_the_system_is_asked_once_for_many() -> None:
    asked: list[int] = []

    def random(size: int) -> bytes:
        asked.append(size)
        return bytes(index % 251 for index in range(size))

    ids = Ids(random)
    assert ids() == bytes(range(BYTES)).hex()
    assert ids() == bytes(range(BYTES, 2 * BYTES)).hex()
    for _ in range(STOCK - 2):
        ids()
    assert asked == [STOCK * BYTES]
    ids()
    assert asked == [STOCK * BYTES] * 2
