"""A copy of a SQLite database while it is in use."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from service.errors import InvalidRequest
from service.settings import StorageSettings
from service.storage import engines
from service.storage.failures import Reason, StorageFailure, failure_of
from service.storage.location import locate


class BackupRefused(InvalidRequest):
    """There can be no such backup; the message says what to do instead."""

    code = "backup_refused"


def back_up(settings: StorageSettings, state_dir: Path, target: Path) -> None:
    """Copy the database, of whatever version, as it is at this moment into the new file `target` (0600).

    Writers go on meanwhile. The copy is checked as a whole, is on the disk when this returns, and is removed when
    anything goes wrong. Raises BackupRefused (never overwrites; PostgreSQL has its own tool) and StorageFailure.
    """
    location = locate(settings, state_dir, create=False)
    if location.file is None:
        raise BackupRefused("PostgreSQL is backed up with its own tool: pg_dump --format=custom --file=FILE DATABASE")
    reader = engines.reader(location, busy_timeout=settings.busy_timeout)
    with engines.used(reader), reader.begin() as connection:
        source = connection.connection.driver_connection
        assert isinstance(source, sqlite3.Connection)
        _new_file(source, target)


def _new_file(source: sqlite3.Connection, target: Path) -> None:
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise BackupRefused(f"{target} exists already; a backup never overwrites") from None
    except OSError as error:
        raise BackupRefused(f"{target} cannot be written: {error.strerror}") from None
    try:
        _copy(source, target)
    except sqlite3.Error as error:
        target.unlink()
        raise failure_of(error) or StorageFailure(Reason.UNREACHABLE) from error
    except StorageFailure:
        target.unlink()
        raise


def _copy(source: sqlite3.Connection, target: Path) -> None:
    with closing(sqlite3.connect(target)) as copy:
        copy.execute("PRAGMA synchronous = FULL")
        copy.execute("PRAGMA fullfsync = ON")
        source.backup(copy)
        findings = [line for (line,) in copy.execute("PRAGMA integrity_check") if line != "ok"]
        if findings:
            raise StorageFailure(Reason.DAMAGED, f"The copy is damaged: {findings[0]}")
    handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
