"""The prefix cache: by tenant, within its bytes of real memory, and never the cause of a wrong continuation."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

from service.engine.prefix_cache import PrefixCache, common_prefix

BYTES_PER_TOKEN = 2 * 1 * 4 * 4  # keys and values, one head of four float32


def entry(length: int, fill: float = 1.0) -> list[KVCache]:
    layer = KVCache()
    layer.update_and_fetch(mx.full((1, 1, length, 4), fill), mx.full((1, 1, length, 4), fill))
    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    return [layer]


def tokens(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def test_the_last_token_is_always_left_to_run() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", tokens(10), entry(10))
    found, length = cache.lookup("a", tokens(10))
    assert found is not None
    assert length < 10
    assert found[0].offset == length
    assert cache.lookup("a", tokens(1)) == (None, 0)


def test_a_longer_prompt_starts_from_the_stored_prefix_and_a_divergent_one_from_the_common_part() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", tokens(10), entry(10))
    assert cache.lookup("a", tokens(20))[1] == 10
    found, length = cache.lookup("a", [*tokens(6), 99, 98, 97])
    assert found is not None
    assert length == found[0].offset <= 6


def test_tenants_do_not_see_each_other() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", tokens(10), entry(10))
    assert cache.lookup("b", tokens(20)) == (None, 0)


def test_what_is_found_is_the_callers_own() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", tokens(10), entry(10))
    found, _ = cache.lookup("a", tokens(20))
    assert found is not None
    found[0].update_and_fetch(mx.zeros((1, 1, 5, 4)), mx.zeros((1, 1, 5, 4)))
    again, length = cache.lookup("a", tokens(20))
    assert again is not None
    assert length == again[0].offset == 10
    assert mx.all(again[0].keys[..., :10, :] == 1).item()


def test_bytes_are_the_limit_and_the_oldest_goes_first() -> None:
    cache = PrefixCache(limit=30 * BYTES_PER_TOKEN)
    for start in (100, 200, 300, 400):
        cache.store("a", tokens(10, start), entry(10))
    assert cache.nbytes <= 30 * BYTES_PER_TOKEN
    assert len(cache) == 3
    assert cache.lookup("a", tokens(20, 100)) == (None, 0)
    assert cache.lookup("a", tokens(20, 400))[1] == 10


def test_what_was_of_use_lately_stays() -> None:
    cache = PrefixCache(limit=30 * BYTES_PER_TOKEN)
    for start in (100, 200, 300):
        cache.store("a", tokens(10, start), entry(10))
    assert cache.lookup("a", tokens(20, 100))[1] == 10
    cache.store("a", tokens(10, 400), entry(10))
    assert cache.lookup("a", tokens(20, 100))[1] == 10
    assert cache.lookup("a", tokens(20, 200)) == (None, 0)


def test_what_another_entry_has_is_not_kept_twice() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", tokens(10), entry(10))
    cache.store("a", tokens(20), entry(20))
    cache.store("a", tokens(10), entry(10))
    cache.store("a", tokens(20), entry(20))
    assert (len(cache), cache.nbytes) == (1, 20 * BYTES_PER_TOKEN)
    assert cache.lookup("a", tokens(11))[1] == 10


def wrapped(length: int) -> list[RotatingKVCache]:
    """A cache that has forgotten its beginning, so that nothing can be cut from its end."""
    layer = RotatingKVCache(max_size=1)
    layer.offset = length
    layer.keys = layer.values = mx.zeros((1, 1, 1, 4))
    return [layer]


SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@given(st.lists(SHORT, max_size=12), SHORT)
def test_the_longest_prefix_that_some_entry_has_is_found(stored: list[list[int]], prompt: list[int]) -> None:
    cache = PrefixCache(limit=1 << 20)
    for each in stored:
        cache.store("a", each, entry(len(each)))
    found, length = cache.lookup("a", prompt)
    assert length == max((common_prefix(each, prompt[:-1]) for each in stored), default=0)
    assert (found is None) == (length == 0)
    assert found is None or found[0].offset == length


@given(st.lists(SHORT, max_size=12), SHORT)
def test_what_cannot_be_cut_back_is_found_whole(stored: list[list[int]], prompt: list[int]) -> None:
    cache = PrefixCache(limit=1 << 20)
    for each in stored:
        cache.store("a", each, wrapped(len(each)))
    found, length = cache.lookup("a", prompt)
    assert length == max((len(each) for each in stored if prompt[:-1][: len(each)] == each), default=0)
    assert found is None or found[0].offset == length
    assert len(cache) == len({tuple(each) for each in stored})


def test_a_lookup_does_not_visit_what_is_stored_behind_the_prefix() -> None:
    """100 answers to one system prompt took mlx-lm's trie 100 ms for each new question."""

    def calls(entries: int) -> int:
        cache, seen = PrefixCache(limit=1 << 30), 0
        for number in range(entries):
            cache.store("a", [*tokens(10), 1000 + number, *tokens(30)], entry(41))

        def count(_frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            _, length = cache.lookup("a", [*tokens(10), 5000, 7])
        finally:
            sys.setprofile(None)
        assert length == 10
        return seen

    assert calls(500) <= calls(5)


def test_an_entry_over_the_limit_is_not_stored() -> None:
    cache = PrefixCache(limit=5 * BYTES_PER_TOKEN)
    cache.store("a", tokens(10), entry(10))
    assert len(cache) == 0


def test_no_tenant_evicts_another_below_its_share() -> None:
    cache = PrefixCache(limit=100 * BYTES_PER_TOKEN)
    for start in range(0, 500, 100):
        cache.store("small", tokens(10, start), entry(10))
    for start in range(0, 10_000, 100):
        cache.store("flood", tokens(10, start), entry(10))
    assert all(cache.lookup("small", tokens(20, start))[1] == 10 for start in range(0, 500, 100))
    assert cache.nbytes <= 100 * BYTES_PER_TOKEN
    for start in range(0, 10_000, 100):
        cache.store("small", tokens(10, start), entry(10))
    share = 50 * BYTES_PER_TOKEN
    assert cache._tenants["flood"].nbytes >= share - 10 * BYTES_PER_TOKEN


def test_room_is_given_up_and_the_configured_limit_never_exceeded() -> None:
    cache = PrefixCache(limit=50 * BYTES_PER_TOKEN)
    for start in (100, 200, 300):
        cache.store("a", tokens(10, start), entry(10))
    cache.make_room(10 * BYTES_PER_TOKEN)
    assert len(cache) == 1
    cache.make_room(0)
    assert (len(cache), cache.nbytes) == (0, 0)
    cache.make_room(1 << 40)
    for start in range(0, 1000, 100):
        cache.store("a", tokens(10, start), entry(10))
    assert cache.nbytes <= 50 * BYTES_PER_TOKEN


def test_an_empty_sequence_is_not_stored() -> None:
    cache = PrefixCache(limit=1 << 20)
    cache.store("a", [], entry(1))
    cache.store("a", [1], [])
    assert len(cache) == 0


@pytest.mark.parametrize("rows", [8])
def test_entries_cut_from_a_batch_do_not_keep_the_batch_alive(rows: int) -> None:
    length, heads, width = 256, 4, 64
    limit = 3 * 2 * heads * width * 4 * length
    cache = PrefixCache(limit=limit)
    mx.clear_cache()
    before = mx.get_active_memory()
    for turn in range(12):
        batch = BatchKVCache([0] * rows)
        batch.update_and_fetch(mx.ones((rows, heads, length, width)), mx.ones((rows, heads, length, width)))
        mx.eval(batch.keys, batch.values)
        cache.store("a", tokens(length, 1000 * turn), [batch.extract(turn % rows)])
        del batch
    held = mx.get_active_memory() - before
    assert cache.nbytes > 0
    assert held <= limit * 1.05, "real memory, not nbytes"
