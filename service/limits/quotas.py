"""Quotas: tokens in a day and in a calendar month (UTC), by the durable ledger of usage.

A principal's sums are read with its first request. Then they are kept in memory, where what is settled is added at
once, and read again every FRESH_FOR seconds, because other instances use the same quota. A sum never falls within
its period: what was read may lack rows that are settled here and not yet written, or hold them already, so the
larger of the two counts. With one instance that is exact. With several it lacks what the others used since the last
reading (STALE_FOR seconds ago at most), and what was unwritten here at that moment.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from service.errors import QuotaExhausted, StorageUnavailable
from service.observability.logging import get_logger
from service.settings import PlanSettings

log = get_logger(__name__)

FRESH_FOR = 30.0
"""Seconds after which a request begins to read the sums again; it does not wait for them."""

STALE_FOR = 60.0
"""Seconds after which sums that could not be read again count for nothing, and a request waits or is refused."""

READ_TIMEOUT = 5.0
RETRY = 1.0
"""Seconds from a reading that failed to the next one, and until a refused request should come back."""

RUNNING_RETRY = 1.0
"""Seconds. Nobody knows when the caller's own running requests will end; the caller does."""

MAX_ACCOUNTS = 10_000
"""Principals that are kept in memory; beyond it those are forgotten that asked longest ago and hold nothing."""

FORGOTTEN_AT_ONCE = 8

Totals = Callable[[str, float], Awaitable[int]]


@dataclass(slots=True)
class _Period:
    """A day or a month: from when to when, and the tokens settled in it. Seconds since the epoch."""

    kind: Literal["day", "month"]
    begins: float = -math.inf
    ends: float = -math.inf
    used: int = 0

    def roll(self, now: float) -> bool:
        """Become the period of `now`; False for an earlier one than before (the clock was put back)."""
        if self.begins <= now < self.ends:
            return True
        forward = now >= self.ends
        self.begins, self.ends = _bounds(self.kind, now)
        self.used = 0
        return forward


@dataclass(slots=True)
class _Account:
    """One principal. `reserved` is held by requests that run; `read_at` and `failed_at` are monotonic."""

    day: _Period = field(default_factory=lambda: _Period("day"))
    month: _Period = field(default_factory=lambda: _Period("month"))
    reserved: int = 0
    holds: int = 0
    read_at: float = -math.inf
    failed_at: float = -math.inf
    reading: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return not self.holds and (self.reading is None or self.reading.done())

    def roll(self, now: float) -> None:
        """Begin the day and the month of `now`. A new one begins with nothing; an old one must be read."""
        known = [period.roll(now) for period in (self.day, self.month)]
        if not all(known):
            self.read_at = -math.inf


class QuotaHold:
    """Tokens that one request holds of its principal's quotas. Made by `Quotas.reserve`."""

    __slots__ = ("_account", "_now", "settled", "tokens")

    def __init__(self, account: _Account | None, tokens: int, now: Callable[[], float]) -> None:
        """Without an account it holds nothing."""
        self._account = account
        self._now = now
        self.tokens = tokens
        self.settled: int | None = None
        """Tokens that were charged in the end; None while it is open."""

    def settle(self, tokens: int) -> bool:
        """Charge what was really used and give the rest back. Only the first call counts; False for the others.

        Raises ValueError for a negative number.
        """
        if tokens < 0:
            raise ValueError("tokens used cannot be negative")
        if self.settled is not None:
            return False
        self.settled = tokens
        if self._account is not None:
            self._account.roll(self._now())
            self._account.reserved -= self.tokens
            self._account.holds -= 1
            self._account.day.used += tokens
            self._account.month.used += tokens
        return True


class Quotas:
    """Accounts of principals whose plans have quotas. Belongs to the event loop's thread.

    `totals` sums a principal's tokens since a time from the ledger, and raises StorageUnavailable. `now` is wall
    time, which days are of; `clock` is monotonic.
    """

    def __init__(
        self,
        totals: Totals,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        timeout: float = READ_TIMEOUT,
        max_accounts: int = MAX_ACCOUNTS,
    ) -> None:
        self._totals = totals
        self._now = now
        self._clock = clock
        self._timeout = timeout
        self._max_accounts = max_accounts
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @property
    def accounts(self) -> int:
        return len(self._accounts)

    @property
    def open(self) -> int:
        """Holds on quotas that are not settled."""
        return sum(account.holds for account in self._accounts.values())

    async def reserve(self, principal_id: str, plan: PlanSettings, tokens: int) -> QuotaHold:
        """Hold `tokens` (prompt and most output) of each quota of the plan, or none. The caller settles.

        Raises QuotaExhausted with the seconds until the quota begins anew; one that only the principal's own running
        requests stand in the way of may be retried soon. Raises StorageUnavailable when the quota cannot be told. A
        plan without quotas never asks storage. ValueError for an empty id or a number that is not positive.
        """
        if not principal_id or tokens < 1:
            raise ValueError("a reservation needs a principal and tokens")
        if plan.daily_tokens == plan.monthly_tokens == "unlimited":
            return QuotaHold(None, tokens, self._now)
        account = await self._known(principal_id)
        refusals = [
            refusal
            for period, limit in ((account.day, plan.daily_tokens), (account.month, plan.monthly_tokens))
            if limit != "unlimited" and (refusal := self._refusal(period, limit, tokens, account.reserved)) is not None
        ]
        if refusals:
            raise max(refusals, key=lambda refusal: refusal.retry_after or 0.0)
        account.reserved += tokens
        account.holds += 1
        return QuotaHold(account, tokens, self._now)

    def _refusal(self, period: _Period, limit: int, tokens: int, reserved: int) -> QuotaExhausted | None:
        """Why a period has no room for `tokens`, or None."""
        if period.used + reserved + tokens <= limit:
            return None
        ends = datetime.fromtimestamp(period.ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        whole = f"Your plan allows {limit} tokens a {period.kind} (UTC), until {ends}; {period.used} are used"
        if period.used + tokens > limit:
            return QuotaExhausted(
                f"{whole}, and this request may need {tokens}.", retry_after=max(0.0, period.ends - self._now())
            )
        refusal = QuotaExhausted(
            f"{whole}, {reserved} are held by your running requests, and this request may need {tokens}.",
            retry_after=RUNNING_RETRY,
        )
        refusal.should_retry = True
        return refusal

    async def _known(self, principal_id: str) -> _Account:
        """The account as of now, with sums that were read lately enough. Raises StorageUnavailable."""
        account = self._account(principal_id)
        account.roll(self._now())
        age = self._clock() - account.read_at
        if age < FRESH_FOR:
            return account
        reading = self._reading(principal_id, account)
        if age < STALE_FOR:
            return account
        if reading is not None:
            await asyncio.shield(reading)  # others may wait for it too
            account.roll(self._now())
        if self._clock() - account.read_at >= STALE_FOR:
            raise StorageUnavailable("Your quota cannot be told now.", retry_after=RETRY)
        return account

    def _account(self, principal_id: str) -> _Account:
        account = self._accounts.setdefault(principal_id, _Account())
        self._accounts.move_to_end(principal_id)
        if len(self._accounts) > self._max_accounts:
            for other_id, other in list(itertools.islice(self._accounts.items(), FORGOTTEN_AT_ONCE)):
                if other.idle and other is not account and len(self._accounts) > self._max_accounts:
                    del self._accounts[other_id]
        return account

    def _reading(self, principal_id: str, account: _Account) -> asyncio.Task[None] | None:
        """The reading that is under way, or a new one; None shortly after one that failed."""
        if account.reading is not None and not account.reading.done():
            return account.reading
        if self._clock() - account.failed_at < RETRY:
            return None
        account.reading = asyncio.create_task(self._read(principal_id, account), name="quota")
        return account.reading

    async def _read(self, principal_id: str, account: _Account) -> None:
        """Read both sums. On failure, which storage logs, the account stays as it is."""
        began, day, month = self._clock(), account.day.begins, account.month.begins
        try:
            async with asyncio.timeout(self._timeout):
                of_day, of_month = await self._totals(principal_id, day), await self._totals(principal_id, month)
        except (StorageUnavailable, TimeoutError):
            log.warning("quota_not_read", principal=principal_id)
            account.failed_at = self._clock()
            return
        if (account.day.begins, account.month.begins) == (day, month):
            account.day.used = max(account.day.used, of_day)
            account.month.used = max(account.month.used, of_month)
            account.read_at = began


def _bounds(kind: Literal["day", "month"], now: float) -> tuple[float, float]:
    """The day or calendar month (UTC) that holds `now`."""
    begins = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if kind == "day":
        return begins.timestamp(), (begins + timedelta(days=1)).timestamp()
    begins = begins.replace(day=1)
    return begins.timestamp(), (begins + timedelta(days=32)).replace(day=1).timestamp()
