"""What requests have used: one row a request. Functions over a connection of `Database.read` or `Database.write`.

A row is written once and never changed; what is older than is kept is pruned. Days are of UTC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from service.storage.schema import USAGE

By = Literal["day", "key", "tenant", "model"]
"""What usage is summed by; a day as ISO writes it, a key as `key_id`."""

DAY = 86_400
_COLUMNS = MappingProxyType({"key": USAGE.c.key_id, "tenant": USAGE.c.tenant, "model": USAGE.c.model})


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """One request, `at` its end (seconds since the epoch). `id` is random: a row written twice is one.

    `rows` generations ran (`n`). `finish_reason` is `stop`, `length`, `cancelled`, or an error's code. Seconds are
    None for what has not happened: a request that never left the queue has no `queue_seconds`. Texts are printable.
    """

    id: str
    at: float
    request_id: str
    principal: str
    tenant: str
    key_id: str | None
    model: str
    endpoint: str
    stream: bool
    rows: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float | None
    time_to_first_token: float | None
    duration_seconds: float
    finish_reason: str


_FIELDS = tuple(field.name for field in fields(UsageRow))


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Requests and tokens of one day, key, tenant or model; `cached_tokens` are among the prompt's.

    `name` is None for requests without a key.
    """

    name: str | None
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: UsageSum) -> UsageSum:
        """Both together, under this one's name."""
        return UsageSum(
            self.name,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


def append(connection: Connection, rows: Sequence[UsageRow]) -> None:
    """Add rows; those whose id is there already are left as they are.

    So rows of a transaction whose fate is unknown (see `Database.write`) may be written again.
    """
    if not rows:
        return
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = insert(USAGE).on_conflict_do_nothing(index_elements=[USAGE.c.id])
    connection.execute(new, [{name: getattr(row, name) for name in _FIELDS} for row in rows])


def totals(connection: Connection, principal: str, since: float) -> int:
    """Tokens, of prompt and output together, that a principal's requests used that ended at `since` or later.

    Answered from an index alone.
    """
    tokens = sa.func.sum(USAGE.c.prompt_tokens + USAGE.c.completion_tokens)
    mine = (USAGE.c.principal == principal) & (USAGE.c.at >= since)
    return int(connection.execute(sa.select(tokens).where(mine)).scalar_one() or 0)


def report(
    connection: Connection,
    *,
    since: float,
    until: float,
    by: By,
    principal: str | None = None,
    tenant: str | None = None,
    limit: int | None = None,
) -> Sequence[UsageSum]:
    """Sums over requests that ended in [since, until), of everybody or of one principal or tenant, in no order.

    At most `limit` of them; reads every row of the time.
    """
    name = _day(connection) if by == "day" else _COLUMNS[by]
    tokens = (sa.func.sum(each) for each in (USAGE.c.prompt_tokens, USAGE.c.cached_tokens, USAGE.c.completion_tokens))
    query = sa.select(name, sa.func.count(), *tokens).where(USAGE.c.at >= since, USAGE.c.at < until).group_by(name)
    if principal is not None:
        query = query.where(USAGE.c.principal == principal)
    if tenant is not None:
        query = query.where(USAGE.c.tenant == tenant)
    return [_sum(by, *row) for row in connection.execute(query.limit(limit))]


def prune(connection: Connection, before: float, limit: int) -> int:
    """Forget requests that ended earlier than `before`, the oldest `limit` of them at most; returns how many."""
    oldest = sa.select(USAGE.c.id).where(USAGE.c.at < before).order_by(USAGE.c.at).limit(limit)
    return connection.execute(USAGE.delete().where(USAGE.c.id.in_(oldest))).rowcount


def _day(connection: Connection) -> sa.ColumnElement[int]:
    """Days since the epoch. A cast cuts on SQLite, which need not have `floor`, and rounds on PostgreSQL."""
    days = USAGE.c.at / float(DAY)
    return sa.cast(sa.func.floor(days) if connection.dialect.name == "postgresql" else days, sa.BigInteger)


def _sum(by: By, name: Any, *numbers: Any) -> UsageSum:
    """PostgreSQL sums whole numbers to decimals."""
    if by == "day":
        name = datetime.fromtimestamp(name * DAY, UTC).date().isoformat()
    return UsageSum(name, *map(int, numbers))
