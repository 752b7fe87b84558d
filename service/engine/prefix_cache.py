"""What finished prompts leave behind: KV caches by prefix, one namespace a tenant, bounded in bytes.

Belongs to the generation thread. Look-up and storage are mlx-lm's `LRUPromptCache`; the byte budget over
all tenants, its fairness and the evaluation of entries are ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

UNBOUNDED_ENTRIES = 1 << 30
"""Entries are bounded by bytes, never by number."""


class PrefixCache:
    """Prefixes by tenant within `limit` bytes over all tenants.

    When room is needed the tenant that holds most gives way, so nobody can evict a tenant that holds less
    than its share (limit / tenants).
    """

    def __init__(self, *, limit: int) -> None:
        self._cap = limit
        self._limit = limit
        self._tenants: OrderedDict[str, LRUPromptCache] = OrderedDict()

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
        cache = self._tenants.get(tenant)
        head = list(tokens[:-1])
        if cache is None or not head:
            return None, 0
        found, rest = cache.fetch_nearest_cache("model", head)
        return (found, len(head) - len(rest)) if found else (None, 0)

    def store(self, tenant: str, tokens: Sequence[int], prompt_cache: list[Any]) -> None:
        """Keep a row's cache, evaluated and without its spare capacity, when it fits."""
        if not tokens or not prompt_cache:
            return
        # An entry that is not evaluated holds on to the whole batch it was cut from.
        mx.eval([layer.state for layer in prompt_cache])
        if sum(layer.nbytes for layer in prompt_cache) > self._limit:
            return
        mine = self._tenants.setdefault(tenant, LRUPromptCache(max_size=UNBOUNDED_ENTRIES))
        mine.insert_cache("model", list(tokens), prompt_cache)
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
            step = min(excess, max(1, largest.nbytes - others))
            largest.trim_to(n_bytes=largest.nbytes - step)
            if not len(largest):
                del self._tenants[name]


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
