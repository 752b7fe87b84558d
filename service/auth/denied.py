"""Tokens and subjects that an operator has denied, in memory. Belongs to the event loop's thread.

By `jti` or by subject, never by a token's text: with ECDSA anybody can write the same token in a second way.
Kept equal to the store by its revision, which counts keys and denials alike: who polls it for the keys tells it here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

from service.auth.claims import Identity
from service.errors import StorageUnavailable
from service.observability.logging import get_logger
from service.storage import audit, denied
from service.storage.connection import Connection
from service.storage.denied import Denied, Kind

log = get_logger(__name__)

TIMEOUT = 2.0
"""Seconds after which a store that does not answer counts as unreadable."""


class DenialStore(Protocol):
    """What the deny-list needs of the store. Both raise StorageUnavailable when it cannot be read."""

    async def revision(self) -> int:
        """A number that differs after each change."""

    async def all_denied(self, now: float) -> Iterable[Denied]:
        """Those that have not expired."""


def deny(connection: Connection, identity: Identity, *, lasting: float, actor: str, now: float) -> None:
    """Deny one token, or where `token_id` is None every token of the subject, for `lasting` seconds from `now`.

    One piece of work for `Database.write`; the audit log's entry is in the same transaction.
    """
    kind: Kind = "sub" if identity.token_id is None else "jti"
    value = identity.subject if identity.token_id is None else identity.token_id
    denied.deny(connection, identity.issuer, kind, value, now + lasting, now=now)
    detail: dict[str, str | float] = {"issuer": identity.issuer, kind: value, "until": now + lasting}
    audit.append(connection, "token_denied", actor=actor, at=now, detail=detail)


class DenyList:
    """The denials as of the last successful poll, gone by for at most `stale_for` seconds.

    `now` is Unix time, `clock` monotonic seconds.
    """

    def __init__(
        self,
        store: DenialStore,
        *,
        stale_for: float,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = TIMEOUT,
    ) -> None:
        self._store = store
        self._stale_for = stale_for
        self._now = now
        self._clock = clock
        self._timeout = timeout
        self._until: Mapping[tuple[str, str, str], float] = MappingProxyType({})
        self._revision: int | None = None
        self._fresh_at: float | None = None
        self._readable = True
        self._listeners: tuple[Callable[[], None], ...] = ()

    def check_readable(self) -> None:
        """Raise StorageUnavailable when the last successful poll is too long ago, or there was none."""
        if self._fresh_at is None or self._clock() - self._fresh_at > self._stale_for:
            raise StorageUnavailable("Tokens cannot be checked at the moment.")

    def denies(self, identity: Identity) -> bool:
        named = [(identity.issuer, "sub", identity.subject)]
        if identity.token_id is not None:
            named.append((identity.issuer, "jti", identity.token_id))
        now = self._now()
        return any(self._until.get(each, 0.0) > now for each in named)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` on the event loop after each change. It must not raise."""
        self._listeners = (*self._listeners, listener)

    async def refresh(self) -> bool:
        """Ask the store; False when it could not be read."""
        began = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                revision = await self._store.revision()
        except (StorageUnavailable, TimeoutError):
            return await self.up_to(None, began)
        return await self.up_to(revision, began)

    async def up_to(self, revision: int | None, began: float) -> bool:
        """Hold what the store had at `revision`, which was read after `began` (of `clock`; None: it could not be).

        Asked before the rows: a change in between is seen again at the next poll, never missed. False when what is
        held is older.
        """
        readable = revision is not None
        if revision is not None and revision != self._revision:
            try:
                async with asyncio.timeout(self._timeout):
                    self._replace(revision, await self._store.all_denied(self._now()))
            except (StorageUnavailable, TimeoutError):
                readable = False
        if readable:
            self._fresh_at = began
        self._say(readable=readable)
        return readable

    def _replace(self, revision: int, rows: Iterable[Denied]) -> None:
        self._until = MappingProxyType({(row.issuer, row.kind, row.value): row.expires_at for row in rows})
        self._revision = revision
        for listener in self._listeners:
            listener()

    def _say(self, *, readable: bool) -> None:
        if readable is not self._readable:
            self._readable = readable
            (log.info if readable else log.error)("deny_list_readable" if readable else "deny_list_unreadable")
