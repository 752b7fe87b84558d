"""API keys at rest. Functions over a connection of `Database.read` or `Database.write`.

Every change but `touch` moves the revision, so a running service sees it with its next poll.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from service.errors import InvalidRequest
from service.storage.revisions import bump, revision
from service.storage.schema import KEYS

__all__ = [
    "KeyChanges",
    "KeyExists",
    "KeyRecord",
    "all_keys",
    "find",
    "insert",
    "revision",
    "revoke",
    "touch",
    "update",
]


class KeyExists(InvalidRequest):
    code = "key_exists"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """One row. Times are seconds since the epoch, None where the event has no date.

    `models` and `networks` (CIDR) None mean all of them. `hash` is what the key's secret hashes to with the pepper
    `pepper_version`; it is never in `repr`. `rotated_to` is the kid of the key that replaces this one.
    """

    kid: str
    principal: str
    name: str
    tenant: str
    scopes: frozenset[str]
    plan: str
    hash: bytes = field(repr=False)
    pepper_version: int
    created_at: float
    models: frozenset[str] | None = None
    networks: tuple[str, ...] | None = None
    limits: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    not_before: float | None = None
    expires_at: float | None = None
    revoked_at: float | None = None
    last_used_at: float | None = None
    rotated_to: str | None = None


class KeyChanges(TypedDict, total=False):
    """What may change of a key; the kid, the principal and the date of birth do not."""

    name: str
    tenant: str
    scopes: frozenset[str]
    plan: str
    hash: bytes
    pepper_version: int
    models: frozenset[str] | None
    networks: tuple[str, ...] | None
    limits: Mapping[str, int]
    not_before: float | None
    expires_at: float | None
    rotated_to: str | None


def all_keys(connection: Connection) -> Sequence[KeyRecord]:
    """Every key, revoked and expired ones too, oldest first."""
    return [_record(row) for row in connection.execute(KEYS.select().order_by(KEYS.c.created_at, KEYS.c.kid))]


def find(connection: Connection, kid: str) -> KeyRecord | None:
    """The key of this id, in whatever state it is."""
    row = connection.execute(KEYS.select().where(KEYS.c.kid == kid)).one_or_none()
    return None if row is None else _record(row)


def insert(connection: Connection, record: KeyRecord) -> None:
    """Raises KeyExists when the kid is taken; the transaction is of no more use then."""
    values = {column.name: _plain(getattr(record, column.name)) for column in KEYS.c}
    try:
        connection.execute(KEYS.insert(), values)
    except IntegrityError:
        raise KeyExists("There is a key of this id already.", param="kid") from None
    bump(connection)


def update(connection: Connection, kid: str, **changes: Unpack[KeyChanges]) -> bool:
    """Change single fields; False when there is no such key."""
    values = {name: _plain(value) for name, value in changes.items()}
    return _change(connection, KEYS.update().where(KEYS.c.kid == kid).values(values))


def revoke(connection: Connection, kid: str, at: float) -> bool:
    """Revoke for good; False when there is no such key or it is revoked already (the first time stands)."""
    alive = (KEYS.c.kid == kid) & KEYS.c.revoked_at.is_(None)
    return _change(connection, KEYS.update().where(alive).values(revoked_at=at))


def touch(connection: Connection, used: Mapping[str, float]) -> None:
    """Note when keys (by kid) were last used, many at once; never backwards, and without moving the revision."""
    if not used:
        return
    kid, at = sa.bindparam("used_kid", type_=sa.Text), sa.bindparam("used_at", type_=sa.DOUBLE_PRECISION)
    older = sa.or_(KEYS.c.last_used_at.is_(None), KEYS.c.last_used_at < at)
    statement = KEYS.update().where(KEYS.c.kid == kid, older).values(last_used_at=at)
    # In one order: two processes that touch the same keys must not wait for each other's rows.
    connection.execute(statement, [{"used_kid": each, "used_at": used[each]} for each in sorted(used)])


def _change(connection: Connection, statement: sa.Update) -> bool:
    changed = connection.execute(statement).rowcount > 0
    if changed:
        bump(connection)
    return changed


def _plain(value: object) -> object:
    """As JSON has it. Sets are sorted, so that equal keys are equal rows."""
    match value:
        case frozenset():
            return sorted(value)
        case tuple():
            return list(value)
        case Mapping():
            return dict(value)
        case _:
            return value


def _record(row: sa.Row[Any]) -> KeyRecord:
    values = dict(row._mapping)  # noqa: SLF001 - public, by SQLAlchemy's documentation
    models, networks = values["models"], values["networks"]
    values["scopes"] = frozenset(values["scopes"])
    values["models"] = None if models is None else frozenset(models)
    values["networks"] = None if networks is None else tuple(networks)
    values["limits"] = MappingProxyType(values["limits"])
    return KeyRecord(**values)
