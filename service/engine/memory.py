"""How much memory a batch needs at its peak: arithmetic only, no mlx, any thread.

A batched KV cache is padded to its longest row and grows by 256 positions, so its size is rows x longest
row, not the sum of the rows. When a row joins or the cache grows, mlx-lm builds the new cache beside the
old one: a copy on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KV_STEP = 256
"""Positions by which mlx-lm's caches grow (`KVCache.step`)."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose caches cost alike: `bytes_per_token` over all of them, up to `window` positions."""

    bytes_per_token: int
    window: int | None = None

    def row_bytes(self, tokens: int) -> int:
        """Bytes of one row padded to `tokens` positions, with the spare step that growth leaves."""
        positions = tokens + KV_STEP
        return min(positions, self.window + KV_STEP if self.window else positions) * self.bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """What rows of given lengths cost. `budget` is what caches and activations may use beside the weights.

    `bytes_per_row` is state that does not grow (recurrent layers). Activations of a forward pass over q
    positions that attend to k: q x (`bytes_per_position` + k x `bytes_per_score`); decode has one position
    a row, and prefill at most `chunk_tokens` in a step. `bytes_per_logits` is one row's logits and their
    copies while a token is drawn.
    """

    budget: int
    layers: tuple[LayerGroup, ...]
    bytes_per_row: int = 0
    bytes_per_position: int = 0
    bytes_per_score: float = 0.0
    bytes_per_logits: int = 0
    chunk_tokens: int = 0

    def cache_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes of one batched cache that holds rows of these lengths (prompt + output)."""
        if not lengths:
            return 0
        longest = max(lengths)
        return len(lengths) * (self.bytes_per_row + sum(group.row_bytes(longest) for group in self.layers))

    def peak_bytes(self, lengths: Sequence[int]) -> int:
        """Upper bound of what these rows need at once: their cache, its copy, and one step's activations."""
        if not lengths:
            return 0
        positions = min(self.chunk_tokens, sum(lengths)) + len(lengths)
        activations = positions * (self.bytes_per_position + max(lengths) * self.bytes_per_score)
        return 2 * self.cache_bytes(lengths) + int(activations) + len(lengths) * self.bytes_per_logits

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether these rows fit into the budget together."""
        return self.peak_bytes(lengths) <= self.budget
