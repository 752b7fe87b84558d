"""Counters that say that something has changed, for processes that keep a copy of it in memory.

A counter moves in the transaction that changes what it counts, so whoever sees its new value sees the change.
SQLite's `PRAGMA data_version` would do the same there; a row does it on both databases.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from service.storage.schema import REVISIONS

CREDENTIALS = "credentials"
"""Counts every change of keys and of denied tokens, except when a key was last used."""
_CREDENTIALS = REVISIONS.c.name == CREDENTIALS


def revision(connection: Connection) -> int:
    """How often credentials have changed. One row by its primary key: cheap enough to poll."""
    return int(connection.execute(sa.select(REVISIONS.c.value).where(_CREDENTIALS)).scalar_one())


def bump(connection: Connection) -> None:
    """Count one change of credentials, in the caller's transaction."""
    connection.execute(REVISIONS.update().where(_CREDENTIALS).values(value=REVISIONS.c.value + 1))
