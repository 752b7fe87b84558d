"""The limits in force: the one object that the API and `inference` ask, over the parts beside it.

Built once from the settings, run and closed with the service. Where authentication is off there is no database, so
no usage is kept, and a quota is an error of the configuration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from service.auth.principal import Principal
from service.errors import InvalidRequest, RateLimited, ServiceError, UnknownLimits
from service.limits.failures import FailureBuckets
from service.limits.headers import rate_limit_headers
from service.limits.ledger import Ledger, Reservation
from service.limits.quotas import QuotaHold, Quotas
from service.limits.request_rate import RequestRate
from service.limits.shared import Hold, RequestLimits, TokenLimits
from service.limits.states import RateState, TokenState
from service.limits.stores import check_quotas, shared_store, totals, usage_log
from service.observability.logging import get_logger
from service.observability.metrics import Metrics
from service.settings import LimitsSettings, PlanError, PlanSettings, Settings
from service.storage.opening import Storage
from service.storage.usage import UsageRow

log = get_logger(__name__)

SWEEP_INTERVAL = 5.0

SWEEP_MARGIN = 60.0
"""Seconds beyond every deadline, the drain and a stalled write: what is open for longer is a leak."""

CLOSE_TIMEOUT = 5.0
"""Seconds that requests which were cut may take to settle at the end, and the last rows to be written."""


@dataclass(slots=True)
class Standing:
    """One request's limits, and where its principal stands with them. `tokens` as a shared store told, if it did."""

    principal: Principal
    plan: PlanSettings
    requests: RateState
    tokens: TokenState | None = None

    def note(self, tokens: TokenState) -> None:
        self.tokens = tokens


class Held:
    """What one request holds: a place among the concurrent ones, tokens of the minute, and tokens of the quotas."""

    __slots__ = ("_close_quota", "_hold")

    def __init__(self, hold: Hold, close_quota: Callable[[Reservation, int], None]) -> None:
        self._hold = hold
        self._close_quota = close_quota

    def settle(self, tokens: int) -> bool:
        """Charge what was used and give the rest back. Only the first call counts; False for the others."""
        if not self._hold.settle(tokens):
            return False
        self._close_quota(self._hold.reservation, tokens)
        return True


class Limits:
    """Belongs to the event loop's thread. `clock` is monotonic, `now` wall time, which only quotas go by.

    `storage` keeps the usage; None where authentication is off. Opens no connection when it is made. Raises
    ConfigurationError.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        storage: Storage | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        check_quotas(settings.limits, storage)
        self._settings = settings.limits
        self._metrics = metrics
        self._storage = storage
        self._sleep = sleep
        self._max_age = (
            settings.engine.request_timeout + settings.engine.drain_timeout + settings.http.write_timeout + SWEEP_MARGIN
        )
        self._store = shared_store(settings, metrics)
        self._ledger = Ledger(clock=clock)
        self._requests = RequestLimits(RequestRate(clock=clock), self._store)
        self._tokens = TokenLimits(self._ledger, self._store)
        self._strangers = FailureBuckets(settings.limits.failed_authentication_per_minute, clock=clock)
        self._quota_holds: dict[Reservation, QuotaHold] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._usage = usage_log(settings, metrics, storage, now)
        self._quotas = Quotas(totals(storage), now=now, clock=clock)

    # -- who may ask ----------------------------------------------------------------------------------------------

    def stranger(self, address: str) -> ServiceError | None:
        """To be told of each failed credential: the 429 instead of the 401 where there were too many, or None."""
        wait = self._strangers.exhausted(address)
        if wait is None:
            self._strangers.charge(address)
            return None
        refused = RateLimited(
            "Too many failed credentials from this address.", code="rate_limit_authentication", retry_after=wait
        )
        refused.should_retry = False  # a credential that was refused will be again
        return self._refused(refused)

    @property
    def settings(self) -> LimitsSettings:
        """What is in force: a reload may have changed it."""
        return self._settings

    def plan_of(self, principal: Principal) -> PlanSettings:
        """The principal's plan with its own numbers. Raises UnknownLimits: nothing is then known to be allowed."""
        try:
            return self._settings.for_principal(principal)
        except PlanError as error:
            raise self._refused(UnknownLimits(error.reason)) from None

    async def hit(self, principal: Principal) -> tuple[Standing, ServiceError | None]:
        """Count one request; the second is the refusal of one that is too many. Raises UnknownLimits."""
        plan = self.plan_of(principal)
        state = await self._requests.hit(principal.id, plan)
        refusal = state.refusal()
        return Standing(principal, plan, state), None if refusal is None else self._refused(refusal)

    def headers(self, standing: Standing) -> list[tuple[str, str]]:
        """What every answer to the principal says."""
        tokens = standing.tokens or self._tokens.state(standing.principal.id, standing.plan)
        return rate_limit_headers(standing.requests, tokens)

    # -- what a request may take ----------------------------------------------------------------------------------

    def check_prompt(self, plan: PlanSettings, tokens: int, *, param: str, at_least: bool = False) -> None:
        """Raises InvalidRequest for a prompt of more tokens than the plan allows; `at_least`: it may have more yet."""
        if tokens > plan.max_prompt_tokens:
            amount = f"at least {tokens}" if at_least else f"{tokens}"
            message = f"The prompt has {amount} tokens; your plan allows {plan.max_prompt_tokens}."
            raise self._refused(InvalidRequest(message, code="exceeds_prompt_limit", param=param))

    def check_output(self, plan: PlanSettings, max_tokens: int) -> None:
        """Raises InvalidRequest for more output than the plan allows."""
        if max_tokens > plan.max_output_tokens:
            message = f"This request asks for {max_tokens} tokens; your plan allows {plan.max_output_tokens}."
            raise self._refused(InvalidRequest(message, code="exceeds_output_limit", param="max_tokens"))

    async def reserve(
        self, principal: Principal, plan: PlanSettings, tokens: int, *, told: Callable[[TokenState], None]
    ) -> Held:
        """Take a place, `tokens` of the minute and of the quotas, or nothing at all; the caller settles.

        Raises QuotaExhausted, TooManyConcurrent, TokenLimited, InvalidRequest (more than a budget ever holds) or
        StorageUnavailable (a quota cannot be told). `told` as in `TokenLimits.reserve`.
        """
        try:
            quota = await self._quotas.reserve(principal.id, plan, tokens)
            hold: Hold | None = None
            try:
                hold = await self._tokens.reserve(principal.id, plan, tokens, told=told)
            finally:
                if hold is None:
                    quota.settle(0)
        except ServiceError as error:
            raise self._refused(error) from None
        self._quota_holds[hold.reservation] = quota
        self._idle.clear()
        return Held(hold, self._close_quota)

    def _close_quota(self, reservation: Reservation, tokens: int) -> None:
        self._quota_holds.pop(reservation).settle(tokens)
        if not self._quota_holds:
            self._idle.set()

    @property
    def open(self) -> int:
        """Reservations that are not settled."""
        return self._ledger.open

    @property
    def shared_store_up(self) -> bool | None:
        """Whether the store that instances share is asked; None where there is none."""
        return None if self._store is None else self._store.up

    def note(self, row: UsageRow) -> None:
        """Keep what a request used, once it has settled. Returns at once; written within a second."""
        if self._usage is not None:
            self._usage.note(row)

    def _refused(self, error: ServiceError) -> ServiceError:
        self._metrics.limits_refused.labels(error.code).inc()
        return error

    def prepared(self, limits: LimitsSettings) -> Callable[[], None]:
        """Call what it returns to have these plans and this rate of failed credentials; nothing changes before.

        What is reserved stays as it is; a request's own plan holds to its end. Raises ConfigurationError.
        """
        check_quotas(limits, self._storage)

        def replace() -> None:
            self._settings = limits
            self._strangers.resize(limits.failed_authentication_per_minute)

        return replace

    # -- over the life of the service -----------------------------------------------------------------------------

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Follow the shared store, write usage and sweep while the block runs; then write what is left.

        The storage must be open for longer.
        """
        async with AsyncExitStack() as stack:
            if self._store is not None:
                await stack.enter_async_context(self._store.run())
            tasks = [self._task("limits-sweep", self._sweep_for_ever())]
            if self._usage is not None:
                tasks.append(self._task("usage", self._usage.follow()))
            try:
                yield
            finally:
                await self._close(tasks)

    async def flush(self) -> None:
        """Write the usage that is noted now, as far as that can be done at the moment."""
        if self._usage is not None:
            await self._usage.flush()

    async def _close(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._idle.wait()  # requests that the server has cut are still unwinding
        except TimeoutError:
            log.warning("reservations_left_open", count=self._ledger.open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._usage is not None:
            await self._usage.close(CLOSE_TIMEOUT)

    async def _sweep_for_ever(self) -> None:
        while True:
            await self._sleep(SWEEP_INTERVAL)
            self.sweep()

    def sweep(self) -> int:
        """Settle what nobody has settled in time, at its full price; each is a bug. Returns how many there were."""
        late = self._ledger.sweep(self._max_age)
        for reservation in late:
            self._close_quota(reservation, reservation.tokens)
            self._metrics.limits_reservations_swept.inc()
            log.error("reservation_swept", principal=reservation.principal_id, tokens=reservation.tokens)
        return len(late)

    def _task(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """One that dies is a bug; limits stay in force without it."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("limits_task_died", task=task.get_name(), exc_info=error)
            self._metrics.internal_errors.labels("limits").inc()
