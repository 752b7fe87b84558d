"""What `mlxd db check` looks at, on a database that may be damaged or of any version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError, NoResultFound

from service.settings import StorageSettings
from service.storage import audit, engines
from service.storage.failures import Reason, StorageFailure, driver_words, failure_of
from service.storage.keys import all_keys
from service.storage.location import locate
from service.storage.migrations import require_current
from service.storage.revisions import revision
from service.storage.schema import METADATA


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at; `detail` says what was found, in words for the operator."""

    name: str
    ok: bool
    detail: str


def inspect(settings: StorageSettings, state_dir: Path, *, repair: bool = True) -> Sequence[Finding]:
    """Look at everything; `repair` as of `locate`.

    Raises StorageFailure when the database cannot be asked at all, and ConfigurationError.
    """
    location = locate(settings, state_dir, create=False, repair=repair)
    with engines.used(engines.reader(location, busy_timeout=settings.busy_timeout)) as reader:
        return [_finding(reader, name, look) for name, look in _LOOKS]


def _finding(reader: Engine, name: str, look: Callable[[Connection], str]) -> Finding:
    try:
        with reader.begin() as connection:
            return Finding(name=name, ok=True, detail=look(connection))
    except StorageFailure as failure:
        detail = failure.message
    except DBAPIError as error:
        failed = failure_of(error)
        if failed is not None and failed.reason is not Reason.DAMAGED:
            raise
        detail = driver_words(error)
    except (TypeError, ValueError, NoResultFound) as error:  # a value of a kind that we never write
        detail = f"cannot be read: {error}"
    return Finding(name=name, ok=False, detail=detail)


def _damaged(detail: str) -> StorageFailure:
    return StorageFailure(Reason.DAMAGED, detail)


def _file(connection: Connection) -> str:
    if connection.dialect.name != "sqlite":
        return "the server answers; it checks its pages itself"
    lines = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    if lines != ["ok"]:
        raise _damaged("; ".join(map(str, lines[:3])))
    return "every page is sound"


def _schema(connection: Connection) -> str:
    require_current(connection)
    missing = sorted(_missing(connection))
    if missing:
        raise _damaged(f"missing: {', '.join(missing)}")
    return "every table and column is there"


def _missing(connection: Connection) -> Iterator[str]:
    found = sa.inspect(connection)
    for table in METADATA.sorted_tables:
        if not found.has_table(table.name):
            yield table.name
            continue
        columns = {column["name"] for column in found.get_columns(table.name)}
        yield from (f"{table.name}.{column.name}" for column in table.c if column.name not in columns)


def _keys(connection: Connection) -> str:
    return f"{len(all_keys(connection))} keys, revision {revision(connection)}"


def _audit(connection: Connection) -> str:
    report = audit.verify(connection)
    if report.problem is not None:
        raise _damaged(f"entry {report.broken_seq} is {report.problem}, after {report.count} sound ones")
    return f"{report.count} entries, head {report.head or 'none'}"


_LOOKS: Sequence[tuple[str, Callable[[Connection], str]]] = (
    ("file", _file),
    ("schema", _schema),
    ("keys", _keys),
    ("audit", _audit),
)
