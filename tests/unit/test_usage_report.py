"""Reports: whole days, bounded, the same numbers in each form, and no formula for a spreadsheet."""

from __future__ import annotations

import asyncio
import csv
import io
from concurrent.futures import Future
from datetime import date
from typing import Any

import pytest

from service.errors import InvalidRequest, StorageUnavailable
from service.limits.usage_report import MAX_DAYS, MAX_SUMS, Span, UsageReport, UsageReports
from service.settings import StorageSettings
from service.storage import usage
from service.storage.database import Database
from service.storage.lane import Work
from service.storage.usage import DAY, By, UsageSum
from tests.usage_rows import NOON, row

TODAY = date(2027, 1, 15)
WEEK = Span(date(2027, 1, 9), TODAY)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (None, None, (date(2026, 12, 17), TODAY)),
        (date(2027, 1, 1), None, (date(2027, 1, 1), TODAY)),
        (None, date(2020, 1, 30), (date(2020, 1, 1), date(2020, 1, 30))),
        (TODAY, TODAY, (TODAY, TODAY)),
        (None, date(1, 1, 5), (date(1, 1, 1), date(1, 1, 5))),
        (None, date.max, (date(9999, 12, 2), date.max)),
        (date(2025, 12, 12), TODAY, (date(2025, 12, 12), TODAY)),
    ],
)
def test_a_span_is_what_was_asked_for_or_thirty_days(
    first: date | None, last: date | None, expected: tuple[date, date]
) -> None:
    span = Span.of(first, last, NOON)
    assert (span.first, span.last) == expected
    assert span.until - span.since == DAY * len(list(span.days()))


@pytest.mark.parametrize(("first", "last"), [(TODAY, date(2027, 1, 14)), (date(2025, 12, 11), TODAY)])
def test_a_span_is_neither_empty_nor_longer_than_is_read(first: date, last: date) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Span.of(first, last, NOON)
    assert caught.value.param == "from"


def test_a_span_has_its_days_and_their_bounds() -> None:
    span = Span(date(2027, 1, 14), TODAY)
    assert list(span.days()) == [("2027-01-14", NOON - 1.5 * DAY), ("2027-01-15", NOON - 0.5 * DAY)]
    assert (span.since, span.until) == (NOON - 1.5 * DAY, NOON + 0.5 * DAY)


def test_a_report_by_day_has_every_day_in_its_order() -> None:
    report = UsageReport.of(WEEK, "day", [UsageSum("2027-01-15", 1, 2, 1, 3), UsageSum("2027-01-10", 1, 5, 0, 5)])
    assert [each.name for each in report.sums] == [day for day, _ in WEEK.days()]
    assert [each.total_tokens for each in report.sums] == [0, 10, 0, 0, 0, 0, 5]


def test_other_reports_add_up_what_has_one_name_and_begin_with_who_used_most() -> None:
    found = [
        *(UsageSum("b", 1, 1), UsageSum("a", 1, 1), UsageSum(None, 3), UsageSum("c", 1, 5, 5, 5)),
        *(UsageSum("a", 1, 1, 1, 7), UsageSum("b", 9)),
    ]
    report = UsageReport.of(WEEK, "key", found)
    assert report.sums == [
        UsageSum("c", 1, 5, 5, 5),
        UsageSum("a", 2, 2, 1, 7),
        UsageSum("b", 10, 1),
        UsageSum(None, 3),
    ]
    assert report.total == UsageSum("total", 16, 8, 6, 12)


def test_more_sums_than_anybody_reads_are_refused() -> None:
    sums = [UsageSum(str(number), 1) for number in range(MAX_SUMS + 1)]
    assert len(UsageReport.of(WEEK, "tenant", sums[1:]).sums) == MAX_SUMS
    with pytest.raises(InvalidRequest) as caught:
        UsageReport.of(WEEK, "tenant", sums)
    assert caught.value.param == "by"


def test_json_has_the_sums_and_their_total() -> None:
    report = UsageReport.of(Span(TODAY, TODAY), "model", [UsageSum("m", 2, 30, 10, 5)])
    numbers = {"requests": 2, "prompt_tokens": 30, "cached_tokens": 10, "completion_tokens": 5, "total_tokens": 35}
    assert report.as_json() == {
        "object": "usage",
        "from": "2027-01-15",
        "to": "2027-01-15",
        "by": "model",
        "data": [{"model": "m", **numbers}],
        "total": numbers,
    }


HOSTILE = {
    "=1+1": "'=1+1",
    "+49 1": "'+49 1",
    "-2": "'-2",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=x": "'\t=x",
    "\r=x": "'\r=x",
    "\n=x": "'\n=x",
    "  =x": "'  =x",
    "＝1": "'＝1",  # noqa: RUF001
    'a"b,c;d': 'a"b,c;d',
    "corp:a-b=c@d": "corp:a-b=c@d",
    "two\nlines": "two\nlines",
}


def test_csv_reads_back_and_holds_no_formula() -> None:
    sums = [UsageSum(name, 1, 10 * (len(HOSTILE) - at), 1, 1) for at, name in enumerate(HOSTILE)]
    text = UsageReport.of(WEEK, "tenant", [*sums, UsageSum(None, 7)]).as_csv()
    header, *lines = csv.reader(io.StringIO(text, newline=""))
    assert header == ["tenant", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens"]
    assert [line[0] for line in lines] == [*HOSTILE.values(), ""]
    assert lines[0][1:] == ["1", "120", "1", "1", "121"]
    assert lines[-1] == ["", "7", "0", "0", "0", "0"]


async def test_reports_are_read_a_day_at_a_time_and_are_the_same(database: Database) -> None:
    rows = [row(n, at=NOON - DAY * (n % 10), key_id=f"k{n % 3}", principal=f"p{n % 2}") for n in range(40)]
    database.write(lambda connection: usage.append(connection, rows)).result()
    reports = UsageReports(database)

    def whole(by: By, **only: Any) -> UsageReport:
        found = database.read(
            lambda connection: usage.report(connection, since=WEEK.since, until=WEEK.until, by=by, **only)
        ).result()
        return UsageReport.of(WEEK, by, found)

    kinds: tuple[By, ...] = ("day", "key", "tenant", "model")
    for by in kinds:
        assert await reports.report(WEEK, by) == whole(by)
    assert (await reports.report(WEEK, "key", principal="p1")) == whole("key", principal="p1")
    assert (await reports.report(WEEK, "key", tenant="none")).sums == []
    assert (await reports.report(WEEK, "day")).total.requests == 28


class SlowStorage:
    """Notes how many readings wait at once; none comes to an end before `go`."""

    def __init__(self) -> None:
        self.waiting: list[Future[Any]] = []
        self.most = 0
        self.read_in_all = 0

    def read(self, work: Work[Any]) -> Future[Any]:
        self.waiting.append(Future())
        self.read_in_all += 1
        self.most = max(self.most, len(self.waiting))
        return self.waiting[-1]

    def write(self, work: Work[Any]) -> Future[Any]:
        raise AssertionError

    def go(self) -> None:
        for future in self.waiting:
            future.set_result([UsageSum("m", 1)])
        self.waiting.clear()


async def test_of_many_reports_one_day_is_asked_for_at_a_time() -> None:
    storage = SlowStorage()
    reports = UsageReports(storage)
    asked = [asyncio.create_task(reports.report(WEEK, "model")) for _ in range(3)]
    while not all(each.done() for each in asked):
        storage.go()
        await asyncio.sleep(0)
    assert (storage.most, storage.read_in_all) == (1, 21)
    assert [(await each).total.requests for each in asked] == [7, 7, 7]


async def test_a_report_that_takes_too_long_is_refused_and_so_are_those_behind_it() -> None:
    storage = SlowStorage()
    reports = UsageReports(storage, timeout=0.02)
    found = await asyncio.gather(*(reports.report(WEEK, "day") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(each, StorageUnavailable) for each in found)
    assert storage.read_in_all < 4


def test_a_report_may_cover_all_that_is_kept_unless_that_was_changed() -> None:
    assert StorageSettings().usage_days == MAX_DAYS
