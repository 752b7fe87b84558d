"""All API keys in memory, kept equal to the store by asking for its revision. Belongs to the event loop's thread.

Every key is held, revoked ones too, about 1.5 kB each: thousands are fine, and 10,000 reload in a fraction of a
second on the store's thread (docs/keys.md has the figures). So a request costs no query, and while the store cannot
be read there is still something to go by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from types import MappingProxyType
from typing import Protocol

from service.errors import StorageUnavailable
from service.observability.logging import get_logger
from service.storage.keys import KeyRecord

log = get_logger(__name__)

POLL_TIMEOUT = 2.0
"""Seconds after which a store that does not answer counts as unreadable."""

LOAD_TIMEOUT = 20.0
"""The same for reading all keys, which happens after a change only."""


Follower = Callable[[int | None, float], Awaitable[object]]
"""Told after each poll which revision it read (None: it could not) and when it began. Must not raise."""


class KeyStore(Protocol):
    """What the snapshot needs of the store. Both raise StorageUnavailable when it cannot be read."""

    async def revision(self) -> int:
        """A number that differs after each change of a key; `last_used_at` is none."""

    async def all_keys(self) -> Sequence[KeyRecord]: ...


class Snapshot:
    """The keys as of the last successful poll. `clock` is monotonic seconds."""

    def __init__(
        self,
        store: KeyStore,
        *,
        clock: Callable[[], float],
        timeouts: tuple[float, float] = (POLL_TIMEOUT, LOAD_TIMEOUT),
    ) -> None:
        self._store = store
        self._clock = clock
        self._poll_timeout, self._load_timeout = timeouts
        self._records: Mapping[str, KeyRecord] = MappingProxyType({})
        self._revision: int | None = None
        self._fresh_at: float | None = None
        self._readable = True
        self._listeners: tuple[Callable[[], None], ...] = ()
        self._followers: tuple[Follower, ...] = ()
        self._running: asyncio.Task[bool] | None = None
        self._next: asyncio.Task[bool] | None = None

    def get(self, kid: str) -> KeyRecord | None:
        return self._records.get(kid)

    def fresh_within(self, seconds: float) -> bool:
        """Whether what is known was true at most `seconds` ago."""
        return self._fresh_at is not None and self._clock() - self._fresh_at <= seconds

    def pepper_versions(self) -> frozenset[int]:
        """The versions that the keys were hashed with."""
        return frozenset(record.pepper_version for record in self._records.values())

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the event loop after each change. It must not raise."""
        self._listeners = (*self._listeners, listener)

    def on_poll(self, follower: Follower) -> None:
        """Have `follower` told of the revision that each poll reads. The poll lasts until it knows."""
        self._followers = (*self._followers, follower)

    async def refresh(self) -> bool:
        """Poll the store with a query that begins after this call; False when it could not be read.

        Callers share: there is one query at a time, and at most one more is waiting to begin.
        """
        if self._next is None:
            # In a context of its own: what it logs is of no single request.
            self._next = asyncio.create_task(self._poll_after(self._running), name="key-poll", context=Context())
        return await asyncio.shield(self._next)

    async def _poll_after(self, running: asyncio.Task[bool] | None) -> bool:
        if running is not None:
            await asyncio.wait([running])
        self._running, self._next = self._next, None  # it begins now: who asks from here on needs another one
        try:
            readable = await self._poll()
        finally:
            self._running = None
        if readable is not self._readable:
            self._readable = readable
            (log.info if readable else log.error)("key_store_readable" if readable else "key_store_unreadable")
        return readable

    async def _poll(self) -> bool:
        began, revision, readable = self._clock(), None, False
        try:
            async with asyncio.timeout(self._poll_timeout):
                # Asked before the keys: a change in between is seen again at the next poll, never missed.
                revision = await self._store.revision()
            if revision != self._revision:
                async with asyncio.timeout(self._load_timeout):
                    self._replace(revision, await self._store.all_keys())
            self._fresh_at, readable = began, True
        except (StorageUnavailable, TimeoutError):
            pass
        for follower in self._followers:
            await follower(revision, began)
        return readable

    def _replace(self, revision: int, records: Sequence[KeyRecord]) -> None:
        self._records = MappingProxyType({record.kid: record for record in records})
        self._revision = revision
        for listener in self._listeners:
            listener()

    async def follow(self, interval: float, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Poll every `interval` seconds until cancelled."""
        while True:
            await self.refresh()
            await sleep(interval)
