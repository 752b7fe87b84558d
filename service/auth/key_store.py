"""The database as the key ring sees it. Belongs to the event loop's thread; the work is done on storage's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from service.storage import keys
from service.storage.keys import KeyRecord
from service.storage.opening import Storage


class DatabaseKeyStore:
    """A KeyStore, and the `touch` of LastUsed. All raise StorageUnavailable."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    async def revision(self) -> int:
        return await asyncio.wrap_future(self._storage.read(keys.revision))

    async def all_keys(self) -> Sequence[KeyRecord]:
        return await asyncio.wrap_future(self._storage.read(keys.all_keys))

    async def touch(self, used: Mapping[str, float]) -> None:
        await asyncio.wrap_future(self._storage.write(lambda connection: keys.touch(connection, used)))
