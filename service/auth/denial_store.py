"""The database as the deny-list sees it. Belongs to the event loop's thread; the work is done on storage's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from service.storage import denied, revisions
from service.storage.denied import Denied
from service.storage.opening import Storage


class DatabaseDenialStore:
    """A DenialStore. Both raise StorageUnavailable."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def revision(self) -> int:
        return await asyncio.wrap_future(self._storage.read(revisions.revision))

    async def all_denied(self, now: float) -> Sequence[Denied]:
        return await asyncio.wrap_future(self._storage.read(lambda connection: denied.all_denied(connection, now)))
