"""Tokens and subjects that are refused although their signature is good, each until a time.

Functions over a connection of `Database.read` or `Database.write`; every change moves the revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from service.storage.revisions import bump
from service.storage.schema import DENIED

Kind = Literal["jti", "sub"]
"""The claim that a refused value is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """One refusal: the claim `kind` of `issuer`'s tokens with `value`, until `expires_at` (seconds since the epoch)."""

    issuer: str
    kind: Kind
    value: str
    expires_at: float
    created_at: float


def deny(connection: Connection, issuer: str, kind: Kind, value: str, expires_at: float, *, now: float) -> None:
    """Refuse from `now` on. Denied twice: the later end stands."""
    same = (DENIED.c.issuer == issuer) & (DENIED.c.kind == kind) & (DENIED.c.value == value)
    known = connection.scalar(sa.select(DENIED.c.expires_at).where(same))
    if known is None:
        row = {"issuer": issuer, "kind": kind, "value": value, "expires_at": expires_at, "created_at": now}
        connection.execute(DENIED.insert(), row)
    elif known < expires_at:
        connection.execute(DENIED.update().where(same).values(expires_at=expires_at))
    else:
        return
    bump(connection)


def all_denied(connection: Connection, now: float) -> Sequence[Denied]:
    """What is refused at `now`, in the order of its coming."""
    live = DENIED.select().where(DENIED.c.expires_at > now).order_by(DENIED.c.created_at, *DENIED.primary_key)
    return [
        Denied(
            issuer=row.issuer,
            kind=row.kind,
            value=row.value,
            expires_at=row.expires_at,
            created_at=row.created_at,
        )
        for row in connection.execute(live)
    ]


def prune(connection: Connection, now: float) -> int:
    """Forget what refuses nothing any more; returns how many."""
    gone = connection.execute(DENIED.delete().where(DENIED.c.expires_at <= now)).rowcount
    if gone:
        bump(connection)
    return gone
