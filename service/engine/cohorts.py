"""Which waiting prompts are prefilled together. Belongs to the generation thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from service.engine.batches import RowState
from service.engine.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class CohortLimits:
    """At most `rows`; `room` positions to compute in one chunk (a matter of time), padding included; and
    `positions` of whole prompts, padding included (a matter of memory)."""

    rows: int
    room: int
    positions: int


def next_cohort(
    waiting: deque[RowState], prefixes: PrefixCache, limits: CohortLimits
) -> list[tuple[RowState, list[Any] | None]]:
    """Take the first waiting prompt, and those behind it while all fit into one chunk, each with its cached prefix."""
    rows: list[tuple[RowState, list[Any] | None]] = []
    widest = longest = 0
    while waiting and len(rows) < limits.rows:
        state, together = waiting[0], len(rows) + 1
        cache, cached = prefixes.lookup(state.row.tenant, state.row.prompt)
        widest, longest = max(widest, len(state.rest) - cached), max(longest, len(state.row.prompt))
        if rows and (widest * together > limits.room or longest * together > limits.positions):
            break
        waiting.popleft()
        state.cached = cached
        del state.rest[:cached]
        rows.append((state, cache))
    return rows
