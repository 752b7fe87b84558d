"""Reports of usage: sums over days of UTC, as JSON, as CSV, and for the terminal."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Self

from service.errors import InvalidRequest, StorageUnavailable
from service.storage import usage
from service.storage.opening import Storage
from service.storage.usage import DAY, By, UsageSum

MAX_DAYS = 400
DEFAULT_DAYS = 30

MAX_SUMS = 10_000
"""Keys, tenants or models in one report."""

TIMEOUT = 30.0
"""Seconds that a report may take, the wait for others included."""

_EPOCH = 719_163
"""`date(1970, 1, 1).toordinal()`."""

_NUMBERS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - as Excel reads them


@dataclass(frozen=True, slots=True)
class Span:
    """Days of UTC, `first` and `last` included. Raises InvalidRequest for none, and for more than MAX_DAYS."""

    first: date
    last: date

    def __post_init__(self) -> None:
        if self.last < self.first:
            raise InvalidRequest("`from` is later than `to`.", param="from")
        if (self.last - self.first).days >= MAX_DAYS:
            raise InvalidRequest(f"A report covers {MAX_DAYS} days at most.", param="from")

    @classmethod
    def of(cls, first: date | None, last: date | None, now: float) -> Self:
        """What was asked for; without `last` up to the day of `now`, without `first` DEFAULT_DAYS up to `last`."""
        last = last or datetime.fromtimestamp(now, UTC).date()
        try:
            return cls(first or last - timedelta(days=DEFAULT_DAYS - 1), last)
        except OverflowError:  # of the year 1
            return cls(date.min, last)

    @property
    def since(self) -> float:
        """Seconds since the epoch at which the first day begins."""
        return float((self.first.toordinal() - _EPOCH) * DAY)

    @property
    def until(self) -> float:
        """Seconds since the epoch at which the last day is over."""
        return float((self.last.toordinal() - _EPOCH + 1) * DAY)

    def days(self) -> Iterator[tuple[str, float]]:
        """Each day, as ISO writes it, and when it begins."""
        for number in range((self.last - self.first).days + 1):
            yield (self.first + timedelta(days=number)).isoformat(), self.since + number * DAY


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Sums by `by`: every day of the span in its order, or who used most first."""

    span: Span
    by: By
    sums: Sequence[UsageSum]

    @classmethod
    def of(cls, span: Span, by: By, found: Iterable[UsageSum]) -> Self:
        """Sums of one name are added up. Raises InvalidRequest for more than MAX_SUMS."""
        days = [day for day, _ in span.days()] if by == "day" else []
        merged: dict[str | None, UsageSum] = {day: UsageSum(day) for day in days}
        for each in found:
            merged[each.name] = merged.get(each.name, UsageSum(each.name)) + each
            if len(merged) > MAX_SUMS:
                raise InvalidRequest(f"That is more than {MAX_SUMS} sums; ask for fewer days.", param="by")
        sums = list(merged.values())
        if by != "day":
            sums.sort(key=lambda each: (-each.total_tokens, -each.requests, each.name or ""))
        return cls(span, by, sums)

    @property
    def total(self) -> UsageSum:
        return sum(self.sums, UsageSum("total"))

    def as_json(self) -> dict[str, Any]:
        """For programs; `data` holds the sums."""
        return {
            "object": "usage",
            "from": self.span.first.isoformat(),
            "to": self.span.last.isoformat(),
            "by": self.by,
            "data": [{self.by: each.name, **_numbers(each)} for each in self.sums],
            "total": _numbers(self.total),
        }

    def as_csv(self) -> str:
        """RFC 4180, with a header. A name that a spreadsheet would take for a formula begins with an apostrophe."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow((self.by, *_NUMBERS))
        for each in self.sums:
            writer.writerow((_harmless(each.name or ""), *_numbers(each).values()))
        return text.getvalue()


class UsageReports:
    """Reads reports from storage, for the event loop's thread.

    A day at a time and one report at a time, so that what else is read (keys, above all) waits for one day's rows at
    most. A report is therefore not of one moment: what ends while it is read may be in it or not.
    """

    def __init__(self, storage: Storage, *, timeout: float = TIMEOUT) -> None:
        self._storage = storage
        self._timeout = timeout
        self._turn = asyncio.Lock()

    async def report(
        self, span: Span, by: By, *, principal: str | None = None, tenant: str | None = None
    ) -> UsageReport:
        """Usage of everybody, or of one principal or tenant. Raises InvalidRequest and StorageUnavailable."""
        found: list[UsageSum] = []
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                for _, begins in span.days():
                    found += await self._day(begins, by, principal, tenant)
        except TimeoutError:
            raise StorageUnavailable("The report takes too long; ask for fewer days.", retry_after=1.0) from None
        return UsageReport.of(span, by, found)

    async def _day(self, begins: float, by: By, principal: str | None, tenant: str | None) -> Sequence[UsageSum]:
        asked = self._storage.read(
            lambda connection: usage.report(
                connection,
                since=begins,
                until=begins + DAY,
                by=by,
                principal=principal,
                tenant=tenant,
                limit=MAX_SUMS + 1,
            )
        )
        return await asyncio.wrap_future(asked)


def _numbers(each: UsageSum) -> dict[str, int]:
    return {name: getattr(each, name) for name in _NUMBERS}


def _harmless(name: str) -> str:
    """See CWE-1236."""
    return f"'{name}" if name.lstrip(" ").startswith(_FORMULA) else name
