"""Which waiting prompts are prefilled together, and what of them is there already. Belongs to the generation thread.

What a prompt shares with a row that decodes is copied from that row, so that many requests with one long prefix
prefill it once, also when they come before the first of them has ended and left it to the prefix cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.engine.batches import LEAST_PLANNED, RowState, cudnn_plans, trim_plain
from service.engine.decode_groups import DecodeGroups
from service.engine.memory import MemoryModel
from service.engine.pacing import Load, Pacer
from service.engine.prefix_cache import PrefixCache

WORTH_COPYING = 64
"""Tokens more than the prefix cache has, from which on a prompt takes its prefix from a row that decodes, or waits for
one of its cohort to decode."""

SINGLE = (128, 256, 512)
"""Positions of a chunk that may take the place of two or three, where it takes less than twice the least one's time: on
an H100 512 do with a model of a billion parameters, and not with one of eight."""

LARGEST_STEP = 2048
"""Multiples of which prompts begin at most, where that is of use."""


@dataclass(frozen=True, slots=True)
class CohortLimits:
    """At most `rows`, as many as `pacer` lets decode with `load`'s, in one chunk that it lets be prefilled beside them
    and that takes what `memory` reckons with."""

    rows: int
    memory: MemoryModel
    pacer: Pacer
    load: Load


class Member(NamedTuple):
    """A row of a cohort, of whose prompt `cached` tokens are in `cache`, or are to be copied there from `source`."""

    state: RowState
    cache: list[Any] | None
    cached: int
    source: RowState | None = None

    def begin(self) -> list[Any] | None:
        """Its prefill begins; returns what there is of its cache."""
        self.state.cached = self.cached
        del self.state.rest[: self.cached]
        self.state.row.on_prefill(self.cached)
        return self.cache


def next_cohort(
    waiting: deque[RowState], prefixes: PrefixCache, decode: DecodeGroups, limits: CohortLimits
) -> list[Member]:
    """Take the first waiting prompt, and those behind it while all fit into one chunk, each with its cached prefix.

    None is taken when not even the first may decode yet.
    """
    members: list[Member] = []
    room = limits.pacer.room(limits.load)
    widest = longest = 0
    while waiting and len(members) < limits.rows:
        state, together = waiting[0], len(members) + 1
        longest = max(longest, len(state.row.prompt))
        if not limits.pacer.may_join(limits.load, together, longest):
            break
        member = found(state, prefixes, decode)
        widest = max(widest, len(state.rest) - member.cached)
        positions = widest * together
        if members and (positions > room or not limits.memory.cohort_fits(positions, together, longest)):
            break
        if any(shares(state, other.state, member.cached + WORTH_COPYING) for other in members):
            break
        waiting.popleft()
        members.append(member)
    return [evened(member, limits.pacer) for member in members] if cudnn_plans() and len(members) == 1 else members


def found(state: RowState, prefixes: PrefixCache, decode: DecodeGroups | None) -> Member:
    """A row with the longest prefix of its prompt that is somewhere; its last token is always left to be run."""
    cache, cached = prefixes.lookup(state.row.tenant, state.row.prompt)
    worth = cached + WORTH_COPYING
    if decode is not None and len(state.row.prompt) > worth:
        source, length = decode.longest_shared(state.row.tenant, state.row.prompt[:-1])
        if length >= worth:
            return Member(state, None, length, source)
    return Member(state, cache, cached)


def evened(member: Member, pacer: Pacer) -> Member:
    """A single prompt with as much less of its prefix that it begins where others began.

    That is a multiple of a power of two, for which up to a sixteenth more is prefilled, or as much as the least chunk
    is padded: for a chunk that begins elsewhere cuDNN makes a plan, which takes longer. Nor are chunks larger than the
    power of two that they begin at a multiple of, so it may be a larger one where what is left is then one `SINGLE`.
    """
    state, cache, cached, source = member
    length, step = len(state.row.prompt), LEAST_PLANNED
    most = max(LEAST_PLANNED - 1, (length - cached) // 16)
    while step < LARGEST_STEP and cached % (2 * step) <= most:
        step *= 2
    if length - cached + cached % step > step:
        quick = 2 * pacer.prefill_seconds(LEAST_PLANNED, cached)
        one = (size for size in SINGLE if step < size <= cached and length - cached + cached % size <= size)
        step = next((size for size in one if pacer.prefill_seconds(size, cached) < quick), step)
    less = cached % step
    if cache is not None and not trim_plain(cache, less):
        return member
    return Member(state, None, 0) if less == cached else Member(state, cache, cached - less, source)


def copy_prefixes(members: list[Member], decode: DecodeGroups, prefixes: PrefixCache) -> Iterator[None]:
    """Layer by layer, copy what rows that decode have of these prompts. In place: nobody has a source afterwards."""
    for at, member in enumerate(members):
        layers: list[Any] = []
        if member.source is not None:
            yield from decode.copy_prefix(member.source, member.cached, layers)
        if layers:
            members[at] = member._replace(cache=layers, source=None)
        elif member.source is not None:  # which has left, and may have left its prefix
            members[at] = found(member.state, prefixes, None)


def shares(one: RowState, other: RowState, tokens: int) -> bool:
    """Whether two prompts of one tenant begin with so many tokens in common."""
    mine, theirs = one.row.prompt[:tokens], other.row.prompt[:tokens]
    return one.row.tenant == other.row.tenant and len(mine) == tokens and mine == theirs
