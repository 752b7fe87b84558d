"""The rows that decode: one forward pass computes one token for each of them.

Takes the place of mlx-lm's `GenerationBatch`, on its caches and models: there every join, leave and growth
copies the whole KV cache (see `row_cache.py`), and the last prompt token of who joins costs a forward pass of
its own. Belongs to the generation thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from service.engine.backend import nothing
from service.engine.batches import PrefillBatch, RowState
from service.engine.generation import FinishReason
from service.engine.prefix_cache import common_prefix
from service.engine.row_cache import Places, RowCache, copied, in_turns, rearranged, rounded, row_bytes
from service.engine.sampling import Sampling

SPARE = 64
"""Positions beyond a stretched row's tokens."""


class Emitted(NamedTuple):
    """One row's next token, and why it is the row's last."""

    state: RowState
    token: int
    reason: FinishReason | None


class Chore(NamedTuple):
    """Copies, a layer at each turn; `beside`: rows may decode between two of them, launching one token at a time."""

    layers: Iterator[None]
    beside: bool = True


class DecodeBatch:
    """Rows and their caches. A token is launched (computed in the background), then emitted (waited for).

    With two launched at a time the device computes while Python works. Copies are made while none is launched,
    layer by layer so that a step can stop in between. All rows are drawn in one pass; an exception out of one row's
    sampling fails that row alone (`failed`).
    """

    def __init__(self, model: Any, eos: frozenset[int]) -> None:
        self.model = model
        self.eos = eos
        self.rows: list[RowState] = []
        self.tokens: list[list[int]] = []
        """Each row's prompt and what it emitted; the newest is not in the cache before the next is launched."""
        self.cache: list[Any] = []
        self.failed: dict[int, Exception] = {}
        self._places = Places()
        self._sampling: Sampling | None = None
        self._launched: list[mx.array] = []
        self._newest = mx.array([], dtype=mx.uint32)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def launched(self) -> int:
        """Tokens of each row that are being computed and were not emitted: 0, 1 or 2."""
        return len(self._launched)

    @property
    def context(self) -> int:
        """Tokens that the longest row has in its cache."""
        return self._places.reach - 1

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache)

    @property
    def capacity(self) -> tuple[int, int]:
        """(rows, positions) of the buffers that are written in place; no rows where there are none."""
        return next((layer.capacity for layer in self.cache if isinstance(layer, RowCache)), (0, 0))

    def bytes_of(self, rows: int, positions: int) -> int:
        """What buffers of such a capacity take."""
        layers = (layer for layer in self.cache if isinstance(layer, RowCache) and layer.nbytes)
        return sum(layer.nbytes * rows * rounded(positions) // math.prod(layer.capacity) for layer in layers)

    def launch(self, meanwhile: Callable[[], object] = nothing) -> None:
        """Start computing the next token of every row; call `meanwhile` before the interpreter is let go for that."""
        inputs = self._newest
        logits = self.model(inputs[:, None], cache=self.cache)[:, -1, :]
        self._newest = self._draw(inputs, logits)
        self._places.advance([state.leaving for state in self.rows])
        meanwhile()
        mx.async_eval(self._newest)
        self._launched.append(self._newest)

    def emit(self) -> list[Emitted]:
        """Wait for the oldest token that was launched. Rows that end are `leaving`, to be dropped."""
        tokens = self._launched.pop(0).tolist()
        emitted = []
        for state, known, token in zip(self.rows, self.tokens, tokens, strict=True):
            if state.leaving or state.row.uid in self.failed:
                continue
            known.append(token)
            state.sampled += 1
            reason = FinishReason.LENGTH if state.sampled == state.row.max_tokens else None
            reason = FinishReason.STOP if token in self.eos else reason
            state.leaving = reason is not None
            emitted.append(Emitted(state, token, reason))
        return emitted

    def next(self) -> list[Emitted]:
        """One token of every row, while the device goes on with the one after it."""
        while self.launched < 2:  # noqa: PLR2004 -- one that is waited for, and one ahead
            self.launch()
        return self.emit()

    def abandon_if_nobodys(self) -> None:
        """Forget what is launched when every row is leaving."""
        if all(state.leaving for state in self.rows):
            self._launched.clear()

    def join(self, prefilled: PrefillBatch, rows: int) -> Iterator[None]:
        """Layer by layer, take over prefilled rows, in buffers for at least `rows` rows.

        Nothing may be launched before the first layer, nor between two, but these rows may decode meanwhile. The other
        batch is spent.
        """
        assert not self._launched
        theirs = Places([len(tokens) for tokens in prefilled.tokens])
        rows = max(rows, len(self) + len(prefilled.rows))
        row = row_bytes(prefilled.prompt_cache, len(prefilled.rows))
        for group in in_turns(self._joined(prefilled.prompt_cache, theirs, rows), row):
            mx.eval([layer.state for layer in group])
            yield
        self._release_sampling()
        self._places.extend(theirs.lengths)
        self.rows += prefilled.rows
        self.tokens += [[*known, state.rest[0]] for known, state in zip(prefilled.tokens, prefilled.rows, strict=True)]
        self._newest = mx.concatenate([self._newest, mx.array([state.rest[0] for state in prefilled.rows], mx.uint32)])

    def _joined(self, layers: list[Any], theirs: Places, rows: int) -> Iterator[tuple[Any, int]]:
        """This batch's layers with the rows of `theirs`, whose own go; each with the bytes to copy for that."""
        for index, layer in enumerate(layers):
            taken = RowCache.take(theirs, layer) or _batched(layer)
            room = getattr(self.cache[index] if self.rows else taken, "capacity", None)
            mine = self._extended(index, taken, rows, theirs.reach)
            layers[index] = None
            in_place = isinstance(mine, RowCache) and mine.capacity == room
            yield mine, taken.nbytes if in_place else mine.nbytes

    def _extended(self, index: int, layer: Any, rows: int, reach: int) -> Any:
        """This batch's layer with the rows of another one's; a first batch becomes this one's own."""
        if not self.rows:
            if isinstance(layer, RowCache):
                layer = RowCache(self._places, layer.keys, layer.values)
                if rows > layer.capacity[0] or reach > layer.capacity[1]:
                    layer.resize(rows, reach)
            self.cache[index:] = [layer]
        elif isinstance(layer, RowCache):
            mine = self.cache[index]
            positions = max(reach, self._places.reach)
            if rows > mine.capacity[0] or positions > mine.capacity[1]:
                mine.resize(rows, positions)
            mine.extend(layer)
        else:
            self.cache[index].extend(layer)
        return self.cache[index]

    def extract(self, index: int, layers: list[Any]) -> Iterator[None]:
        """Layer by layer, append a copy of one row to `layers`; it holds `known(index)`. Nothing may be launched."""
        assert not self._launched
        rows = (layer.extract(index) if hasattr(layer, "extract") else layer for layer in self.cache)
        yield from copied(rows, layers)

    def longest_shared(self, tenant: str, head: Sequence[int]) -> tuple[RowState | None, int]:
        """The row of `tenant` that has most of `head` in its cache, and how many tokens of it."""
        best: tuple[RowState | None, int] = None, 0
        if all(isinstance(layer, RowCache) for layer in self.cache):
            wanted = list(head)
            for state, tokens in zip(self.rows, self.tokens, strict=True):
                if state.row.tenant == tenant and not state.leaving:
                    length = min(common_prefix(tokens, wanted), len(tokens) - 1)
                    best = max(best, (state, length), key=lambda each: each[1])
        return best

    def copy_prefix(self, source: RowState, length: int, layers: list[Any]) -> Iterator[None]:
        """Layer by layer, append a copy of a row's first `length` tokens to `layers`; nothing when it has left.

        Nothing may be launched before the first layer, nor between two, but the rows may decode meanwhile.
        """
        index = next((at for at, state in enumerate(self.rows) if state is source), None)
        if index is not None:
            yield from copied((layer.extract(index, length) for layer in self.cache), layers)

    def known(self, index: int) -> list[int]:
        """The tokens in a row's cache while nothing is launched."""
        return self.tokens[index][: self._places.lengths[index]]

    def drop(self) -> Iterator[None]:
        """Layer by layer, take out the rows that are leaving; into their places the last ones move.

        Nothing may be launched before the first layer, nor before the last one's end.
        """
        assert not self._launched
        order = _compacted([not state.leaving for state in self.rows])
        yield from rearranged([layer for layer in self.cache if isinstance(layer, RowCache)], order)
        for layer in self.cache:
            if not isinstance(layer, RowCache):
                layer.filter(order)
                mx.eval(layer.state)
                yield
        self._release_sampling()
        self._places.filter(order)
        self.rows = [self.rows[index] for index in order]
        self.tokens = [self.tokens[index] for index in order]
        self._newest = self._newest[mx.array(order)]

    def resize(self, rows: int, positions: int) -> Iterator[None]:
        """Layer by layer, change the capacity. The rows may decode meanwhile."""
        row = row_bytes(self.cache, len(self))
        for group in in_turns(self._resized(max(rows, len(self)), max(positions, self._places.reach)), row):
            mx.eval([layer.state for layer in group])
            yield

    def _resized(self, rows: int, positions: int) -> Iterator[tuple[RowCache, int]]:
        for layer in self.cache:
            if isinstance(layer, RowCache):
                layer.resize(rows, positions)
                yield layer, layer.nbytes

    def stretch(self, length: int) -> bool:
        """Go on as if every row had `length` tokens, to measure; False where a cache of another kind keeps that out."""
        self._launched.clear()
        if not all(isinstance(layer, RowCache) for layer in self.cache):
            return False
        for layer in self.cache:
            layer.resize(len(self), length + SPARE)
            mx.eval(layer.state)
        self._places.stretch(length)
        return True

    def _draw(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """One pass over all rows; when it raises, each of them alone."""
        drawn = self._guarded(None, lambda: self._together(logits.shape[-1])(inputs, logits))
        if drawn is not None:
            return drawn
        self._release_sampling()
        alone = [self._guarded(at, partial(self._alone, at, inputs, logits)) for at in range(len(self.rows))]
        return mx.concatenate([mx.zeros(1, dtype=mx.uint32) if each is None else each for each in alone])

    def _together(self, vocab_size: int) -> Sampling:
        if self._sampling is None:
            self._sampling = Sampling([state.sampling for state in self.rows], vocab_size)
        return self._sampling

    def _alone(self, at: int, inputs: mx.array, logits: mx.array) -> mx.array:
        sampling = Sampling([self.rows[at].sampling], logits.shape[-1])
        drawn = sampling(inputs[at : at + 1], logits[at : at + 1])
        sampling.release()
        return drawn

    def _release_sampling(self) -> None:
        if self._sampling is not None:
            self._sampling.release()
            self._sampling = None

    def _guarded(self, index: int | None, draw: Callable[[], mx.array]) -> mx.array | None:
        """Run rows' own code; the exception of one row's becomes that row's failure, reported by the next step."""
        try:
            return draw()
        except Exception as error:  # noqa: BLE001  the one row's processors of the architecture rule; the worker logs it
            if index is not None:
                self.failed.setdefault(self.rows[index].row.uid, error)
            return None


def _batched(layer: Any) -> Any:
    """mlx-lm's own kind of batch for a layer of one row; itself when it is one, or cannot be."""
    return layer.merge([layer]) if hasattr(layer, "merge") and not hasattr(layer, "extract") else layer


def _compacted(kept: Sequence[bool]) -> list[int]:
    """Which old index each new one gets: kept rows stay where they can, the last ones fill the gaps."""
    count = sum(kept)
    movers = [index for index in range(count, len(kept)) if kept[index]]
    return [index if kept[index] else movers.pop() for index in range(count)]
