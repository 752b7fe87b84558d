"""The ledger of usage, on both databases: each row once, sums by the days of UTC, and an end after so many days."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.settings import StorageSettings
from service.storage import usage
from service.storage.database import Database
from service.storage.failures import StorageFailure
from service.storage.schema import USAGE
from service.storage.usage import DAY, UsageRow, UsageSum
from tests.usage_rows import NOON, row

MIDNIGHT = NOON - DAY / 2
NEVER = row(
    1,
    key_id=None,
    stream=False,
    rows=8,
    prompt_tokens=0,
    cached_tokens=0,
    completion_tokens=0,
    queue_seconds=None,
    time_to_first_token=None,
    duration_seconds=1e-6,
    finish_reason="deadline_exceeded",
)


def append(database: Database, *new: UsageRow) -> None:
    database.write(partial(usage.append, rows=new)).result()


def stored(database: Database) -> list[UsageRow]:
    query = USAGE.select().order_by(USAGE.c.id)
    return database.read(lambda connection: [UsageRow(**each._mapping) for each in connection.execute(query)]).result()


def totals(database: Database, principal: str, since: float) -> int:
    return database.read(partial(usage.totals, principal=principal, since=since)).result()


def report(database: Database, **asked: Any) -> list[UsageSum]:
    asked = {"since": 0.0, "until": 4e9, "by": "day", **asked}
    found = database.read(lambda connection: usage.report(connection, **asked)).result()
    return sorted(found, key=lambda each: each.name or "")


def prune(database: Database, before: float, limit: int) -> int:
    return database.write(partial(usage.prune, before=before, limit=limit)).result()


def test_a_row_has_the_columns_of_the_table() -> None:
    assert [field.name for field in fields(UsageRow)] == USAGE.c.keys()


def test_rows_come_back_as_they_were_written(database: Database) -> None:
    hostile = row(2, principal="corp:Grüße'; DROP TABLE usage--", tenant="=1+1", prompt_tokens=2**40)
    append(database, row(), NEVER, hostile)
    assert stored(database) == [row(), NEVER, hostile]


def test_a_row_that_is_written_again_stays_as_it_was_first(database: Database) -> None:
    append(database, row(1), row(2))
    append(database, row(0), replace(row(1), prompt_tokens=999), row(2), row(3))
    append(database)
    assert stored(database) == [row(number) for number in range(4)]


def test_of_a_batch_that_cannot_be_written_nothing_is(database: Database) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        append(database, row(1), replace(row(2), model=None))  # type: ignore[arg-type]  # what no caller may do
    assert stored(database) == []


def test_totals_count_prompt_and_output_of_one_principal_from_a_time_on(database: Database) -> None:
    append(database, row(1, at=MIDNIGHT - 0.001), row(2, at=MIDNIGHT), row(3), row(4, principal="key:k2"))
    assert totals(database, "key:k1", MIDNIGHT) == 30
    assert totals(database, "key:k1", 0.0) == 45
    assert totals(database, "key:k2", MIDNIGHT) == 15
    assert totals(database, "key:k3", 0.0) == 0
    assert totals(database, "key:k1", NOON + 1) == 0


def test_a_day_begins_at_midnight_utc(database: Database) -> None:
    times = (MIDNIGHT - DAY, MIDNIGHT - 0.001, MIDNIGHT, NOON, MIDNIGHT + DAY - 0.001, MIDNIGHT + DAY)
    append(database, *(row(number, at=at) for number, at in enumerate(times)))
    found = {each.name: each.requests for each in report(database)}
    assert found == {"2027-01-14": 2, "2027-01-15": 3, "2027-01-16": 1}


def test_a_report_begins_at_since_and_ends_before_until(database: Database) -> None:
    append(database, row(1, at=MIDNIGHT), row(2, at=MIDNIGHT + DAY))
    (only,) = report(database, since=MIDNIGHT, until=MIDNIGHT + DAY)
    assert only == UsageSum("2027-01-15", 1, 10, 4, 5)


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("key", [None, "k1", "k2"]),
        ("tenant", ["acme", "other"]),
        ("model", ["m", "org/model"]),
        ("day", ["2027-01-15"]),
    ],
)
def test_sums_are_by_what_was_asked(database: Database, by: str, names: list[str | None]) -> None:
    append(
        database,
        row(1),
        row(2, key_id="k2", completion_tokens=100),
        row(3, key_id=None, tenant="other", model="m"),
        row(4),
    )
    found = report(database, by=by)
    assert [each.name for each in found] == names
    assert sum(found, UsageSum("all")) == UsageSum("all", 4, 40, 16, 115)
    assert sum(each.total_tokens for each in found) == 155


def test_a_report_is_of_one_principal_or_tenant_when_asked(database: Database) -> None:
    append(database, row(1), row(2, principal="key:k2"), row(3, principal="key:k2", tenant="other"))
    assert [each.requests for each in report(database, principal="key:k2")] == [2]
    assert [each.requests for each in report(database, tenant="acme")] == [2]
    assert [each.requests for each in report(database, principal="key:k2", tenant="acme")] == [1]
    assert report(database, principal="' OR 1=1 --") == []


def test_a_report_has_no_more_sums_than_asked_for(database: Database) -> None:
    append(database, *(row(number, key_id=f"k{number}") for number in range(5)))
    assert len(report(database, by="key", limit=3)) == 3


def test_the_oldest_are_pruned_and_no_more_than_asked(database: Database) -> None:
    append(database, *(row(number, at=NOON + number) for number in range(10)))
    assert prune(database, NOON + 5, 3) == 3
    assert [each.at - NOON for each in stored(database)] == [3, 4, 5, 6, 7, 8, 9]
    assert prune(database, NOON + 5, 3) == 2
    assert prune(database, NOON + 5, 3) == 0
    assert len(stored(database)) == 5


def test_reading_cannot_write(database: Database) -> None:
    with pytest.raises((StorageFailure, sa.exc.DBAPIError)):
        database.read(partial(usage.append, rows=[row()])).result()
    assert stored(database) == []


def test_sqlite_sums_a_quota_from_an_index_alone(sqlite_url: str, tmp_path: Path) -> None:
    asked = "EXPLAIN QUERY PLAN SELECT sum(prompt_tokens + completion_tokens) FROM usage WHERE principal=? AND at>=?"
    with Database.open(StorageSettings(url=sqlite_url), tmp_path, migrate=True) as database:
        plan = database.read(lambda connection: connection.exec_driver_sql(asked, ("key:k1", 0.0)).all()).result()
    assert "COVERING INDEX usage_principal_at (principal=? AND at>?)" in str(plan)
