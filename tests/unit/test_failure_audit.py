"""A flood of refused credentials is one bounded trickle into the audit log."""

import asyncio
from collections.abc import Sequence

import pytest

from service.auth.failure_audit import MAX_PENDING, AuthFailure, FailureAudit
from service.errors import StorageUnavailable

pytestmark = pytest.mark.anyio


class Store:
    """Where failures go; refuses while `broken`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.written: list[AuthFailure] = []
        self.broken = False

    async def write(self, failures: Sequence[AuthFailure]) -> None:
        if self.broken:
            raise StorageUnavailable("not now")
        self.written += failures

    def audit(self, per_minute: int = 3) -> FailureAudit:
        return FailureAudit(self.write, per_minute=per_minute, clock=lambda: self.now, now=lambda: 1000.0)


def note(audit: FailureAudit, times: int = 1) -> None:
    for _ in range(times):
        audit.note(reason="unknown_key", address="203.0.113.9", request_id="id")


async def test_so_many_a_minute_are_written_and_the_others_counted() -> None:
    store = Store()
    audit = store.audit()
    note(audit, 1000)
    await audit.flush()
    assert store.written == [AuthFailure(reason="unknown_key", address="203.0.113.9", request_id="id", at=1000.0)] * 3
    store.now = 59.9
    note(audit)
    store.now = 60.0
    note(audit, 2)
    await audit.flush()
    assert [failure.unrecorded for failure in store.written[3:]] == [998, 0]


async def test_what_cannot_be_written_stays_and_stays_bounded() -> None:
    store = Store()
    audit = store.audit(per_minute=10**6)
    store.broken = True
    note(audit, 2)
    await audit.flush()
    note(audit, MAX_PENDING)
    store.broken = False
    await audit.flush()
    assert len(store.written) == MAX_PENDING
    note(audit)
    await audit.flush()
    assert store.written[-1].unrecorded == 2


async def test_nothing_is_written_for_nothing() -> None:
    store = Store()
    store.broken = True
    await store.audit().flush()
    assert store.written == []


async def test_a_write_that_is_cancelled_is_made_up_for() -> None:
    began = asyncio.Event()
    written: list[AuthFailure] = []

    async def write(failures: Sequence[AuthFailure]) -> None:
        if not began.is_set():
            began.set()
            await asyncio.Event().wait()
        written.extend(failures)

    audit = FailureAudit(write, clock=lambda: 0.0)
    note(audit)
    flushing = asyncio.create_task(audit.flush())
    await began.wait()
    flushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flushing
    await audit.flush()
    assert len(written) == 1


async def test_it_writes_by_the_clock_until_cancelled() -> None:
    store = Store()
    audit = store.audit()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        note(audit)
        if len(slept) == 3:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await audit.follow(5.0, sleep)
    assert slept == [5.0] * 3
    assert len(store.written) == 2
