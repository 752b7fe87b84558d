"""What a database can do to us, as typed errors with a reason from a closed set.

The sentences name neither the database nor what was asked of it, so they may reach a client. What the driver
said is for the log.
"""

from __future__ import annotations

import sqlite3
from enum import StrEnum
from types import MappingProxyType

from sqlalchemy.exc import DBAPIError, IntegrityError

from service.errors import StorageUnavailable

RETRY_AFTER = 1.0
"""Seconds after which to ask again: a lock has passed, a server may have come back."""


class Reason(StrEnum):
    """Why storage cannot be asked; the values are metric labels."""

    LOCKED = "locked"
    FULL = "full"
    READ_ONLY = "read_only"
    DAMAGED = "damaged"
    UNREACHABLE = "unreachable"
    QUEUE_FULL = "queue_full"
    CLOSED = "closed"
    SCHEMA = "schema"


SENTENCES = MappingProxyType(
    {
        Reason.LOCKED: "The storage is locked by another process.",
        Reason.FULL: "The storage's disk is full.",
        Reason.READ_ONLY: "The storage cannot be written.",
        Reason.DAMAGED: "The storage is damaged.",
        Reason.UNREACHABLE: "The storage cannot be reached.",
        Reason.QUEUE_FULL: "The storage has too much to do.",
        Reason.CLOSED: "The storage is closed.",
        Reason.SCHEMA: "The storage is of another version.",
    }
)


class StorageFailure(StorageUnavailable):
    """The one error of this package for what the caller cannot help. `reason` tells the cases apart."""

    def __init__(self, reason: Reason, message: str | None = None) -> None:
        super().__init__(message or SENTENCES[reason], retry_after=RETRY_AFTER)
        self.reason = reason


SQLITE_NAMES = MappingProxyType(
    {
        "SQLITE_BUSY": Reason.LOCKED,
        "SQLITE_LOCKED": Reason.LOCKED,
        "SQLITE_FULL": Reason.FULL,
        "SQLITE_READONLY": Reason.READ_ONLY,
        "SQLITE_CORRUPT": Reason.DAMAGED,
        "SQLITE_NOTADB": Reason.DAMAGED,
    }
)
"""Result codes without their extension; https://www.sqlite.org/rescode.html."""

POSTGRES_STATES = MappingProxyType(
    {
        "55P03": Reason.LOCKED,  # lock_not_available: lock_timeout
        "57014": Reason.LOCKED,  # query_canceled: statement_timeout
        "40": Reason.LOCKED,  # deadlock, serialisation
        "53100": Reason.FULL,
        "25006": Reason.READ_ONLY,  # a standby
        "42501": Reason.READ_ONLY,  # insufficient_privilege
        "XX": Reason.DAMAGED,
    }
)
"""States or their classes; https://www.postgresql.org/docs/current/errcodes-appendix.html."""

OURS = ("22", "23", "42")
"""Classes of states that say that the statement is wrong: a bug, not a failure of storage."""


def failure_of(error: BaseException) -> StorageFailure | None:
    """The failure that a driver's error means, or None for an error that is the caller's or ours.

    Takes SQLAlchemy's wrapped errors and `sqlite3`'s own.
    """
    if isinstance(error, IntegrityError):
        return None
    driver = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(driver, sqlite3.Error):
        # Without a code it is Python's own: a use that is wrong, or a text that is not UTF-8 any more.
        nameless = "SQLITE_CORRUPT" if isinstance(driver, sqlite3.OperationalError) else "SQLITE_MISUSE"
        return _of_sqlite(getattr(driver, "sqlite_errorname", nameless))
    return _of_postgres(getattr(driver, "sqlstate", None)) if isinstance(error, DBAPIError) else None


def driver_words(error: BaseException) -> str:
    """One line of what the driver said, for the log: without the statement, which SQLAlchemy adds."""
    return str(getattr(error, "orig", error)).partition("\n")[0]


def _of_sqlite(name: str) -> StorageFailure | None:
    code = "_".join(name.split("_")[:2])  # SQLITE_BUSY_SNAPSHOT is a SQLITE_BUSY
    if code in {"SQLITE_ERROR", "SQLITE_CONSTRAINT", "SQLITE_MISUSE", "SQLITE_RANGE", "SQLITE_MISMATCH"}:
        return None
    return StorageFailure(SQLITE_NAMES.get(code, Reason.UNREACHABLE))


def _of_postgres(state: str | None) -> StorageFailure | None:
    if state is None:  # the connection broke, or there was none
        return StorageFailure(Reason.UNREACHABLE)
    reason = POSTGRES_STATES.get(state) or POSTGRES_STATES.get(state[:2])
    if reason is None and state[:2] in OURS:
        return None
    return StorageFailure(reason or Reason.UNREACHABLE)
