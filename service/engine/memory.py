"""How much memory a batch needs at its peak: arithmetic only, no mlx, any thread.

A batched KV cache is padded to its longest row and grows by 256 positions, so its size is rows x longest
row, not the sum of the rows; rows that decode in batches by their length (`decode_groups.py`) take less than that.
Prompts in prefill have a cache of their own beside it until they join, and a row that leaves is copied once for
the prefix cache. mlx-lm's own batched caches are copied whole when a row joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUDGET_SHARE = 0.8
"""Share of the device's recommended working set that weights and caches together may use."""

HOST_SHARE = 0.5
"""The same of physical memory, where the device names no working set (CPU)."""

KV_STEP = 256
"""Positions by which mlx-lm's caches grow (`KVCache.step`)."""

ACTIVATION_SHARE = 0.25
"""Share of the budget that one prefill chunk's activations may take; after a long context chunks get smaller."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose caches cost alike: `bytes_per_token` over all `layers`, up to `window` positions.

    `in_place`: rows join, leave and grow one layer at a time (`row_cache.py`); other caches are copied as a whole.
    """

    bytes_per_token: int
    window: int | None = None
    layers: int = 1
    in_place: bool = False

    def row_bytes(self, tokens: int) -> int:
        """Bytes of one row padded to `tokens` positions, with the spare step that growth leaves."""
        positions = tokens + KV_STEP
        return min(positions, self.window + KV_STEP if self.window else positions) * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of a forward pass: q positions that attend to k cost q x (`per_position` + k x `per_score`)."""

    per_position: int = 0
    per_score: float = 0.0

    def of(self, positions: int, context: int) -> int:
        return int(positions * (self.per_position + context * self.per_score))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """What rows of given lengths cost. `budget` is what caches and activations may use beside the weights.

    `bytes_per_row` is state that does not grow (recurrent layers). `prompt` are the activations of one long
    prompt's chunk, of at most `chunk` positions; `masked` those of several rows together, which need a mask: decode,
    one position a row, and cohorts of at most `prefill_rows` short prompts, together not longer than a chunk.
    `bytes_per_logits` is one row's logits and their copies while a token is drawn.
    """

    budget: int
    layers: tuple[LayerGroup, ...]
    bytes_per_row: int = 0
    prompt: Activations = Activations()
    masked: Activations = Activations()
    bytes_per_logits: int = 0
    chunk_tokens: int = 0
    prefill_rows: int = 1

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of one batched cache that holds rows of these lengths (prompt + output)."""
        if not lengths:
            return 0
        longest = max(lengths)
        return len(lengths) * (self.bytes_per_row + sum(group.row_bytes(longest) for group in self.layers))

    def peak_bytes(self, lengths: Sequence[int], held: int = 0) -> int:
        """Upper bound of what these rows need at once, beside `held` bytes that their buffers have already.

        Of caches that are written in place: the buffers, what is in prefill beside them, and the larger of a layer
        that is being copied and a row that leaves. Of others twice the batch. And one step's activations.
        """
        if not lengths:
            return 0
        rows, longest = len(lengths), max(lengths)
        caches = rows * self.bytes_per_row * 2 + sum(self._peak_of(group, rows, longest, held) for group in self.layers)
        chunk = self.prompt.of(min(self.chunk(longest), longest), longest)
        if rows > 1:  # at least two in a cohort, so each has half of a chunk at most
            chunk = max(chunk, self._cohort_bytes(rows, longest))
        return caches + chunk + self.masked.of(rows, longest) + rows * self.bytes_per_logits

    def _cohort_bytes(self, rows: int, longest: int) -> int:
        return self.masked.of(min(self.chunk_tokens, rows * longest), min(self.chunk_tokens // 2, longest))

    def cohort_fits(self, positions: int, rows: int, longest: int) -> bool:
        """Whether so many positions of a cohort, padding included, take no more than `peak_bytes` reckons for a chunk.
        What is cached of its prompts, the longest of which has `longest` tokens, is not prefilled."""
        return self.masked.of(positions, longest) <= self._cohort_bytes(rows, longest)

    def chunk(self, context: int) -> int:
        """Most positions to prefill in one step after `context`: their activations take a share of the budget."""
        fits = int(self.budget * ACTIVATION_SHARE / max(1, self.prompt.of(1, context)))
        return max(1, min(self.chunk_tokens, fits))

    def _peak_of(self, group: LayerGroup, rows: int, longest: int, held: int) -> int:
        row = group.row_bytes(longest)
        if not group.in_place:
            return 2 * rows * row
        buffers = max(rows * row, held)
        return buffers + min(rows - 1, self.prefill_rows) * row + max(buffers // group.layers, row)

    def fits(self, lengths: Sequence[int], held: int = 0) -> bool:
        """Whether these rows fit into the budget together."""
        return self.peak_bytes(lengths, held) <= self.budget
