"""Rows in place: the cache of decoding rows holds what mlx-lm's would, and copies only what it says it copies."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

from service.engine.memory import KV_STEP
from service.engine.row_cache import TOGETHER, Places, RowCache, in_turns, rearranged, rounded
from service.engine.warmup import exhaust

HEADS, WIDTH = 2, 8


def content(row: int, positions: int) -> mx.array:
    """(1, heads, positions, width): what row `row` has written, told by its numbers."""
    numbers = mx.arange(positions, dtype=mx.float32) + 1000 * row
    return mx.broadcast_to(numbers[None, None, :, None], (1, HEADS, positions, WIDTH))


def prefilled(rows: Sequence[tuple[int, int]]) -> BatchKVCache:
    """mlx-lm's own cache of (row, length), padded as it pads."""
    caches = []
    for row, length in rows:
        cache = KVCache()
        if length:
            cache.update_and_fetch(content(row, length), -content(row, length))
        caches.append(cache)
    return KVCache.merge(caches)


def taken(places: Places, rows: Sequence[tuple[int, int]]) -> RowCache:
    cache = RowCache.take(places, prefilled(rows))
    assert cache is not None
    return cache


def written(cache: RowCache, places: Places, rows: Sequence[int], leaving: Sequence[int] = ()) -> None:
    """Every row writes its next token, which does not count for those that are leaving."""
    new = mx.concatenate([content(r, n + 1)[:, :, -1:] for r, n in zip(rows, places.lengths, strict=True)])
    cache.update_and_fetch(new, -new)
    places.advance([row in leaving for row in rows])


def assert_holds(cache: RowCache, places: Places, rows: Sequence[int]) -> None:
    for index, (row, length) in enumerate(zip(rows, places.lengths, strict=True)):
        alone = cache.extract(index)
        assert alone.offset == length
        assert mx.array_equal(alone.keys, content(row, length))
        assert mx.array_equal(alone.values, -content(row, length))


def test_a_write_is_one_scatter_with_indices_that_all_layers_share(tmp_path: Path) -> None:
    """Else mlx casts indices of different types, and makes those of a slice, for each layer anew."""
    rows = [(1, 3), (2, 5)]
    places = Places([length for _, length in rows])
    layers = [taken(places, rows) for _ in range(2)]
    new = mx.concatenate([content(row, length + 1)[:, :, -1:] for row, length in rows])
    mx.eval(new, places.next(HEADS), [layer.state for layer in layers])
    for layer in layers:
        layer.update_and_fetch(new, -new)
    with (tmp_path / "graph.dot").open("w") as graph:
        mx.export_to_dot(graph, *[array for layer in layers for array in layer.state])
    made = Counter(re.findall(r'label ?= ?"(\w+)"', (tmp_path / "graph.dot").read_text()))
    assert made["Scatter"] == 2 * len(layers), "keys and values"
    assert not {"AsType", "Arange"} & set(made)


def test_rows_of_a_padded_batch_move_to_the_front() -> None:
    rows = [(1, 3), (2, 300), (3, 1)]
    places = Places([length for _, length in rows])
    cache = taken(places, rows)
    assert_holds(cache, places, [1, 2, 3])
    written(cache, places, [1, 2, 3])
    assert_holds(cache, places, [1, 2, 3])


@pytest.mark.parametrize("seed", range(5))
def test_any_course_of_joins_leaves_and_tokens_holds_what_each_row_wrote(seed: int) -> None:
    rng = random.Random(seed)
    places, rows = Places([5]), [0]
    cache = taken(places, [(0, 5)])
    for step in range(1, 60):
        match rng.choice(["write", "write", "join", "leave"]):
            case "write":
                written(cache, places, rows)
            case "join":
                coming = [(10 * step + i, rng.choice([0, 1, 40, 300])) for i in range(rng.choice([1, 2]))]
                theirs = Places([length for _, length in coming])
                cache.resize(len(rows) + len(coming), max(places.reach, theirs.reach))
                cache.extend(taken(theirs, coming))
                places.extend(theirs.lengths)
                rows += [row for row, _ in coming]
            case _ if len(rows) > 1:
                gone = rng.randrange(len(rows))
                order = list(range(len(rows) - 1))
                if gone < len(order):
                    order[gone] = len(order)
                exhaust(rearranged([cache], order))
                places.filter(order)
                rows = [rows[index] for index in order]
        assert_holds(cache, places, rows)


def test_a_batch_of_rows_that_hold_nothing_is_made_by_its_first_write() -> None:
    places = Places([0, 0])
    cache = taken(places, [(1, 0), (2, 0)])
    assert (cache.state, cache.nbytes) == ([], 0)
    written(cache, places, [1, 2])
    assert cache.capacity == (2, KV_STEP)
    assert_holds(cache, places, [1, 2])


def test_what_a_row_writes_that_is_leaving_does_not_count() -> None:
    places = Places([3, 300])
    cache = taken(places, [(1, 3), (2, 300)])
    for _ in range(3):
        written(cache, places, [1, 2], leaving=[1])
    assert places.lengths == [3, 303]
    assert_holds(cache, places, [1, 2])


def seen(places: Places, window: int | None) -> list[list[bool]]:
    """What each row's next token may attend to."""
    mask = places.mask(window)
    assert mask is not None
    found: list[list[bool]] = mask[:, 0, 0].tolist()
    return found


def test_the_mask_shows_each_row_its_own_tokens_and_its_window() -> None:
    places = Places([0, 2, 4])
    assert seen(places, None) == [
        [True, False, False, False, False],
        [True, True, True, False, False],
        [True, True, True, True, True],
    ]
    assert seen(places, 2) == [
        [True, False, False, False, False],
        [False, True, True, False, False],
        [False, False, False, True, True],
    ]
    assert places.mask(2) is places.mask(2)


def test_one_row_alone_needs_a_mask_only_where_its_window_ends() -> None:
    places = Places([4])
    assert places.mask(None) is None
    assert places.mask(5) is None
    assert seen(places, 3) == [[False, False, True, True, True]]


def test_other_kinds_of_caches_are_left_to_mlx_lm() -> None:
    assert RowCache.take(Places([1]), RotatingKVCache(max_size=8)) is None


def peak(work: object) -> int:
    """Bytes that a call allocates at its peak beside what was there."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert callable(work)
    work()
    return int(mx.get_peak_memory() - before)


def test_writing_joining_and_leaving_copy_a_row_and_never_the_batch() -> None:
    lengths = [600, 500, 400, 300, 200, 100]
    rows = [(row, length) for row, length in enumerate(lengths)]
    places = Places(lengths)
    cache = taken(places, rows)
    cache.resize(8, 768)
    mx.eval(cache.state)
    other_places = Places([50])
    other = taken(other_places, [(9, 50)])
    mx.eval(other.state)
    row = cache.nbytes // 8

    def write() -> None:
        new = mx.zeros((6, HEADS, 1, WIDTH))
        mx.eval(cache.update_and_fetch(new, new))
        places.advance([False] * 6)

    def join() -> None:
        cache.extend(other)
        mx.eval(cache.state)

    def leave() -> None:
        exhaust(rearranged([cache], [5, 1, 2, 3, 4]))

    def grow() -> None:
        cache.resize(8, 769)
        mx.eval(cache.state)

    assert peak(write) < row
    assert peak(join) < row
    assert peak(leave) <= 2 * row
    assert peak(grow) > cache.nbytes / 2, "the counter sees a whole copy"


def test_capacity_is_rounded_up_as_caches_grow() -> None:
    assert [rounded(n) for n in (1, 256, 257)] == [256, 256, 512]


def test_layers_are_copied_in_groups_of_what_a_row_takes_and_none_is_touched_before_its_turn() -> None:
    asked: list[int] = []

    def layers() -> Iterator[tuple[int, int]]:
        for number in range(7):
            asked.append(number)
            yield number, 10

    seen = [(group, len(asked)) for group in in_turns(layers(), row=35)]
    assert seen == [([0, 1, 2], 3), ([3, 4, 5], 6), ([6], 7)]
    assert list(in_turns(layers(), row=5)) == [[number] for number in range(7)]
    large = ((number, TOGETHER // 2) for number in range(3))
    assert list(in_turns(large, row=9 * TOGETHER)) == [[0, 1], [2]]
