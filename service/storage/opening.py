"""A database that may not be there yet: a server that boots later, a disk that is full, another process's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from service.storage.database import Database
from service.storage.failures import Reason, StorageFailure
from service.storage.lane import T, Work


class Storage(Protocol):
    """What a `Database` does for those who neither open nor close it."""

    def read(self, work: Work[T]) -> Future[T]:
        """See `Database.read`."""

    def write(self, work: Work[T]) -> Future[T]:
        """See `Database.write`."""


class OpeningDatabase:
    """A Storage that fails with StorageFailure until `open` has succeeded once. Any thread may call."""

    def __init__(self, connect: Callable[[], Database]) -> None:
        self._connect = connect
        self._database: Database | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._database is not None

    def open(self) -> Database:
        """The database, connected to when it was not yet. Blocks. Raises what `Database.open` raises."""
        with self._lock:
            if self._closed:
                raise StorageFailure(Reason.CLOSED)
            if self._database is None:
                self._database = self._connect()
            return self._database

    def read(self, work: Work[T]) -> Future[T]:
        return _not_yet() if self._database is None else self._database.read(work)

    def write(self, work: Work[T]) -> Future[T]:
        return _not_yet() if self._database is None else self._database.write(work)

    def close(self) -> None:
        """Do what waits, then disconnect. Blocks, also for an `open` in another thread. Idempotent."""
        with self._lock:
            self._closed = True
            if self._database is not None:
                self._database.close()


def _not_yet() -> Future[T]:
    future: Future[T] = Future()
    future.set_exception(StorageFailure(Reason.UNREACHABLE))
    return future
