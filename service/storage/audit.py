"""The audit log: append-only, each entry hashed together with the hash of the one before.

What the chain shows: an entry that was altered, removed from the beginning or the middle, or put elsewhere. What
it cannot show by itself: that the newest entries were cut off, or that somebody who may write the database
computed the whole chain anew from some entry on. Both are seen against a head that was remembered elsewhere:
keep what `head` returns, and give it to `verify`.

`append` belongs into a transaction of `Database.write`, alone or with the change that it is about; there is one
such transaction at a time, over all processes, so the chain never forks. Never put a secret into an entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy import Connection

from service.storage.schema import AUDIT

MAX_TEXT = 256
"""Characters of a text in an entry; what is longer is cut and ends with an ellipsis."""
MAX_ITEMS = 32
"""Fields of a detail, and items of a list in it."""
BEFORE_FIRST = b"\0" * 32

Value = str | int | float | bool | None | Sequence[str]


class Problem(StrEnum):
    """What is wrong with the first entry that does not fit."""

    ALTERED = "altered"
    MISSING = "missing"
    REORDERED = "reordered"
    TRUNCATED = "truncated"
    REWRITTEN = "rewritten"


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry: as text `SEQ:HASH`, to be written down elsewhere."""

    seq: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash.hex()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for anything but what `str` gives."""
        seq, _, digest = text.partition(":")
        head = cls(int(seq), bytes.fromhex(digest))
        if str(head) != text or head.seq < 1 or len(head.hash) != len(BEFORE_FIRST):
            raise ValueError("not a head: SEQ:HASH")
        return head


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row as it is stored; `detail` is JSON text, `at` seconds since the epoch."""

    seq: int
    at: float
    event: str
    actor: str
    detail: str
    previous_hash: bytes
    hash: bytes

    def digest(self) -> bytes:
        """What `hash` must be."""
        fields = [self.previous_hash.hex(), self.seq, self.at, self.event, self.actor, self.detail]
        canonical = json.dumps(fields, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode("ascii")).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """`count` entries were sound, the last of them `head`; then comes `broken_seq` with `problem`, or nothing."""

    count: int
    head: Head | None
    problem: Problem | None = None
    broken_seq: int | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


def append(
    connection: Connection, event: str, *, actor: str, at: float, detail: Mapping[str, Value] | None = None
) -> Head:
    """Add one entry; it is durable when the transaction is. Texts are cut at MAX_TEXT, unprintable characters escaped.

    Raises ValueError for numbers that JSON does not have.
    """
    newest = head(connection) or Head(0, BEFORE_FIRST)
    draft = Entry(
        seq=newest.seq + 1,
        at=float(at),
        event=_capped(event),
        actor=_capped(actor),
        detail=_detail(detail or {}),
        previous_hash=newest.hash,
        hash=b"",
    )
    digest = draft.digest()
    connection.execute(AUDIT.insert(), asdict(draft) | {"hash": digest})
    return Head(draft.seq, digest)


def head(connection: Connection) -> Head | None:
    """The newest entry, None for an empty log."""
    newest = sa.select(AUDIT.c.seq, AUDIT.c.hash).order_by(AUDIT.c.seq.desc()).limit(1)
    row = connection.execute(newest).one_or_none()
    return None if row is None else Head(row.seq, row.hash)


def entries(connection: Connection, *, limit: int, before: int | None = None) -> Sequence[Entry]:
    """The newest `limit` entries, newest first; with `before`, of those that are older than that seq."""
    query = AUDIT.select().order_by(AUDIT.c.seq.desc()).limit(limit)
    return [_entry(row) for row in connection.execute(query if before is None else query.where(AUDIT.c.seq < before))]


def verify(connection: Connection, *, expected_head: Head | None = None) -> AuditReport:
    """Read the whole log and compute its chain; memory does not grow with it. See the module for what it can show.

    With `expected_head`, remembered from before, also whether that entry is still there and still the same.
    """
    known, count = Head(0, BEFORE_FIRST), 0
    problem: Problem | None = None
    query = AUDIT.select().order_by(AUDIT.c.seq)
    try:
        with connection.execute(query, execution_options={"yield_per": 1000}) as rows:
            for row in rows:
                entry = _entry(row)
                problem = _problem(connection, entry, known) or _contradiction(entry, expected_head)
                if problem is not None:
                    break
                known, count = Head(entry.seq, entry.hash), count + 1
    except TypeError:  # SQLite keeps any type in any column: one that we never write
        problem = Problem.ALTERED
    if problem is None and expected_head is not None and expected_head.seq > known.seq:
        problem = Problem.TRUNCATED
    broken = None if problem is None else known.seq + 1
    return AuditReport(count=count, head=known if count else None, problem=problem, broken_seq=broken)


def _problem(connection: Connection, entry: Entry, previous: Head) -> Problem | None:
    """What is wrong with the entry that comes after `previous`."""
    if entry.seq != previous.seq + 1:
        return Problem.MISSING
    if entry.previous_hash == previous.hash:
        return None if entry.hash == entry.digest() else Problem.ALTERED
    elsewhere = sa.select(AUDIT.c.seq).where(AUDIT.c.hash == entry.previous_hash).limit(1)
    moved = entry.previous_hash == BEFORE_FIRST or connection.execute(elsewhere).first() is not None
    return Problem.REORDERED if moved else Problem.ALTERED


def _contradiction(entry: Entry, expected: Head | None) -> Problem | None:
    if expected is not None and entry.seq == expected.seq and entry.hash != expected.hash:
        return Problem.REWRITTEN
    return None


def _entry(row: sa.Row[Any]) -> Entry:
    return Entry(**row._mapping)  # noqa: SLF001 - public, by SQLAlchemy's documentation


def _detail(values: Mapping[str, Value]) -> str:
    kept = {_capped(name): _value(value) for name, value in list(values.items())[:MAX_ITEMS]}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _value(value: Value) -> Value:
    if isinstance(value, str):
        return _capped(value)
    if isinstance(value, Sequence):
        return [_capped(each) for each in value[:MAX_ITEMS]]
    return value


def _capped(text: str) -> str:
    """Printable, and short. PostgreSQL stores no NUL, UTF-8 no lone surrogate, and a terminal obeys escapes."""
    visible = (each if each.isprintable() else repr(each)[1:-1] for each in text[: MAX_TEXT + 1])
    whole = "".join(visible)
    return whole if len(whole) <= MAX_TEXT else whole[: MAX_TEXT - 1] + "…"
