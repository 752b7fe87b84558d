"""Quotas: exact over what was settled, agreed on by instances through the ledger, and never "unlimited" by failure."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from service.errors import QuotaExhausted, StorageUnavailable
from service.limits.quotas import FRESH_FOR, RETRY, STALE_FOR, QuotaHold, Quotas
from service.limits.usage_log import UsageLog
from service.settings import PlanSettings
from service.storage import usage
from service.storage.database import Database
from service.storage.usage import DAY, UsageRow
from tests.databases import OpenDatabase
from tests.usage_rows import NOON, row

HOUR = 3600.0
MIDNIGHT = NOON + 12 * HOUR
"""The end of NOON's day."""


def plan(*, day: int | str = "unlimited", month: int | str = "unlimited") -> PlanSettings:
    return PlanSettings.model_validate({"daily_tokens": day, "monthly_tokens": month})


PLAN = plan(day=100, month=1000)


def utc(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


class Desk:
    """Quotas over a scripted ledger, with clocks that the test sets."""

    def __init__(self, **more: Any) -> None:
        self.now = NOON
        self.clock = 50.0
        self.ledger: list[tuple[str, float, int]] = []
        self.asked: list[tuple[str, float]] = []
        self.broken = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.quotas = Quotas(self._totals, now=lambda: self.now, clock=lambda: self.clock, **more)

    async def _totals(self, principal: str, since: float) -> int:
        self.asked.append((principal, since))
        await self.gate.wait()
        if self.broken:
            raise StorageUnavailable("not now")
        return sum(tokens for who, at, tokens in self.ledger if who == principal and at >= since)

    def used(self, tokens: int, *, at: float | None = None, principal: str = "p") -> None:
        """What is in the ledger, whoever put it there."""
        self.ledger.append((principal, self.now if at is None else at, tokens))

    def passed(self, seconds: float) -> None:
        self.now += seconds
        self.clock += seconds

    async def reserve(self, tokens: int, *, plan: PlanSettings = PLAN, principal: str = "p") -> QuotaHold:
        return await self.quotas.reserve(principal, plan, tokens)

    async def refusal(self, tokens: int, *, plan: PlanSettings = PLAN) -> QuotaExhausted:
        with pytest.raises(QuotaExhausted) as caught:
            await self.reserve(tokens, plan=plan)
        return caught.value

    async def left(self, plan: PlanSettings = PLAN) -> int:
        """The most that could be reserved now; the quotas are as before."""
        fits = 0
        for tokens in itertools.count(1):
            try:
                hold = await self.reserve(tokens, plan=plan)
            except QuotaExhausted:
                return fits
            hold.settle(0)
            fits = tokens
        raise AssertionError


@pytest.fixture
async def desk() -> Desk:
    return Desk()


async def until_read() -> None:
    """Let a reading in the background come to its end."""
    for _ in range(10):
        await asyncio.sleep(0)


# -- what is held and charged ---------------------------------------------------------------------------------------


async def test_a_plan_without_quotas_never_asks_the_ledger(desk: Desk) -> None:
    desk.broken = True
    hold = await desk.reserve(2**52, plan=plan())
    assert (hold.settle(5), hold.settle(5), hold.settled) == (True, False, 5)
    assert (desk.asked, desk.quotas.accounts, desk.quotas.open) == ([], 0, 0)


async def test_the_first_request_reads_the_day_and_the_month_and_others_nothing(desk: Desk) -> None:
    desk.used(30)
    desk.used(500, at=utc("2027-01-14 23:59"))
    desk.used(900, at=utc("2026-12-31 23:59"))
    desk.used(900, principal="other")
    assert await desk.left() == 70
    assert await desk.left(plan(month=1000)) == 470
    assert desk.asked == [("p", utc("2027-01-15")), ("p", utc("2027-01-01"))]


async def test_what_was_reserved_is_held_and_what_was_not_used_comes_back(desk: Desk) -> None:
    hold = await desk.reserve(60)
    assert (desk.quotas.open, await desk.left()) == (1, 40)
    assert hold.settle(10)
    assert (desk.quotas.open, await desk.left()) == (0, 90)
    assert [hold.settle(0), hold.settle(60)] == [False, False]
    assert (hold.settled, await desk.left()) == (10, 90)


async def test_what_was_used_beyond_the_reservation_counts_too(desk: Desk) -> None:
    (await desk.reserve(10)).settle(105)
    assert (await desk.refusal(1)).should_retry is False


@pytest.mark.parametrize(("principal", "tokens"), [("", 1), ("p", 0), ("p", -1)])
async def test_a_reservation_is_for_somebody_and_something(desk: Desk, principal: str, tokens: int) -> None:
    with pytest.raises(ValueError, match="needs a principal and tokens"):
        await desk.reserve(tokens, principal=principal)
    hold = await desk.reserve(1)
    with pytest.raises(ValueError, match="negative"):
        hold.settle(-1)
    assert desk.quotas.open == 1


async def test_of_a_hundred_racers_ten_fit(desk: Desk) -> None:
    found = await asyncio.gather(*(desk.reserve(10) for _ in range(100)), return_exceptions=True)
    assert sum(isinstance(each, QuotaHold) for each in found) == 10
    assert len(desk.asked) == 2
    assert all(isinstance(each, QuotaHold | QuotaExhausted) for each in found)


# -- what is refused, and how ---------------------------------------------------------------------------------------


async def test_an_exhausted_day_says_whose_and_when_it_ends(desk: Desk) -> None:
    desk.used(95)
    refusal = await desk.refusal(6)
    assert (refusal.code, refusal.should_retry, refusal.retry_after) == ("quota_exhausted", False, 12 * HOUR)
    assert refusal.message == (
        "Your plan allows 100 tokens a day (UTC), until 2027-01-16T00:00:00Z; 95 are used, and this request may need 6."
    )
    (await desk.reserve(5)).settle(5)


async def test_an_exhausted_month_ends_with_the_month(desk: Desk) -> None:
    desk.used(995, at=utc("2027-01-03"))
    refusal = await desk.refusal(6)
    assert refusal.should_retry is False
    assert refusal.retry_after == utc("2027-02-01") - NOON
    assert "1000 tokens a month (UTC), until 2027-02-01T00:00:00Z; 995 are used" in refusal.message


async def test_of_two_exhausted_quotas_the_one_that_lasts_is_told(desk: Desk) -> None:
    desk.used(1000)
    refusal = await desk.refusal(1)
    assert refusal.retry_after == utc("2027-02-01") - NOON
    assert "a month" in refusal.message


async def test_what_only_the_callers_own_running_requests_hold_may_be_tried_again(desk: Desk) -> None:
    desk.used(20)
    hold = await desk.reserve(50)
    refusal = await desk.refusal(31)
    assert (refusal.code, refusal.should_retry, refusal.retry_after) == ("quota_exhausted", True, 1.0)
    assert "20 are used, 50 are held by your running requests, and this request may need 31." in refusal.message
    hold.settle(1)
    await desk.reserve(31)


async def test_a_request_larger_than_a_quota_is_refused_with_its_numbers(desk: Desk) -> None:
    refusal = await desk.refusal(101)
    assert refusal.should_retry is False
    assert "100 tokens a day" in refusal.message
    assert "may need 101" in refusal.message


# -- days and months ------------------------------------------------------------------------------------------------


async def test_a_new_day_begins_with_nothing_at_midnight_utc_and_the_month_goes_on(desk: Desk) -> None:
    (await desk.reserve(100)).settle(100)
    desk.now = MIDNIGHT - 0.001
    assert await desk.left() == 0
    desk.now = MIDNIGHT
    assert await desk.left() == 100
    assert await desk.left(plan(month=1000)) == 900
    assert len(desk.asked) == 2


async def test_a_new_month_begins_with_nothing(desk: Desk) -> None:
    monthly = plan(month=50)
    desk.now = utc("2028-02-29 23:59:59")
    (await desk.reserve(50, plan=monthly)).settle(50)
    assert (await desk.refusal(1, plan=monthly)).retry_after == 1.0
    desk.now += 1
    assert await desk.left(monthly) == 50


async def test_a_request_that_ends_after_midnight_is_charged_to_the_new_day(desk: Desk) -> None:
    hold = await desk.reserve(80)
    desk.now = MIDNIGHT + 5
    hold.settle(70)
    assert await desk.left() == 30


async def test_clocks_that_jump_block_nobody_and_forget_nothing_for_longer_than_a_reading(desk: Desk) -> None:
    desk.now = MIDNIGHT - 0.5 * HOUR
    (await desk.reserve(60)).settle(60)
    desk.used(60)
    desk.now += HOUR  # into the next day
    assert await desk.left() == 100
    desk.now -= HOUR  # and back: that day is not known any more, so it is read
    assert await desk.left() == 40
    desk.passed(HOUR)
    assert await desk.left() == 100


# -- the ledger is read again ---------------------------------------------------------------------------------------


async def test_what_other_instances_used_is_seen_after_half_a_minute_and_nobody_waits(desk: Desk) -> None:
    assert await desk.left() == 100
    desk.used(30)
    desk.passed(FRESH_FOR - 1)
    assert await desk.left() == 100
    desk.passed(1)
    desk.gate.clear()
    await desk.reserve(1)  # does not wait for the reading that it begins
    await until_read()
    assert len(desk.asked) == 3
    desk.gate.set()
    await until_read()
    assert await desk.left() == 69
    assert len(desk.asked) == 4


async def test_after_a_while_without_requests_the_next_one_waits_for_the_ledger(desk: Desk) -> None:
    assert await desk.left() == 100
    desk.used(99)
    desk.passed(STALE_FOR)
    assert await desk.left() == 1


async def test_what_is_settled_and_not_yet_written_is_neither_lost_nor_counted_twice(desk: Desk) -> None:
    desk.used(10)
    (await desk.reserve(20)).settle(20)  # not in the ledger yet
    desk.passed(STALE_FOR)
    assert await desk.left() == 70
    desk.used(20)  # now it is
    desk.passed(STALE_FOR)
    assert await desk.left() == 70
    (await desk.reserve(5)).settle(5)
    assert await desk.left() == 65


async def test_instances_over_one_database_agree(open_database: OpenDatabase) -> None:
    """Each writes through its own log; after both have written and read, both know all of it."""
    clock = 0.0
    ids = itertools.count()
    instances = []
    for _ in range(2):
        database = open_database(busy_timeout=30.0)
        log = UsageLog(partial(write, database), on_lost=lambda _: None)
        instances.append((Quotas(partial(totals, database), now=lambda: NOON, clock=lambda: clock), log))
    limits = plan(day=1_000_000)
    rng = random.Random(5)
    used = 0
    for number in range(40):
        quotas, log = instances[number % 2]
        tokens = rng.randrange(2, 20_000)
        (await quotas.reserve("p", limits, 20_000)).settle(tokens)
        used += tokens
        log.note(row(next(ids), principal="p", prompt_tokens=1, completion_tokens=tokens - 1))
        if rng.random() < 0.3:
            await log.flush()
        clock += 10
    for _, log in instances:
        await log.flush()
    # A reading that is under way would be as old as the clock before its leap.
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "quota"))
    clock += STALE_FOR
    for quotas, _ in instances:
        (await quotas.reserve("p", limits, 1_000_000 - used)).settle(0)
        with pytest.raises(QuotaExhausted, match=f"{used} are used"):
            await quotas.reserve("p", limits, 1_000_000 - used + 1)


async def write(database: Database, rows: Sequence[UsageRow]) -> None:
    await asyncio.wrap_future(database.write(lambda connection: usage.append(connection, rows)))


async def totals(database: Database, principal: str, since: float) -> int:
    return await asyncio.wrap_future(database.read(lambda connection: usage.totals(connection, principal, since)))


async def test_a_restart_goes_on_where_the_ledger_ended(open_database: OpenDatabase) -> None:
    limits = plan(day=100, month=100)
    database = open_database()
    await write(database, [row(1, principal="p", at=NOON - DAY), row(2, principal="p")])
    quotas = Quotas(partial(totals, database), now=lambda: NOON)
    with pytest.raises(QuotaExhausted, match=r"a month .* 30 are used"):
        await quotas.reserve("p", limits, 71)
    await quotas.reserve("p", limits, 70)


# -- a ledger that cannot be read -----------------------------------------------------------------------------------


async def test_a_quota_that_cannot_be_told_is_never_unlimited(desk: Desk) -> None:
    desk.broken = True
    for _ in range(3):
        with pytest.raises(StorageUnavailable) as caught:
            await desk.reserve(1)
        assert caught.value.retry_after == RETRY
    assert len(desk.asked) == 1  # not once for each request
    desk.passed(RETRY)
    desk.broken = False
    await desk.reserve(1)


async def test_what_was_read_holds_for_a_minute_of_failures_and_no_longer(desk: Desk) -> None:
    desk.used(40)
    (await desk.reserve(10)).settle(10)
    desk.broken = True
    desk.passed(STALE_FOR - 1)
    assert await desk.left() == 50
    await until_read()
    desk.passed(1)
    with pytest.raises(StorageUnavailable):
        await desk.reserve(1)
    desk.broken = False
    desk.passed(RETRY)
    assert await desk.left() == 50


async def test_a_ledger_that_says_nothing_is_one_that_cannot_be_read() -> None:
    desk = Desk(timeout=0.01)
    desk.gate.clear()
    with pytest.raises(StorageUnavailable):
        await desk.reserve(1)


async def test_a_request_that_leaves_does_not_end_the_reading_that_others_wait_for(desk: Desk) -> None:
    desk.gate.clear()
    first, second = asyncio.create_task(desk.reserve(1)), asyncio.create_task(desk.reserve(1))
    await until_read()
    first.cancel()
    await until_read()
    desk.gate.set()
    assert (await second).settle(1)
    assert first.cancelled()
    assert (len(desk.asked), desk.quotas.open) == (2, 0)


async def test_a_reading_that_midnight_overtook_counts_for_nothing(desk: Desk) -> None:
    desk.used(100)
    desk.gate.clear()
    waiting = asyncio.create_task(desk.reserve(1))
    await until_read()
    desk.now = MIDNIGHT
    another = asyncio.create_task(desk.reserve(1))
    await until_read()
    desk.gate.set()
    for each in (waiting, another):
        with pytest.raises(StorageUnavailable):
            await each
    assert await desk.left() == 100


# -- bounded --------------------------------------------------------------------------------------------------------


async def test_principals_that_asked_longest_ago_are_forgotten_unless_they_hold_something() -> None:
    desk = Desk(max_accounts=20)
    holds = [await desk.reserve(1, principal=f"busy{number}") for number in range(3)]
    for number in range(500):
        (await desk.reserve(50, principal=f"p{number}")).settle(50)
        desk.used(50, principal=f"p{number}")
    assert (desk.quotas.accounts, desk.quotas.open) == (20, 3)
    for hold in holds:
        hold.settle(1)
    before = len(desk.asked)
    with pytest.raises(QuotaExhausted, match="50 are used"):  # forgotten, and read again
        await desk.reserve(51, principal="p0")
    assert len(desk.asked) == before + 2
    await desk.reserve(1, principal="another")
    assert desk.quotas.accounts == 20


async def test_random_requests_never_use_more_than_the_quota_and_are_charged_exactly(desk: Desk) -> None:
    rng = random.Random(11)
    limits, used = plan(day=5000, month=5000), 0
    running: list[QuotaHold] = []
    for _ in range(3000):
        if running and rng.random() < 0.5:
            hold = running.pop(rng.randrange(len(running)))
            tokens = rng.randrange(hold.tokens + 1)
            hold.settle(tokens)
            used += tokens
            desk.used(tokens)
        with suppress(QuotaExhausted):
            running.append(await desk.reserve(rng.randrange(1, 80), plan=limits))
        assert used + sum(hold.tokens for hold in running) <= 5000
        desk.clock += rng.random() * 10
    for hold in running:
        hold.settle(0)
    assert desk.quotas.open == 0
    assert used > 4000
    assert f"{used} are used" in (await desk.refusal(5001 - used, plan=limits)).message
