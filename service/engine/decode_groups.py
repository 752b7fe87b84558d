"""Rows that decode, in batches of similar length, so that a long row does not pad all the others to its length.

One forward pass a batch: a batch of its own costs a pass of few rows, a place in another batch costs that all its rows
attend as far as its longest one (17 rows, one of them with 16,000 tokens: 52 ms a step on an H100, the 16 short
ones alone 14). `Pacer.home` weighs that when rows join; afterwards they stay. Belongs to the generation thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from service.engine.backend import nothing
from service.engine.batches import PrefillBatch, RowState
from service.engine.decode_batch import Chore, DecodeBatch, Emitted
from service.engine.memory import MemoryModel
from service.engine.pacing import Pacer
from service.engine.row_cache import rounded

Keep = Callable[[RowState, Sequence[int], list[Any]], None]
"""Told of a row that leaves: its state, the tokens in its cache, and a copy of that, a layer each."""

Change = tuple[int, DecodeBatch, tuple[int, int]]
"""Bytes by which a batch's buffers grow, the batch, and the (rows, positions) for which they are to be."""

EARLY = 32
"""Tokens before the end of their capacity from which on rows get more: layer by layer, while they decode."""

UNKNOWN = MemoryModel(budget=0, layers=())
"""What rows take while no model is loaded."""


class DecodeGroups:
    """All rows that decode. Their tokens are launched together, and emitted together.

    Only the first batch has room for rows that are expected. The buffers of all never grow beyond those of one batch
    padded to its longest row, which is what `MemoryModel.peak_bytes` reckons with.
    """

    def __init__(self, model: Any, eos: frozenset[int], pacer: Pacer, memory: MemoryModel = UNKNOWN) -> None:
        self._model = model
        self._eos = eos
        self._pacer = pacer
        self._memory = memory
        self._batches: list[DecodeBatch] = []

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    @property
    def rows(self) -> list[RowState]:
        return [state for batch in self._batches for state in batch.rows]

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(rows, tokens of the longest) of each batch."""
        return tuple((len(batch), batch.context) for batch in self._batches)

    @property
    def awaited(self) -> tuple[tuple[int, int], ...]:
        """`sizes`, but nothing when every row is leaving: nobody waits for their next token."""
        return () if all(state.leaving for state in self.rows) else self.sizes

    @property
    def launched(self) -> int:
        """Tokens of each row that are being computed and were not emitted: 0, 1 or 2."""
        return max((batch.launched for batch in self._batches), default=0)

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in self._batches)

    def launch(self, meanwhile: Callable[[], object] = nothing) -> None:
        """Start computing the next token of every row. `meanwhile` as `DecodeBatch.launch`'s, once for each batch."""
        for batch in self._batches:
            batch.launch(meanwhile)

    def emit(self) -> list[Emitted]:
        """Wait for the oldest token of every row. Rows that end are `leaving`, to be dropped."""
        return [emitted for batch in self._batches for emitted in batch.emit()]

    def abandon_if_nobodys(self) -> None:
        """Forget what is launched when every row is leaving."""
        if all(state.leaving for state in self.rows):
            for batch in self._batches:
                batch.abandon_if_nobodys()

    def take_failed(self) -> dict[int, Exception]:
        """Rows whose own sampling failed, by uid, each told once; nothing of those that are leaving."""
        found: dict[int, Exception] = {}
        for batch in self._batches:
            live = {state.row.uid for state in batch.rows if not state.leaving}
            found |= {uid: error for uid, error in batch.failed.items() if uid in live}
            batch.failed.clear()
        return found

    def clear(self) -> None:
        self._batches.clear()

    def chore(self, waiting: Sequence[RowState], prefill: PrefillBatch | None, keep: Keep) -> Chore | None:
        """Rows that leave, or buffers to change, with those in prefill expected and those that wait for it. It begins
        when nothing is launched. Buffers that grow beyond what all these rows are promised have no spare places."""
        for batch in self._batches:
            if any(state.leaving for state in batch.rows):
                return Chore(self._drop(batch, keep), beside=False)
        if not self._batches:
            return None
        expected, grows = self._expected(len(waiting), prefill)
        changes = self._changes(expected, spare=True)
        grows += sum(max(0, more) for more, *_ in changes)
        if grows and self.nbytes + grows > self._promised([*self.rows, *waiting, *(prefill.rows if prefill else ())]):
            changes = self._changes(expected, spare=False)
        if not changes:
            return None
        _, batch, capacity = min(changes, key=lambda change: change[0])
        return Chore(batch.resize(*capacity))

    def _promised(self, rows: Sequence[RowState]) -> int:
        return self._memory.cache_bytes([len(state.row.prompt) + state.row.max_tokens for state in rows])

    def _expected(self, waiting: int, prefill: PrefillBatch | None) -> tuple[list[int], int]:
        """Rows that each batch is to have room for beside its own; and, where a cohort is about to join, the bytes that
        it makes the buffers grow by."""
        expected, new = [waiting] + [0] * (len(self._batches) - 1), 0 if prefill is None else len(prefill.rows)
        if prefill is None or not prefill.ready:
            return [waiting + new, *expected[1:]], 0
        home, reach = self._pacer.home(self.sizes, new, prefill.context), prefill.context + 1
        if home is None:
            return expected, self._batches[0].bytes_of(new, reach)
        batch = self._batches[home]
        expected[home] += new
        rows, positions = len(batch) + expected[home], max(batch.context + 1, reach)
        if rows <= batch.capacity[0] and positions <= batch.capacity[1]:
            return expected, 0
        return expected, batch.bytes_of(rows, positions) - batch.bytes_of(*batch.capacity)

    def _changes(self, expected: Sequence[int], *, spare: bool) -> list[Change]:
        """What is to change; `expected` rows of each batch, in order."""
        found = []
        for batch, coming in zip(self._batches, expected, strict=True):
            if wanted := _wanted(batch, coming, spare=spare):
                found.append((batch.bytes_of(*wanted) - batch.bytes_of(*batch.capacity), batch, wanted))
        return found

    def _drop(self, batch: DecodeBatch, keep: Keep) -> Iterator[None]:
        """Hand over the caches of the rows that are leaving, then let them go."""
        for index, state in enumerate(batch.rows):
            if state.leaving and state.keep_prefix:
                layers: list[Any] = []
                yield from batch.extract(index, layers)
                keep(state, batch.known(index), layers)
        if all(state.leaving for state in batch.rows):
            self._batches.remove(batch)
        else:
            yield from batch.drop()

    def join(self, prefilled: PrefillBatch, coming: int) -> Iterator[None]:
        """Layer by layer, take over prefilled rows, with `coming` more expected. The other batch is spent.

        Nothing may be launched before the first layer, nor between two, but rows may decode meanwhile.
        """
        home = self._pacer.home(self.sizes, len(prefilled.rows), prefilled.context)
        if home is None:
            batch = DecodeBatch(self._model, self._eos)
            yield from batch.join(prefilled, len(prefilled.rows) + (0 if self._batches else coming))
            self._batches.append(batch)
        else:
            batch = self._batches[home]
            yield from batch.join(prefilled, len(batch) + len(prefilled.rows) + (0 if home else coming))

    def longest_shared(self, tenant: str, head: Sequence[int]) -> tuple[RowState | None, int]:
        """The row of `tenant` that has most of `head` in its cache, and how many tokens of it."""
        found = (batch.longest_shared(tenant, head) for batch in self._batches)
        return max(found, key=lambda each: each[1], default=(None, 0))

    def copy_prefix(self, source: RowState, length: int, layers: list[Any]) -> Iterator[None]:
        """Layer by layer, append a copy of a row's first `length` tokens to `layers`; nothing when it has left."""
        for batch in self._batches:
            yield from batch.copy_prefix(source, length, layers)


def _wanted(batch: DecodeBatch, coming: int, *, spare: bool) -> tuple[int, int] | None:
    """(rows, positions) for a batch to change to, with `coming` rows expected; None while its present buffers will do.

    They will not when the next tokens do not fit, nor when less than half of them is needed; without `spare` places,
    when not all of them are.
    """
    (rows, positions), reach, expected = batch.capacity, batch.context + 2, len(batch) + coming
    share = 2 if spare else 1
    if not rows or (reach + EARLY <= positions and rows * positions <= share * expected * rounded(reach)):
        return None
    longest = max(len(state.row.prompt) + state.row.max_tokens for state in batch.rows)
    needed = max(reach, min(reach + EARLY, longest))
    if needed > positions:
        return max(rows, expected) if spare else expected, needed
    return (expected, needed) if rows * positions > share * expected * rounded(needed) else None
