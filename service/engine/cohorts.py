"""Which waiting prompts are prefilled together. Belongs to the generation thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from service.engine.batches import RowState
from service.engine.pacing import Load, Pacer
from service.engine.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class CohortLimits:
    """At most `rows`, as many as `pacer` lets decode with `load`'s, in one chunk that it lets be prefilled beside them;
    and `positions` of whole prompts, padding included (a matter of memory)."""

    rows: int
    positions: int
    pacer: Pacer
    load: Load


def next_cohort(
    waiting: deque[RowState], prefixes: PrefixCache, limits: CohortLimits
) -> list[tuple[RowState, list[Any] | None]]:
    """Take the first waiting prompt, and those behind it while all fit into one chunk, each with its cached prefix.

    None is taken when not even the first may decode yet.
    """
    rows: list[tuple[RowState, list[Any] | None]] = []
    room = limits.pacer.room(limits.load)
    widest = longest = 0
    while waiting and len(rows) < limits.rows:
        state, together = waiting[0], len(rows) + 1
        longest = max(longest, len(state.row.prompt))
        if not limits.pacer.may_join(limits.load, together, longest):
            break
        cache, cached = prefixes.lookup(state.row.tenant, state.row.prompt)
        widest = max(widest, len(state.rest) - cached)
        if rows and (widest * together > room or longest * together > limits.positions):
            break
        waiting.popleft()
        state.cached = cached
        del state.rest[:cached]
        state.row.on_prefill(cached)
        rows.append((state, cache))
    return rows
