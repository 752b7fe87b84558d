"""What finished prompts leave behind: KV caches by prefix, one namespace a tenant, bounded in bytes.

Belongs to the generation thread. mlx-lm's `LRUPromptCache` is not used: its look-up visits every token that is stored
behind the prefix it found (100 ms for 100 answers that share a system prompt), and what is looked up stays old.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, trim_prompt_cache

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """The evaluated layers of one sequence, which may be cut back where they are `trimmable`."""

    layers: list[Any]
    nbytes: int
    trimmable: bool

    def first(self, length: int, of: int) -> list[Any]:
        """A cache of the caller's own with the first `length` of `of` tokens; mlx copies arrays that are written to."""
        layers = [_own(layer) if type(layer) is KVCache else copy.deepcopy(layer) for layer in self.layers]
        if length < of:
            trim_prompt_cache(layers, of - length)
        return layers


class Prefixes:
    """One tenant's entries. Sorted, so that what shares most with a prompt is beside the prompt's place; and by use."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._sorted: list[Tokens] = []
        self._entries: OrderedDict[Tokens, Entry] = OrderedDict()
        """The one that was of no use for longest comes first."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, prompt: Tokens) -> tuple[list[Any] | None, int]:
        """A cache of the longest prefix of `prompt` that some entry has, and its length; (None, 0) without one."""
        best, most = next(((found, len(found)) for found in self._prefixes_of(prompt)), (None, 0))
        at = bisect_left(self._sorted, prompt)
        for beside in self._sorted[max(0, at - 1) : at + 1]:
            length = common_prefix(beside, prompt)
            if length > most and self._entries[beside].trimmable:
                best, most = beside, length
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best].first(most, len(best)), most

    def add(self, tokens: Tokens, entry: Entry) -> None:
        """Keep `entry`, unless another one has all of it; those of which it has all go."""
        at = bisect_left(self._sorted, tokens)
        for longer in self._sorted[at : at + 1]:
            if longer[: len(tokens)] == tokens and (self._entries[longer].trimmable or longer == tokens):
                self._entries.move_to_end(longer)
                return
        if entry.trimmable:
            for shorter in list(self._prefixes_of(tokens)):
                self._drop(shorter)
        self._sorted.insert(bisect_left(self._sorted, tokens), tokens)
        self._entries[tokens] = entry
        self.nbytes += entry.nbytes

    def shrink(self, nbytes: int) -> None:
        """Hold at most `nbytes`."""
        while self.nbytes > nbytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, tokens: Tokens) -> None:
        del self._sorted[bisect_left(self._sorted, tokens)]
        self.nbytes -= self._entries.pop(tokens).nbytes

    def _prefixes_of(self, tokens: Tokens) -> Iterator[Tokens]:
        """The entries with which `tokens` begins, the longest first.

        All are at or before its place; where the last one there is none of them, it shares as much as any before it.
        """
        while at := bisect_right(self._sorted, tokens):
            before = self._sorted[at - 1]
            length = common_prefix(before, tokens)
            if length < len(before):
                tokens = tokens[:length]
            else:
                yield before
                tokens = before[:-1]


class PrefixCache:
    """Prefixes by tenant within `limit` bytes over all tenants.

    When room is needed the tenant that holds most gives way, so nobody can evict a tenant that holds less
    than its share (limit / tenants).
    """

    def __init__(self, *, limit: int) -> None:
        self._cap = limit
        self._limit = limit
        self._tenants: dict[str, Prefixes] = {}

    @property
    def capacity(self) -> int:
        """Most bytes that it ever holds."""
        return self._cap

    @property
    def nbytes(self) -> int:
        return sum(tenant.nbytes for tenant in self._tenants.values())

    def __len__(self) -> int:
        return sum(len(tenant) for tenant in self._tenants.values())

    def lookup(self, tenant: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """The longest stored prefix of all but the last token: (its cache, its length) or (None, 0).

        The last token is always left to be run, because its logits are needed. The cache is the caller's.
        """
        mine = self._tenants.get(tenant)
        return (None, 0) if mine is None else mine.find(tuple(tokens[:-1]))

    def store(self, tenant: str, tokens: Sequence[int], prompt_cache: list[Any]) -> None:
        """Keep a row's cache, evaluated and without its spare capacity, when it fits."""
        if not tokens or not prompt_cache:
            return
        # An entry that is not evaluated holds on to the whole batch it was cut from.
        mx.eval([layer.state for layer in prompt_cache])
        nbytes = sum(layer.nbytes for layer in prompt_cache)
        if nbytes > self._limit:
            return
        entry = Entry(prompt_cache, nbytes, can_trim_prompt_cache(prompt_cache))
        self._tenants.setdefault(tenant, Prefixes()).add(tuple(tokens), entry)
        self._shrink()

    def make_room(self, nbytes: int) -> None:
        """Hold at most `nbytes` from now on (never more than the configured limit)."""
        self._limit = max(0, min(self._cap, nbytes))
        self._shrink()

    def clear(self) -> None:
        self._tenants.clear()

    def _shrink(self) -> None:
        """Evict from the largest tenant until the limit holds."""
        while (excess := self.nbytes - self._limit) > 0:
            name, largest = max(self._tenants.items(), key=lambda item: item[1].nbytes)
            others = max((t.nbytes for n, t in self._tenants.items() if n != name), default=0)
            largest.shrink(largest.nbytes - min(excess, max(1, largest.nbytes - others)))
            if not len(largest):
                del self._tenants[name]


def _own(layer: KVCache) -> KVCache:
    """What `deepcopy` makes of it, in an eighth of the time."""
    own = KVCache()
    own.keys, own.values, own.offset = copy.copy(layer.keys), copy.copy(layer.values), layer.offset
    return own


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences, of the same type, begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
