"""The database as everybody else sees it: work in, a future out, never SQL on the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from sqlalchemy import Engine

from service.settings import StorageSettings
from service.storage import engines
from service.storage.failures import Reason, StorageFailure
from service.storage.lane import Lane, T, Work
from service.storage.location import Location, locate
from service.storage.migrations import migrate as make_steps, require_current
from service.storage.telemetry import Telemetry

QUEUE_DEPTH = 1024
"""Pieces of work that may wait for each of the two threads."""
MIGRATION_PATIENCE = 30.0
"""Seconds to wait for another process that migrates."""


class Database:
    """Two threads with a connection each: one writes, one reads and never waits for the other.

    Any thread may call. On the event loop wrap what `read` and `write` return with `asyncio.wrap_future`.
    """

    def __init__(
        self, location: Location, *, busy_timeout: float, telemetry: Telemetry, queue_depth: int = QUEUE_DEPTH
    ) -> None:
        """Starts the threads and looks at nothing; use `open`."""
        self.location = location
        reader = engines.reader(location, busy_timeout=busy_timeout)
        writer = engines.writer(location, busy_timeout=busy_timeout)
        self._reader = Lane("reader", reader, depth=queue_depth, telemetry=telemetry)
        self._writer = Lane("writer", writer, depth=queue_depth, telemetry=telemetry)

    @classmethod
    def open(
        cls,
        settings: StorageSettings,
        state_dir: Path,
        *,
        migrate: bool = False,
        clock: Callable[[], float] = time.time,
        telemetry: Telemetry | None = None,
    ) -> Self:
        """Connect to a database that is sound and of this program's version. Blocks, up to MIGRATION_PATIENCE.

        With `migrate` a database is made where there is none (SQLite), and brought to this version.
        Raises StorageFailure when it cannot be reached or used, ConfigurationError when the settings are wrong or
        the file is not ours alone.
        """
        if migrate:
            upgrade(settings, state_dir, clock=clock)
        location = locate(settings, state_dir, create=False)
        with engines.used(engines.reader(location, busy_timeout=settings.busy_timeout)) as reader:
            _check(reader)
        return cls(location, busy_timeout=settings.busy_timeout, telemetry=telemetry or Telemetry())

    def read(self, work: Work[T]) -> Future[T]:
        """Have `work` done in a transaction that sees one moment of the database and cannot write.

        The future fails with StorageFailure (a StorageUnavailable) when storage cannot be asked, and with what `work`
        raised otherwise. A future that is cancelled before its turn is not done. Never blocks, never raises; how
        long the future takes is up to the work before it and, with PostgreSQL, the network: await it with a timeout.
        """
        return self._reader.submit(work)

    def write(self, work: Work[T]) -> Future[T]:
        """Have `work` done in the only writing transaction of its time, over all processes.

        All of it or nothing; when the future resolves it is on the disk. Otherwise as `read`. When the connection
        breaks while a transaction is being committed (PostgreSQL only), it may have been committed all the same.
        """
        return self._writer.submit(work)

    def close(self) -> None:
        """Do what waits, then disconnect; what comes later fails. Idempotent. Blocks; not from within work."""
        self._writer.close()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def upgrade(settings: StorageSettings, state_dir: Path, *, clock: Callable[[], float] = time.time) -> Sequence[int]:
    """Make the database where there is none (SQLite), and the migrations that are missing; returns their numbers.

    Blocks, up to MIGRATION_PATIENCE for another process that does the same. Raises as `Database.open`.
    """
    location = locate(settings, state_dir, create=True)
    with engines.used(engines.writer(location, busy_timeout=MIGRATION_PATIENCE)) as writer:
        return make_steps(writer, clock=clock)


def _check(reader: Engine) -> None:
    with reader.begin() as connection:
        if connection.dialect.name == "sqlite":  # PostgreSQL checks its pages as it reads them
            first = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
            if first != "ok":
                raise StorageFailure(Reason.DAMAGED, f"The storage is damaged: {first}; see: mlxd db check")
        require_current(connection)
