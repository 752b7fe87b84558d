"""Token budgets and concurrency: what a request may cost is reserved before it runs and settled once, after it.

A budget is a bucket: it holds up to a minute's tokens and is refilled by the second. What was reserved and not used
comes back; what was used beyond the reservation is debt, which refills first. Time is monotonic, so that no change
of the wall clock blocks or feeds anybody. Belongs to the event loop's thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from service.errors import InvalidRequest, TokenLimited, TooManyConcurrent
from service.limits.states import TokenState
from service.settings import PlanSettings

SPARE_ACCOUNTS = 1024
"""Accounts that are kept before those are dropped in which nothing is open and nothing is missing."""

CONCURRENCY_RETRY = 1.0
"""Seconds. Nobody knows when a running request will end; the client does, they are its own."""

ROUNDING = 1e-6
"""Tokens by which a refill may fall short: who waits as long as told is not refused for an error of the last bit."""


@dataclass(slots=True)
class _Account:
    """One principal. `level` is as of `at`; negative in debt."""

    capacity: int
    level: float
    at: float
    open: dict[int, Reservation] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return self.capacity / 60

    def refill(self, now: float) -> None:
        self.level = min(float(self.capacity), self.level + (now - self.at) * self.per_second)
        self.at = now


class Reservation:
    """What one request holds: a place among the concurrent ones, and tokens. Made by `Ledger.reserve`."""

    __slots__ = ("_ledger", "_number", "capacity", "opened_at", "principal_id", "settled", "tokens")

    def __init__(
        self, ledger: Ledger, number: int, *, principal_id: str, tokens: int, capacity: int, opened_at: float
    ) -> None:
        self._ledger = ledger
        self._number = number
        self.principal_id = principal_id
        self.tokens = tokens
        self.capacity = capacity
        self.opened_at = opened_at
        self.settled: int | None = None
        """Tokens that were charged in the end; None while it is open."""

    def settle(self, tokens: int) -> bool:
        """Charge what was really used and give the place back. Only the first call counts; False for the others.

        Raises ValueError for a negative number. Tokens beyond the reservation are debt.
        """
        if tokens < 0:
            raise ValueError("tokens used cannot be negative")
        if self.settled is not None:
            return False
        self.settled = tokens
        self._ledger._close(self._number, self)  # noqa: SLF001 - the two are one thing
        return True


class Ledger:
    """Accounts of principals that have used something lately. `clock` is monotonic."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._numbers = 0
        self._prune_at = SPARE_ACCOUNTS

    @property
    def open(self) -> int:
        """Reservations that are not settled."""
        return sum(len(account.open) for account in self._accounts.values())

    @property
    def accounts(self) -> int:
        return len(self._accounts)

    def reserve(self, principal_id: str, plan: PlanSettings, tokens: int) -> Reservation:
        """Take a place and `tokens` (prompt and most output) out of the budget, or nothing at all.

        Raises TooManyConcurrent, TokenLimited with the seconds until so many tokens are there, or InvalidRequest for
        more than the budget ever holds. ValueError for an empty id or a number that is not positive.
        """
        if not principal_id or tokens < 1:
            raise ValueError("a reservation needs a principal and tokens")
        account = self._account(principal_id, plan)
        if len(account.open) >= plan.concurrent_requests:
            raise TooManyConcurrent(
                f"Too many requests at the same time: your plan allows {plan.concurrent_requests}.",
                retry_after=CONCURRENCY_RETRY,
            )
        check_size(plan, tokens)
        if tokens > account.level + ROUNDING:
            raise token_limited(plan, tokens, account.level)
        account.level -= tokens
        self._numbers += 1
        reservation = Reservation(
            self,
            self._numbers,
            principal_id=principal_id,
            tokens=tokens,
            capacity=account.capacity,
            opened_at=account.at,
        )
        account.open[self._numbers] = reservation
        return reservation

    def _account(self, principal_id: str, plan: PlanSettings) -> _Account:
        """The account as of now, under the plan as it is now. A changed budget stays as full as it was."""
        now = self._clock()
        account = self._accounts.get(principal_id)
        if account is None:
            self._prune(now)
            account = _Account(plan.tokens_per_minute, float(plan.tokens_per_minute), now)
            self._accounts[principal_id] = account
        account.refill(now)
        if account.capacity != plan.tokens_per_minute:
            account.level *= plan.tokens_per_minute / account.capacity
            account.capacity = plan.tokens_per_minute
        return account

    def _prune(self, now: float) -> None:
        """An account that is full and has nothing open says nothing: forget such, whenever the number has doubled."""
        if len(self._accounts) < self._prune_at:
            return
        for principal_id, account in list(self._accounts.items()):
            account.refill(now)
            if not account.open and account.level >= account.capacity:
                del self._accounts[principal_id]
        self._prune_at = max(SPARE_ACCOUNTS, 2 * len(self._accounts))

    def _close(self, number: int, reservation: Reservation) -> None:
        account = self._accounts[reservation.principal_id]
        del account.open[number]
        assert reservation.settled is not None
        account.refill(self._clock())
        unused = (reservation.tokens - reservation.settled) * account.capacity / reservation.capacity
        account.level = min(float(account.capacity), account.level + unused)

    def state(self, principal_id: str, plan: PlanSettings) -> TokenState:
        """Where the principal stands. Changes nothing."""
        account = self._accounts.get(principal_id)
        if account is None:
            return token_state(plan.tokens_per_minute, plan.tokens_per_minute)
        account.refill(self._clock())
        return token_state(plan.tokens_per_minute, account.level * plan.tokens_per_minute / account.capacity)

    def sweep(self, max_age: float) -> list[Reservation]:
        """Settle, at their full price, reservations that are open for longer than `max_age` seconds: leaks.

        Nobody knows what they used. A request that does settle later changes nothing any more.
        """
        before = self._clock() - max_age
        late = [
            reservation
            for account in self._accounts.values()
            for reservation in account.open.values()
            if reservation.opened_at < before
        ]
        for reservation in late:
            reservation.settle(reservation.tokens)
        return late

    def check_integrity(self) -> None:
        """Raise AssertionError when the books disagree with each other; for tests and idle moments."""
        for principal_id, account in self._accounts.items():
            assert account.level <= account.capacity, "more tokens than the budget holds"
            assert math.isfinite(account.level), "a budget without a level"
            for number, reservation in account.open.items():
                assert reservation.settled is None, "a settled reservation holds a place"
                assert reservation.principal_id == principal_id, "a reservation in another's account"
                assert number <= self._numbers, "a number that was never given"


def check_size(plan: PlanSettings, tokens: int) -> None:
    """Raises InvalidRequest for more than a budget holds when it is full: no waiting helps."""
    if tokens > plan.tokens_per_minute:
        raise InvalidRequest(
            f"This request may need {tokens} tokens; your plan allows {plan.tokens_per_minute} a minute. Ask for "
            "fewer tokens or send a shorter prompt.",
            code="exceeds_token_limit",
            param="max_tokens",
        )


def token_limited(plan: PlanSettings, tokens: int, level: float) -> TokenLimited:
    """The refusal of a budget that holds `level`, with the seconds until it holds `tokens`."""
    return TokenLimited(
        f"Too many tokens: your plan allows {plan.tokens_per_minute} a minute, {max(0, math.floor(level))} of them "
        f"are left, and this request may need {tokens}.",
        retry_after=(tokens - level) * 60 / plan.tokens_per_minute,
    )


def token_state(capacity: int, level: float) -> TokenState:
    """The state of a budget; `level` is negative in debt."""
    missing = max(0.0, capacity - level)
    remaining = max(0, math.floor(level + ROUNDING))
    return TokenState(limit=capacity, remaining=min(capacity, remaining), reset_after=missing * 60 / capacity)
