"""SQLAlchemy engines of one connection each, with the same promises on both databases.

A writer's transaction is the only one at its time, over all processes: `BEGIN IMMEDIATE` on SQLite, an advisory
lock on PostgreSQL. It waits `busy_timeout` seconds for the one before, and is on the disk once committed. A
reader's transaction sees one moment of the database, cannot write, and waits for no writer.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, NoSuchModuleError

from service.observability.logging import get_logger
from service.settings import ConfigurationError
from service.storage.failures import driver_words, failure_of
from service.storage.location import Location

log = get_logger(__name__)

WRITER_LOCK = 0x6D6C7864
"""Key of PostgreSQL's advisory lock: `mlxd`."""
STATEMENT_TIMEOUT = 30.0
"""Seconds after which PostgreSQL gives up one statement."""


def writer(location: Location, *, busy_timeout: float) -> Engine:
    """Raises ConfigurationError where the driver is not installed; connects when first used."""
    if location.file is None:
        engine = _postgres(location, busy_timeout, isolation_level="READ COMMITTED")
        begin = f"SELECT pg_advisory_xact_lock({WRITER_LOCK})"
    else:
        engine = _sqlite(location, busy_timeout, query_only=False)
        begin = "BEGIN IMMEDIATE"
    _at_begin(engine, begin)
    return engine


def reader(location: Location, *, busy_timeout: float) -> Engine:
    """As `writer`."""
    if location.file is None:
        engine = _postgres(location, busy_timeout, isolation_level="REPEATABLE READ")
        return engine.execution_options(postgresql_readonly=True)
    engine = _sqlite(location, busy_timeout, query_only=True)
    _at_begin(engine, "BEGIN")
    return engine


@contextmanager
def used(engine: Engine) -> Iterator[Engine]:
    """Use an engine on this thread, with its driver's errors as StorageFailure, and disconnect."""
    try:
        yield engine
    except DBAPIError as error:
        failure = failure_of(error)
        if failure is None:
            raise
        log.warning("storage_failed", reason=failure.reason, error=driver_words(error))
        raise failure from error
    finally:
        engine.dispose()


def _at_begin(engine: Engine, statement: str) -> None:
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)

    event.listen(engine, "begin", begin)


def _sqlite(location: Location, busy_timeout: float, *, query_only: bool) -> Engine:
    pragmas = (
        "PRAGMA journal_mode = WAL",
        "PRAGMA synchronous = FULL",
        "PRAGMA fullfsync = ON",  # macOS: through the disk's own cache; nothing elsewhere
        "PRAGMA foreign_keys = ON",
        "PRAGMA trusted_schema = OFF",
        f"PRAGMA query_only = {'ON' if query_only else 'OFF'}",
    )

    def connected(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions begin where `_at_begin` says so, not where sqlite3 guesses
        for pragma in pragmas:
            connection.execute(pragma)

    arguments = {"timeout": busy_timeout, "check_same_thread": False}
    engine = _engine(location, arguments, pool_pre_ping=False)
    event.listen(engine, "connect", connected)
    return engine


def _postgres(location: Location, busy_timeout: float, *, isolation_level: str) -> Engine:
    milliseconds = math.ceil(busy_timeout * 1000)
    arguments = {
        "connect_timeout": max(2, math.ceil(busy_timeout)),  # libpq takes whole seconds, two at least
        "tcp_user_timeout": milliseconds + 1000,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "client_encoding": "utf8",
        "application_name": "mlxd",
        "options": f"-c lock_timeout={milliseconds} -c statement_timeout={math.ceil(STATEMENT_TIMEOUT * 1000)}",
    }
    # A server that was restarted is noticed before a transaction begins on its old connection.
    return _engine(location, arguments, pool_pre_ping=True, isolation_level=isolation_level)


def _engine(location: Location, arguments: dict[str, Any], **options: Any) -> Engine:
    try:
        return create_engine(
            location.url,
            connect_args=arguments,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,  # no hash and no name in an error's text
            **options,
        )
    except (ModuleNotFoundError, NoSuchModuleError):
        raise ConfigurationError("storage.url: PostgreSQL needs psycopg: pip install 'mlxd[postgres]'") from None
