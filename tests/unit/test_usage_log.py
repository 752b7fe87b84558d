"""Rows on their way to storage: none is waited for, none is lost that need not be, and memory is bounded."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.errors import StorageUnavailable
from service.limits.usage_log import PRUNE_BATCH, PRUNE_INTERVAL, UsageLog
from service.storage import usage
from service.storage.connection import Connection
from service.storage.database import Database
from service.storage.usage import DAY, UsageRow
from tests.databases import OpenDatabase
from tests.usage_rows import NOON, row

Script = Callable[[], Awaitable[object]]


class Store:
    """Where rows go. Refuses while `broken`; `unsure` takes them and then says that it may not have."""

    def __init__(self) -> None:
        self.batches: list[list[UsageRow]] = []
        self.broken = False
        self.unsure = False
        self.lost = 0
        self.before_write: Script | None = None

    @property
    def written(self) -> list[UsageRow]:
        return list(itertools.chain(*self.batches))

    async def write(self, batch: Sequence[UsageRow]) -> None:
        if self.before_write is not None:
            await self.before_write()
        if not self.broken:
            self.batches.append(list(batch))
        if self.broken or self.unsure:
            raise StorageUnavailable("not now")

    def lose(self, number: int) -> None:
        self.lost += number

    def log(self, **more: Any) -> UsageLog:
        return UsageLog(self.write, on_lost=self.lose, **more)


@pytest.fixture
def store() -> Store:
    return Store()


def note(log: UsageLog, numbers: range) -> list[UsageRow]:
    noted = [row(number) for number in numbers]
    for each in noted:
        log.note(each)
    return noted


def events(logged: Sequence[Any]) -> list[str]:
    return [each["event"] for each in logged]


async def test_what_is_noted_is_written_in_its_order_and_in_batches(store: Store) -> None:
    log = store.log(batch=4)
    noted = note(log, range(10))
    assert (log.pending, store.batches) == (10, [])
    await log.flush()
    assert (log.pending, store.written) == (0, noted)
    assert [len(batch) for batch in store.batches] == [4, 4, 2]
    await log.flush()
    assert len(store.batches) == 3


async def test_what_cannot_be_written_stays_in_its_order_and_is_said_once(store: Store) -> None:
    log = store.log(batch=2)
    noted = note(log, range(3))
    store.broken = True
    with capture_logs() as logged:
        for _ in range(5):
            await log.flush()
        assert log.pending == 3
        noted += note(log, range(3, 5))
        store.broken = False
        await log.flush()
    assert (log.pending, store.written, store.lost) == (0, noted, 0)
    assert events(logged) == ["usage_not_written", "usage_written_again"]


async def test_a_failure_leaves_what_was_written_before_it(store: Store) -> None:
    log = store.log(batch=2)
    noted = note(log, range(4))

    async def fail_the_second() -> None:
        store.broken = len(store.batches) == 1

    store.before_write = fail_the_second
    await log.flush()
    assert (log.pending, store.written) == (2, noted[:2])
    store.before_write, store.broken = None, False
    await log.flush()
    assert store.written == noted


async def test_beyond_the_capacity_the_oldest_are_given_up_counted_and_said_once(store: Store) -> None:
    log = store.log(capacity=5)
    store.broken = True
    with capture_logs() as logged:
        noted = note(log, range(12))
        await log.flush()
        assert (log.pending, store.lost) == (5, 7)
        store.broken = False
        await log.flush()
        assert store.written == noted[7:]
        store.broken = True
        note(log, range(20, 26))
    assert store.lost == 8
    assert events(logged).count("usage_rows_lost") == 2  # one for each time that storage was lost


async def test_rows_that_are_being_written_count_and_are_not_given_up(store: Store) -> None:
    log = store.log(capacity=4, batch=2)
    noted = note(log, range(4))

    async def more() -> None:
        store.before_write = None
        noted.extend(note(log, range(4, 6)))
        store.broken = True

    store.before_write = more
    await log.flush()
    assert (log.pending, store.lost) == (4, 2)
    store.broken = False
    await log.flush()
    assert store.written == [*noted[:2], *noted[4:]]


@pytest.mark.parametrize("fault", ["cancelled", "a bug"])
async def test_whatever_ends_a_write_its_rows_stay(store: Store, fault: str) -> None:
    log = store.log(batch=2)
    noted = note(log, range(3))
    began = asyncio.Event()

    async def fail() -> None:
        began.set()
        if fault == "a bug":
            raise RuntimeError(fault)
        await asyncio.Event().wait()

    store.before_write = fail
    flushing = asyncio.create_task(log.flush())
    await began.wait()
    assert log.pending == 3
    flushing.cancel()
    with pytest.raises((asyncio.CancelledError, RuntimeError)):
        await flushing
    assert log.pending == 3
    store.before_write = None
    await log.flush()
    assert store.written == noted


async def test_two_flushes_at_once_write_each_row_once(store: Store) -> None:
    log = store.log(batch=2)
    noted = note(log, range(9))
    store.before_write = partial(asyncio.sleep, 0)
    await asyncio.gather(*(log.flush() for _ in range(4)))
    assert store.written == noted


async def test_a_write_of_unknown_fate_is_made_again_and_counts_once(open_database: OpenDatabase) -> None:
    database, store = open_database(), Store()

    async def write(batch: Sequence[UsageRow]) -> None:
        await asyncio.wrap_future(database.write(partial(usage.append, rows=batch)))
        await store.write(batch)

    log = UsageLog(write, on_lost=store.lose, batch=3)
    note(log, range(5))
    store.unsure = True
    await log.flush()
    assert (log.pending, total(database)) == (5, 45)
    store.unsure = False
    await log.flush()
    assert (log.pending, total(database)) == (0, 75)


async def test_a_database_that_another_process_holds_delays_rows_and_loses_none(open_database: OpenDatabase) -> None:
    database, other, free = open_database(), open_database(), threading.Event()

    async def write(batch: Sequence[UsageRow]) -> None:
        await asyncio.wrap_future(database.write(partial(usage.append, rows=batch)))

    log = UsageLog(write, on_lost=Store().lose)
    note(log, range(5))
    held = threading.Event()

    def hold(_: Connection) -> None:
        held.set()
        free.wait(30)

    holding = other.write(hold)
    await asyncio.to_thread(held.wait, 30)
    await log.flush()
    assert (log.pending, total(database)) == (5, 0)
    free.set()
    await asyncio.wrap_future(holding)
    await log.flush()
    assert (log.pending, total(database)) == (0, 75)


def total(database: Database) -> int:
    return database.read(lambda connection: usage.totals(connection, "key:k1", 0.0)).result()


async def test_a_close_tries_again_until_all_is_written(store: Store) -> None:
    log = store.log(batch=2)
    noted = note(log, range(5))
    failures = iter([True, True, False])

    async def fail_twice() -> None:
        store.broken = next(failures, False)

    store.before_write = fail_twice
    with capture_logs() as logged:
        await log.close()
    assert (store.written, log.pending, store.lost) == (noted, 0, 0)
    assert events(logged) == ["usage_not_written", "usage_written_again"]
    await log.close()


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
async def test_a_close_gives_up_in_time_counts_the_loss_and_says_it(store: Store, fault: str) -> None:
    log = store.log(batch=2)
    note(log, range(5))
    store.broken = fault == "refuses"
    if fault == "hangs":
        store.before_write = asyncio.Event().wait
    with capture_logs() as logged:
        await log.close(timeout=0.02)
    assert store.lost == 5
    assert logged[-1] == {"event": "usage_rows_lost", "lost": 5, "log_level": "error"}


class Clock:
    """Sleeps that take no time, and end the follower after so many."""

    def __init__(self, ticks: int) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._ticks = ticks

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if len(self.slept) > self._ticks:
            raise asyncio.CancelledError

    async def follow(self, log: UsageLog) -> None:
        with pytest.raises(asyncio.CancelledError):
            await log.follow(sleep=self.sleep)


async def test_it_writes_twice_a_second_until_cancelled(store: Store) -> None:
    log, clock = store.log(batch=2), Clock(3)
    noted = note(log, range(2))

    async def note_another() -> None:
        noted.extend(note(log, range(len(noted), len(noted) + 1)))

    store.before_write = note_another  # what is noted while a batch is written waits for the next time
    await clock.follow(log)
    assert clock.slept == [0.5] * 4
    assert [len(batch) for batch in store.batches] == [2, 1, 1]
    assert (store.written, log.pending) == (noted[:4], 1)


class Pruning:
    """Rows of which so many are too old."""

    def __init__(self, old: int) -> None:
        self.old = old
        self.asked: list[tuple[float, int]] = []
        self.broken = False

    async def prune(self, before: float, limit: int) -> int:
        self.asked.append((before, limit))
        if self.broken:
            raise StorageUnavailable("not now")
        gone = min(limit, self.old)
        self.old -= gone
        return gone


async def test_what_is_too_old_is_forgotten_a_batch_at_a_time_and_then_hourly(store: Store) -> None:
    pruning, clock = Pruning(old=2 * PRUNE_BATCH + 5), Clock(6)
    log = store.log(prune=pruning.prune, keep_days=40, clock=lambda: clock.now, now=lambda: NOON)
    await clock.follow(log)
    assert pruning.asked == [(NOON - 40 * DAY, PRUNE_BATCH)] * 3
    assert pruning.old == 0
    clock = Clock(2)
    clock.now += PRUNE_INTERVAL + 10
    await clock.follow(log)
    assert len(pruning.asked) == 4


async def test_a_pruning_that_fails_waits_for_the_next_hour_and_stops_no_writing(store: Store) -> None:
    pruning, clock = Pruning(old=5), Clock(3)
    log = store.log(prune=pruning.prune, clock=lambda: clock.now)
    pruning.broken = True
    noted = note(log, range(1))
    await clock.follow(log)
    assert (len(pruning.asked), store.written) == (1, noted)
