"""The KV cache of decoding rows: a row joins, leaves and grows without a copy of the others.

mlx-lm's `BatchKVCache` aligns rows at their newest token, so that every join, leave and growth copies the whole
batch into new memory: twice the memory at the peak, and a pause that grows with rows x length. Here row i of a
layer lies at [i, :, 0 : length_i] of a buffer with spare rows and positions. A new token is written in place
at each row's own length; who joins is copied into a spare row; into the place of one that leaves the last row
is moved. Only more capacity means a copy, one layer at a time. Belongs to the generation thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from service.engine.memory import KV_STEP

Moves = Sequence[tuple[int, int]]
"""(new index, old index) of rows."""

TOGETHER = 32 * 1024 * 1024
"""Bytes of copies up to which layers are copied at once, and no more than a row takes, which memory is reckoned with.
To wait for a device takes 0.2 ms, and sixteen rows of sixteen layers that leave together would do so 256 times."""

T = TypeVar("T")


class Places:
    """Where each row writes its next token; one object shared by all layers of a batch."""

    def __init__(self, lengths: Sequence[int] = ()) -> None:
        self.lengths = list(lengths)
        self._place()

    def _place(self) -> None:
        self.alone = len(self.lengths) == 1
        """Whether there is one row only: it is written as a slice and needs no mask, which costs less."""
        self._array: mx.array | None = None
        self._next: dict[int, tuple[mx.array, ...]] = {}
        self._masks: dict[int | None, mx.array] = {}

    @property
    def array(self) -> mx.array:
        """The lengths; made when first asked for, which one row alone seldom does."""
        if self._array is None:
            self._array = mx.array(self.lengths, dtype=mx.int32)
        return self._array

    @property
    def offset(self) -> mx.array | int:
        """Tokens of each row so far, which is the position of its next one."""
        return self.lengths[0] if self.alone else self.array

    @property
    def reach(self) -> int:
        """Positions that the next token's attention spans, its own included."""
        return max(self.lengths, default=0) + 1

    def next(self, heads: int) -> tuple[mx.array, ...]:
        """Where in a (rows, heads, positions, width) buffer each row's next token lies: indices (rows, heads) along the
        first three. Made once a step and of one type: mlx would cast others, and make those of a slice, at each write.
        """
        if heads not in self._next:
            rows, positions = mx.arange(len(self.lengths))[:, None], self.array[:, None]
            self._next[heads] = tuple(mx.broadcast_arrays(rows, mx.arange(heads), positions))
        return self._next[heads]

    def advance(self, leaving: Sequence[bool]) -> None:
        """Every row has written one token; that of a row that is leaving does not count, and the next replaces it."""
        self.lengths = [length + (not left) for length, left in zip(self.lengths, leaving, strict=True)]
        self._place()

    def extend(self, lengths: Sequence[int]) -> None:
        self.lengths += lengths
        self._place()

    def stretch(self, length: int) -> None:
        """Every row counts as having `length` tokens."""
        self.lengths = [length] * len(self.lengths)
        self._place()

    def filter(self, order: Sequence[int]) -> None:
        """Row i is from now on what was row `order[i]`."""
        self.lengths = [self.lengths[index] for index in order]
        self._place()

    def mask(self, window: int | None) -> mx.array | None:
        """(rows, 1, 1, reach) booleans: which positions a row's next token may attend to, or None for all of them.
        Made once a step."""
        if self.alone and (window is None or self.reach <= window):
            return None
        if window not in self._masks:
            positions, offset = mx.arange(self.reach)[None], self.array[:, None]
            seen = positions <= offset
            if window is not None:
                seen = seen & (offset < positions + window)
            self._masks[window] = seen[:, None, None, :]
        return self._masks[window]


class RowCache:
    """One layer. Speaks the part of mlx-lm's cache protocol that a model uses to decode one token a row."""

    def __init__(self, places: Places, keys: Any, values: Any) -> None:
        self._places = places
        self.keys = keys
        self.values = values
        self.capacity = (0, 0) if keys is None else (keys.shape[0], keys.shape[2])
        """(rows, positions) that fit without a copy. The buffers of rows that hold nothing yet are made by the
        first write."""

    @classmethod
    def take(cls, places: Places, layer: Any) -> RowCache | None:
        """Take over a prefilled layer, its rows moved to the front; None for another kind of cache."""
        if type(layer) not in (BatchKVCache, KVCache):
            return None
        keys, values = layer.keys, layer.values
        padding = layer.left_padding.tolist() if type(layer) is BatchKVCache else ()
        if keys is not None and any(padding):
            reach = max(places.lengths)
            keys, values = (_fronted(array, padding, reach) for array in (keys, values))
        return cls(places, keys, values)

    @property
    def offset(self) -> mx.array | int:
        """As `Places.offset`."""
        return self._places.offset

    @property
    def state(self) -> list[mx.array]:
        return [] if self.keys is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else int(self.keys.nbytes + self.values.nbytes)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:  # noqa: ARG002, N803 -- mlx-lm's signature
        return self._places.mask(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one token a row in place; returns what the rows attend to, as views."""
        places, reach, rows = self._places, self._places.reach, len(self._places.lengths)
        if self.keys is None:
            self.capacity = (max(rows, self.capacity[0]), max(rounded(reach), self.capacity[1]))
            self.keys, self.values = (self._empty_like(array) for array in (keys, values))
        elif reach > self.capacity[1]:  # nobody grew it ahead of time
            self.resize(self.capacity[0], reach)
        if places.alone:
            self.keys[:1, :, reach - 1 : reach] = keys
            self.values[:1, :, reach - 1 : reach] = values
        else:
            self.keys[places.next(keys.shape[1])] = keys.squeeze(2)
            self.values[places.next(values.shape[1])] = values.squeeze(2)
        return self.keys[:rows, :, :reach], self.values[:rows, :, :reach]

    def _empty_like(self, array: mx.array) -> mx.array:
        return mx.zeros((self.capacity[0], array.shape[1], self.capacity[1], array.shape[3]), array.dtype)

    def resize(self, rows: int, positions: int) -> None:
        """Move to buffers for `rows` rows and `positions` positions (rounded up to 256)."""
        self.capacity = rows, rounded(positions)
        if self.keys is not None:
            self.keys, self.values = resized(self.keys, *self.capacity), resized(self.values, *self.capacity)

    def extend(self, other: RowCache) -> None:
        """Copy another batch's rows into the spare ones, for which there is capacity."""
        if other.keys is None:
            return
        if self.keys is None:
            self.keys, self.values = self._empty_like(other.keys), self._empty_like(other.values)
        mine, new, reach = len(self._places.lengths), len(other._places.lengths), max(other._places.lengths)
        self.keys[mine : mine + new, :, :reach] = other.keys[:new, :, :reach]
        self.values[mine : mine + new, :, :reach] = other.values[:new, :, :reach]

    def taken(self, moves: Moves) -> list[list[mx.array]]:
        """Copies of the rows that move, of keys and of values; not computed yet."""
        return [[self._row(array, source) for _, source in moves] for array in self.state]

    def put(self, moves: Moves, taken: Sequence[Sequence[mx.array]]) -> None:
        """Write rows that were `taken`, and computed, into their new places."""
        for array, rows in zip(self.state, taken, strict=True):
            for (to, _), row in zip(moves, rows, strict=True):
                array[to : to + 1, :, : row.shape[2]] = row

    def _row(self, array: mx.array, index: int, length: int | None = None) -> mx.array:
        """A copy of one row of a buffer, or of its first `length` tokens; not computed yet."""
        length = self._places.lengths[index] if length is None else length
        return mx.contiguous(array[index : index + 1, :, :length])

    def extract(self, index: int, length: int | None = None) -> KVCache:
        """A copy of one row, or of its first `length` tokens; not computed yet."""
        cache = KVCache()
        cache.keys, cache.values = (self._row(array, index, length) for array in (self.keys, self.values))
        cache.offset = cache.keys.shape[2]
        return cache


def in_turns(pieces: Iterable[tuple[T, int]], row: int) -> Iterator[list[T]]:
    """Pieces, each with the bytes of its copies, in groups of at most `TOGETHER` and `row` bytes, or of one piece.

    They are taken to be alike: the next one is not asked for before the group is done, because a buffer that waits to
    be copied is copied as a whole by who writes to it meanwhile.
    """
    group: list[T] = []
    size = 0
    for piece, nbytes in pieces:
        group.append(piece)
        size += nbytes
        if size + nbytes > min(TOGETHER, row):
            yield group
            group, size = [], 0
    if group:
        yield group


def row_bytes(layers: Iterable[Any], rows: int) -> int:
    """What one of `rows` rows takes in all layers."""
    return int(sum(layer.nbytes for layer in layers)) // max(1, rows)


def copied(layers: Iterable[Any], into: list[Any]) -> Iterator[None]:
    """Append layers to `into` and compute them, in turns."""
    for group in in_turns(((layer, layer.nbytes) for layer in layers), TOGETHER):  # one row, in all
        into += group
        mx.eval([layer.state for layer in group])
        yield


def rearranged(layers: Sequence[RowCache], order: Sequence[int]) -> Iterator[None]:
    """Row i of every layer becomes what was row `order[i]`, in turns."""
    moves = [(to, source) for to, source in enumerate(order) if to != source]
    if not moves or not layers:
        return
    copies = [(layer, layer.nbytes * len(moves) // max(1, layer.capacity[0])) for layer in layers]
    for group in in_turns(copies, row_bytes(layers, layers[0].capacity[0])):
        taken = [layer.taken(moves) for layer in group]
        mx.eval(taken)  # a view of the buffer, still waiting to be read, would make the writes below copy all of it
        for layer, rows in zip(group, taken, strict=True):
            layer.put(moves, rows)
        mx.eval([layer.state for layer in group])
        yield


def resized(array: mx.array, rows: int, positions: int) -> mx.array:
    """A (rows, heads, positions, width) buffer with what of `array` fits, zeros beyond."""
    kept = array[:rows, :, :positions]
    spare = [(0, rows - kept.shape[0]), (0, 0), (0, positions - kept.shape[2]), (0, 0)]
    return mx.contiguous(kept) if not any(more for _, more in spare) else mx.pad(kept, spare)


def _fronted(array: mx.array, padding: Sequence[int], reach: int) -> mx.array:
    """Left-padded rows moved to the front."""
    width = max(padding)
    if width == min(padding):
        return mx.contiguous(array[:, :, width : width + reach])
    array = mx.pad(array, [(0, 0), (0, 0), (0, max(0, reach + width - array.shape[2])), (0, 0)])
    return mx.concatenate([array[i : i + 1, :, skip : skip + reach] for i, skip in enumerate(padding)])


def rounded(positions: int) -> int:
    """Up to the next step by which caches grow."""
    return -(-positions // KV_STEP) * KV_STEP
