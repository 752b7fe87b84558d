"""Limits that several instances share, with this instance's own as the fallback.

Whatever a shared store does (refuse, be slow, say nothing), a request is decided: by the store when it answers in
time, else by the local limits, which count everything that this instance admits at any time. So a store that fails
grants no fresh window here. Each instance alone then allows a whole plan. Concurrency and the requests in a second
are always the instance's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.limits.ledger import Ledger, Reservation, token_limited, token_state
from service.limits.request_rate import RequestRate
from service.limits.states import RateState, TokenState
from service.settings import PlanSettings


@dataclass(frozen=True, slots=True)
class Taken:
    """Whether a budget gave tokens, and what is in it now (negative in debt)."""

    allowed: bool
    level: float


class SharedStore(Protocol):
    """Where several instances count together. None as an answer: it cannot be asked now. Never raises for that."""

    async def hit(self, principal_id: str, plan: PlanSettings) -> RateState | None:
        """Count one request, unless that is more than the plan allows in a minute."""

    async def take(self, principal_id: str, plan: PlanSettings, tokens: int) -> Taken | None:
        """Take tokens out of a budget, all or none."""

    def give_back(self, principal_id: str, plan: PlanSettings, tokens: int) -> None:
        """Put tokens back, or take more when negative. Returns at once; lost when the store fails."""


class RequestLimits:
    """Requests in a minute, in the shared store where there is one, and in a second. Event loop's thread."""

    def __init__(self, local: RequestRate, store: SharedStore | None = None) -> None:
        self._local = local
        self._store = store

    async def hit(self, principal_id: str, plan: PlanSettings) -> RateState:
        """Count one request, unless that is more than the plan allows. Never raises for a store that fails."""
        if self._store is None:
            return self._local.hit(principal_id, plan)
        refused = self._local.refusal(principal_id, plan)
        if refused is not None:  # a flood from one principal never reaches the store
            return refused
        shared = await self._store.hit(principal_id, plan)
        if shared is not None and not shared.allowed:
            return shared
        local = self._local.hit(principal_id, plan)
        return local if shared is None or not local.allowed else shared


class Hold:
    """A `reservation` here and, when it was made there too, in the shared store."""

    __slots__ = ("_plan", "_store", "reservation")

    def __init__(self, reservation: Reservation, plan: PlanSettings, store: SharedStore | None) -> None:
        self.reservation = reservation
        self._plan = plan
        self._store = store

    def settle(self, tokens: int) -> bool:
        """As `Reservation.settle`: only the first call counts. Returns at once, so it is safe in any exit path."""
        if not self.reservation.settle(tokens):
            return False
        if self._store is not None and tokens != self.reservation.tokens:
            self._store.give_back(self.reservation.principal_id, self._plan, self.reservation.tokens - tokens)
        return True


def _nobody(_: TokenState) -> None:
    """Told what the shared budget is, and does not care."""


class TokenLimits:
    """Token budgets and concurrency: `ledger` here, and budgets in the shared store. Event loop's thread."""

    def __init__(self, ledger: Ledger, store: SharedStore | None = None) -> None:
        self._ledger = ledger
        self._store = store

    async def reserve(
        self, principal_id: str, plan: PlanSettings, tokens: int, *, told: Callable[[TokenState], None] = _nobody
    ) -> Hold:
        """Take a place and tokens, or nothing. Raises as `Ledger.reserve` does, also for the shared budget.

        `told` gets that budget as it then is, whenever the shared store has answered.
        """
        reservation = self._ledger.reserve(principal_id, plan, tokens)
        hold: Hold | None = None
        try:
            taken = None if self._store is None else await self._store.take(principal_id, plan, tokens)
            if taken is not None:
                told(token_state(plan.tokens_per_minute, taken.level))
                if not taken.allowed:
                    raise token_limited(plan, tokens, taken.level)
            hold = Hold(reservation, plan, None if taken is None else self._store)
        finally:
            if hold is None:  # refused there, or cancelled while asking
                reservation.settle(0)
        return hold

    def state(self, principal_id: str, plan: PlanSettings) -> TokenState:
        """Where the principal stands on this instance."""
        return self._ledger.state(principal_id, plan)
