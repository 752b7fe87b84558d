"""The ledger: exactly once, exactly so much, and never on the wall clock."""

from __future__ import annotations

import asyncio
import time
import tracemalloc

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from service.errors import InvalidRequest, ServiceError, TokenLimited, TooManyConcurrent
from service.limits.ledger import SPARE_ACCOUNTS, Ledger, Reservation
from service.limits.shared import TokenLimits
from service.limits.states import TokenState
from service.settings import PlanSettings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plan(tokens: int = 600, concurrent: int = 1000) -> PlanSettings:
    return PlanSettings(tokens_per_minute=tokens, concurrent_requests=concurrent)


PLAN = plan()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock=clock)


def test_what_was_reserved_and_not_used_comes_back(ledger: Ledger) -> None:
    reservation = ledger.reserve("p", PLAN, 500)
    assert ledger.state("p", PLAN) == TokenState(limit=600, remaining=100, reset_after=50.0)
    assert reservation.settle(30)
    assert ledger.state("p", PLAN) == TokenState(limit=600, remaining=570, reset_after=3.0)
    assert reservation.settled == 30


def test_only_the_first_settlement_counts(ledger: Ledger) -> None:
    reservation = ledger.reserve("p", PLAN, 500)
    assert [reservation.settle(30), reservation.settle(0), reservation.settle(500)] == [True, False, False]
    assert ledger.state("p", PLAN).remaining == 570
    assert ledger.open == 0


def test_what_was_used_beyond_the_reservation_is_debt_that_refills_first(ledger: Ledger, clock: Clock) -> None:
    ledger.reserve("p", PLAN, 100).settle(900)
    assert ledger.state("p", PLAN) == TokenState(limit=600, remaining=0, reset_after=90.0)
    with pytest.raises(TokenLimited) as caught:
        ledger.reserve("p", PLAN, 1)
    assert caught.value.retry_after == pytest.approx(30.1)
    clock.now = 30.1
    ledger.reserve("p", PLAN, 1)


def test_a_budget_refills_by_the_second_and_never_above_a_minute(ledger: Ledger, clock: Clock) -> None:
    first = ledger.reserve("p", PLAN, 600)
    clock.now = 10.0
    assert ledger.state("p", PLAN).remaining == 100
    clock.now = 3600.0
    assert ledger.state("p", PLAN).remaining == 600
    first.settle(0)
    assert ledger.state("p", PLAN) == TokenState(limit=600, remaining=600, reset_after=0.0)
    ledger.check_integrity()


def test_a_refusal_says_when_there_is_enough_and_takes_nothing(ledger: Ledger, clock: Clock) -> None:
    ledger.reserve("p", PLAN, 590)
    with pytest.raises(TokenLimited):
        ledger.reserve("p", PLAN, 110)
    with pytest.raises(TokenLimited) as caught:
        ledger.reserve("p", PLAN, 110)
    error = caught.value
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_tokens", 10.0)
    assert "600 a minute, 10 of them are left, and this request may need 110" in error.message
    clock.now = 9.99
    with pytest.raises(TokenLimited):
        ledger.reserve("p", PLAN, 110)
    clock.now = 10.0
    ledger.reserve("p", PLAN, 110)


def test_what_a_full_budget_could_not_give_is_wrong_and_not_early(ledger: Ledger) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ledger.reserve("p", PLAN, 601)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "exceeds_token_limit", "max_tokens")
    ledger.reserve("p", PLAN, 600)


def test_so_many_at_a_time_and_a_place_comes_back_with_its_settlement(ledger: Ledger) -> None:
    two = plan(concurrent=2)
    first, _ = ledger.reserve("p", two, 1), ledger.reserve("p", two, 1)
    with pytest.raises(TooManyConcurrent) as caught:
        ledger.reserve("p", two, 1)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "concurrency_limit", 1.0)
    ledger.reserve("q", two, 1)
    first.settle(1)
    ledger.reserve("p", two, 1)


@pytest.mark.parametrize(("principal_id", "tokens"), [("", 1), ("p", 0), ("p", -1)])
def test_a_reservation_of_nothing_or_for_nobody_is_a_bug(ledger: Ledger, principal_id: str, tokens: int) -> None:
    with pytest.raises(ValueError, match="reservation"):
        ledger.reserve(principal_id, PLAN, tokens)


def test_a_negative_settlement_is_a_bug_and_settles_nothing(ledger: Ledger) -> None:
    reservation = ledger.reserve("p", PLAN, 10)
    with pytest.raises(ValueError, match="negative"):
        reservation.settle(-1)
    assert ledger.open == 1


def test_a_changed_budget_stays_as_full_as_it_was(ledger: Ledger) -> None:
    reservation = ledger.reserve("p", PLAN, 300)
    assert ledger.state("p", plan(60)) == TokenState(limit=60, remaining=30, reset_after=30.0)
    ledger.reserve("p", plan(60), 30)
    assert ledger.state("p", PLAN).remaining == 0
    reservation.settle(0)
    assert ledger.state("p", PLAN).remaining == 300


def test_two_plans_of_one_principal_do_not_make_tokens(ledger: Ledger) -> None:
    held = [ledger.reserve("p", PLAN, 300), ledger.reserve("p", PLAN, 300)]
    with pytest.raises(TokenLimited):
        ledger.reserve("p", plan(60), 1)
    held[0].settle(0)
    assert ledger.state("p", PLAN).remaining == 300


def test_a_leak_is_swept_at_its_full_price_and_settles_nothing_later(ledger: Ledger, clock: Clock) -> None:
    leaked = ledger.reserve("p", PLAN, 100)
    clock.now = 50.0
    fresh = ledger.reserve("p", PLAN, 100)
    clock.now = 60.0
    assert ledger.sweep(60.0) == []
    clock.now = 60.1
    assert ledger.sweep(60.0) == [leaked]
    assert (leaked.settled, leaked.settle(0), ledger.open) == (100, False, 1)
    assert fresh.settle(100)


def test_an_unknown_principal_has_everything(ledger: Ledger) -> None:
    assert ledger.state("p", PLAN) == TokenState(limit=600, remaining=600, reset_after=0.0)
    assert ledger.accounts == 0


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_no_jump_of_the_wall_clock_blocks_or_feeds_anybody(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real, wall = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + wall[0])
    ledger = Ledger()
    ledger.reserve("p", PLAN, 600)
    wall[0] = jump
    assert ledger.state("p", PLAN).remaining < 60
    assert 54 < ledger.state("p", PLAN).reset_after <= 60
    wall[0] = 0.0
    assert 54 < ledger.state("p", PLAN).reset_after <= 60


@pytest.mark.parametrize(
    ("given", "tokens", "refused"), [(plan(100), 10, TokenLimited), (plan(10**6, 10), 10, TooManyConcurrent)]
)
async def test_of_100_that_race_for_10_exactly_10_win(
    given: PlanSettings, tokens: int, refused: type[ServiceError]
) -> None:
    limits = TokenLimits(Ledger(clock=Clock()))

    async def race(number: int) -> object:
        await asyncio.sleep(0)
        return await limits.reserve("p", given, tokens)

    results = await asyncio.gather(*(race(number) for number in range(100)), return_exceptions=True)
    assert sum(isinstance(result, refused) for result in results) == 90
    assert sum(not isinstance(result, BaseException) for result in results) == 10


@pytest.mark.no_cover  # many turns of what others cover
def test_thousands_of_idle_principals_are_forgotten(clock: Clock) -> None:
    ledger = Ledger(clock=clock)
    tracemalloc.start()
    try:
        for number in range(20_000):
            ledger.reserve(f"key:{number}", PLAN, 10).settle(5)
            clock.now += 0.1  # 600 principals a minute
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"\n{ledger.accounts} accounts, {held / 1e6:.2f} MB after 20 000 principals")
    assert ledger.accounts <= SPARE_ACCOUNTS
    ledger.check_integrity()


def test_who_owes_or_runs_is_not_forgotten(clock: Clock) -> None:
    ledger = Ledger(clock=clock)
    ledger.reserve("debtor", PLAN, 1).settle(10_000)
    ledger.reserve("running", PLAN, 1)
    for number in range(2 * SPARE_ACCOUNTS):
        clock.now += 0.1
        ledger.reserve(f"key:{number}", PLAN, 1).settle(0)
    assert ledger.accounts <= SPARE_ACCOUNTS
    assert ledger.state("debtor", PLAN).remaining == 0
    assert ledger.open == 1


def test_a_reservation_among_thousands_costs_the_same() -> None:
    def each(principals: int) -> float:
        ledger = Ledger()
        best = float("inf")
        for _ in range(3):
            begin = time.perf_counter()
            for number in range(principals):
                ledger.reserve(f"key:{number}", PLAN, 10).settle(5)
            best = min(best, (time.perf_counter() - begin) / principals)
        return best

    few, many = each(100), each(10_000)
    print(f"\nreserve and settle: {few * 1e6:.1f} us among 100 principals, {many * 1e6:.1f} us among 10 000")
    assert many < 5 * few + 20e-6


class LedgerMachine(RuleBasedStateMachine):
    """The ledger beside a plain model of it. Amounts and times are such that the sums are exact."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ledger = Ledger(clock=self.clock)
        self.plan = plan(600, 4)
        self.level = {"p": 600.0, "q": 600.0}
        self.open: dict[str, list[Reservation]] = {"p": [], "q": []}
        self.charged = {"p": 0, "q": 0}
        self.told = {"p": 0, "q": 0}
        self.seen = {"p": 600, "q": 600}
        self.may_rise = {"p": False, "q": False}

    @rule(target=held, who=st.sampled_from("pq"), tokens=st.integers(1, 700))
    def reserve(self, who: str, tokens: int) -> Reservation | None:
        full = len(self.open[who]) >= 4
        try:
            reservation = self.ledger.reserve(who, self.plan, tokens)
        except TooManyConcurrent:
            assert full
        except InvalidRequest:
            assert tokens > 600
        except TokenLimited as error:
            assert tokens > self.level[who]
            assert error.retry_after == pytest.approx((tokens - self.level[who]) / 10)  # noqa: PT017
        else:
            assert not full
            assert tokens <= self.level[who]
            self.level[who] -= tokens
            self.open[who].append(reservation)
            return reservation
        return None

    @rule(reservation=consumes(held), used=st.integers(0, 1500), again=st.integers(0, 1500))
    def settle(self, reservation: Reservation | None, used: int, again: int) -> None:
        if reservation is None:
            return
        who = reservation.principal_id
        was_open = reservation.settled is None
        assert reservation.settle(used) is was_open
        assert not reservation.settle(again)
        if was_open:
            self.open[who].remove(reservation)
            self.level[who] = min(600.0, self.level[who] + reservation.tokens - used)
            self.may_rise[who] |= used < reservation.tokens
            self.told[who] += used
        assert reservation.settled is not None
        self.charged[who] += reservation.settled if was_open else 0

    @rule(seconds=st.integers(0, 90))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds
        for who in self.level:
            self.level[who] = min(600.0, self.level[who] + seconds * 10)
            self.may_rise[who] |= seconds > 0

    @rule(age=st.integers(30, 120))
    def sweep(self, age: int) -> None:
        for reservation in self.ledger.sweep(age):
            assert reservation.opened_at < self.clock.now - age
            assert reservation.settled == reservation.tokens
            self.open[reservation.principal_id].remove(reservation)

    @invariant()
    def the_books_agree_and_nothing_rises_by_itself(self) -> None:
        self.ledger.check_integrity()
        assert self.ledger.open == sum(map(len, self.open.values()))
        for who, level in self.level.items():
            state = self.ledger.state(who, self.plan)
            assert state.remaining == max(0, level)
            assert state.reset_after == pytest.approx((600 - level) / 10)
            assert state.remaining <= self.seen[who] or self.may_rise[who]
            self.seen[who], self.may_rise[who] = state.remaining, False
            assert self.charged[who] == self.told[who]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(deadline=None, database=None, stateful_step_count=60)
