"""How a database gets to the tables of `schema.py`: numbered steps, each once, each in a transaction, never back.

A step is frozen once it was released: it says what the tables were then, in SQL of both databases (`{bytes}` is
the one type whose name differs). To change the tables, change `schema.py` and add a step at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

import sqlalchemy as sa
from sqlalchemy import Connection, Engine

from service.observability.logging import get_logger
from service.storage.failures import Reason, StorageFailure
from service.storage.schema import SCHEMA_VERSION

log = get_logger(__name__)

Migration = Sequence[str]

_CREDENTIALS_AND_AUDIT = (
    """
    CREATE TABLE keys (
        kid TEXT NOT NULL PRIMARY KEY,
        principal TEXT NOT NULL,
        name TEXT NOT NULL,
        tenant TEXT NOT NULL,
        scopes JSON NOT NULL,
        plan TEXT NOT NULL,
        models JSON,
        networks JSON,
        limits JSON NOT NULL,
        hash {bytes} NOT NULL,
        pepper_version INTEGER NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        not_before DOUBLE PRECISION,
        expires_at DOUBLE PRECISION,
        revoked_at DOUBLE PRECISION,
        last_used_at DOUBLE PRECISION,
        rotated_to TEXT
    )
    """,
    """
    CREATE TABLE denied (
        issuer TEXT NOT NULL,
        kind TEXT NOT NULL,
        value TEXT NOT NULL,
        expires_at DOUBLE PRECISION NOT NULL,
        created_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (issuer, kind, value)
    )
    """,
    """
    CREATE TABLE audit (
        seq BIGINT NOT NULL PRIMARY KEY,
        at DOUBLE PRECISION NOT NULL,
        event TEXT NOT NULL,
        actor TEXT NOT NULL,
        detail TEXT NOT NULL,
        previous_hash {bytes} NOT NULL,
        hash {bytes} NOT NULL
    )
    """,
    "CREATE TABLE revisions (name TEXT NOT NULL PRIMARY KEY, value BIGINT NOT NULL)",
    "INSERT INTO revisions (name, value) VALUES ('credentials', 0)",
)

_USAGE = (
    """
    CREATE TABLE usage (
        id TEXT NOT NULL PRIMARY KEY,
        at DOUBLE PRECISION NOT NULL,
        request_id TEXT NOT NULL,
        principal TEXT NOT NULL,
        tenant TEXT NOT NULL,
        key_id TEXT,
        model TEXT NOT NULL,
        endpoint TEXT NOT NULL,
        stream BOOLEAN NOT NULL,
        rows INTEGER NOT NULL,
        prompt_tokens BIGINT NOT NULL,
        cached_tokens BIGINT NOT NULL,
        completion_tokens BIGINT NOT NULL,
        queue_seconds DOUBLE PRECISION,
        time_to_first_token DOUBLE PRECISION,
        duration_seconds DOUBLE PRECISION NOT NULL,
        finish_reason TEXT NOT NULL
    )
    """,
    "CREATE INDEX usage_at ON usage (at)",
    "CREATE INDEX usage_principal_at ON usage (principal, at, prompt_tokens, completion_tokens)",
)

MIGRATIONS: Sequence[Migration] = (_CREDENTIALS_AND_AUDIT, _USAGE)
"""Step 1 is the first. A table of its own in the next step costs nothing here."""

_TYPES = MappingProxyType({"sqlite": "BLOB", "postgresql": "BYTEA"})


def version(connection: Connection) -> int:
    """The number of the last step that was made, 0 for an empty database."""
    if not sa.inspect(connection).has_table(SCHEMA_VERSION.name):
        return 0
    return connection.execute(sa.select(sa.func.max(SCHEMA_VERSION.c.version))).scalar_one() or 0


def require_current(connection: Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Raises StorageFailure, saying what to do, for a database of another version than this program's."""
    found, wanted = version(connection), len(migrations)
    if found > wanted:
        raise StorageFailure(
            Reason.SCHEMA,
            f"The storage is of version {found}, newer than this mlxd, which knows {wanted}; "
            "use the newer mlxd, or a backup from before. There is no way back.",
        )
    if found < wanted:
        raise StorageFailure(
            Reason.SCHEMA, f"The storage is of version {found}, this mlxd needs {wanted}; run: mlxd db migrate"
        )


def migrate(
    engine: Engine, *, clock: Callable[[], float], migrations: Sequence[Migration] = MIGRATIONS
) -> Sequence[int]:
    """Make the steps that are missing; returns their numbers. `engine` is a writer's.

    The version is read under the writer's lock, so that of processes that start together each step is made by one.
    A step that fails leaves the database at the step before.
    """
    made: list[int] = []
    while True:
        with engine.begin() as connection:
            number = version(connection) + 1
            if number > len(migrations):
                require_current(connection, migrations)
                return made
            if number == 1:
                SCHEMA_VERSION.create(connection)
            for statement in migrations[number - 1]:
                connection.exec_driver_sql(statement.format(bytes=_TYPES[connection.dialect.name]))
            connection.execute(SCHEMA_VERSION.insert().values(version=number, applied_at=clock()))
        made.append(number)
        log.info("storage_migrated", version=number)
