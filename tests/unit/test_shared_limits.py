"""What happens between the local limits and a shared store, with a store whose answers the test decides."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from service.errors import TokenLimited, TooManyConcurrent
from service.limits.ledger import Ledger
from service.limits.request_rate import RequestRate
from service.limits.shared import RequestLimits, Taken, TokenLimits
from service.limits.states import RateState, TokenState
from service.settings import PlanSettings

PLAN = PlanSettings(requests_per_minute=10, request_burst=10, tokens_per_minute=600, concurrent_requests=5)
LEFT = RateState(allowed=True, limit=10, remaining=4, reset_after=3.0)
NONE_LEFT = RateState(allowed=False, limit=10, remaining=0, reset_after=3.0, retry_after=2.0)


@dataclass
class FakeStore:
    rate: RateState | None = None
    taken: Taken | None = None
    hangs: bool = False
    waits: bool = False
    asked: int = 0
    returned: list[int] = field(default_factory=list)

    async def hit(self, principal_id: str, plan: PlanSettings) -> RateState | None:
        self.asked += 1
        if self.waits:
            await asyncio.sleep(0)
        return self.rate

    async def take(self, principal_id: str, plan: PlanSettings, tokens: int) -> Taken | None:
        if self.hangs:
            await asyncio.Event().wait()
        return self.taken

    def give_back(self, principal_id: str, plan: PlanSettings, tokens: int) -> None:
        self.returned.append(tokens)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(clock=lambda: 0.0)


async def test_the_store_decides_and_what_it_allows_counts_here_too(store: FakeStore) -> None:
    limits = RequestLimits(RequestRate(clock=lambda: 0.0), store)
    store.rate = LEFT
    for _ in range(4):
        assert await limits.hit("p", PLAN) is LEFT
    store.rate = NONE_LEFT
    assert await limits.hit("p", PLAN) is NONE_LEFT
    store.rate = None
    assert (await limits.hit("p", PLAN)).remaining == 5


async def test_what_this_instance_has_served_it_refuses_without_asking(store: FakeStore) -> None:
    limits = RequestLimits(RequestRate(clock=lambda: 0.0), store)
    store.rate = LEFT
    states = [await limits.hit("p", PLAN) for _ in range(100)]
    assert [state.allowed for state in states] == [True] * 10 + [False] * 90
    assert store.asked == 10


async def test_of_those_that_ask_at_once_no_more_than_the_burst_come_through(store: FakeStore) -> None:
    store.rate, store.waits = LEFT, True
    limits = RequestLimits(RequestRate(clock=lambda: 0.0), store)
    some = PLAN.model_copy(update={"request_burst": 3})
    states = await asyncio.gather(*(limits.hit("p", some) for _ in range(10)))
    assert (sum(state.allowed for state in states), store.asked) == (3, 10)


async def test_tokens_are_taken_and_given_back_in_both_places(store: FakeStore, ledger: Ledger) -> None:
    limits = TokenLimits(ledger, store)
    store.taken = Taken(allowed=True, level=200.0)
    told: list[TokenState] = []
    hold = await limits.reserve("p", PLAN, 100, told=told.append)
    assert told == [TokenState(limit=600, remaining=200, reset_after=40.0)]
    assert limits.state("p", PLAN).remaining == 500
    assert [hold.settle(30), hold.settle(0)] == [True, False]
    over = await limits.reserve("p", PLAN, 100)
    over.settle(150)
    exact = await limits.reserve("p", PLAN, 100)
    exact.settle(100)
    assert store.returned == [70, -50]
    assert limits.state("p", PLAN).remaining == 320


async def test_what_the_store_refuses_holds_nothing_here(store: FakeStore, ledger: Ledger) -> None:
    store.taken = Taken(allowed=False, level=40.0)
    told: list[TokenState] = []
    with pytest.raises(TokenLimited) as caught:
        await TokenLimits(ledger, store).reserve("p", PLAN, 100, told=told.append)
    assert caught.value.retry_after == 6.0
    assert told == [TokenState(limit=600, remaining=40, reset_after=56.0)]
    assert (ledger.open, ledger.state("p", PLAN).remaining, store.returned) == (0, 600, [])


async def test_a_client_that_leaves_while_the_store_is_asked_holds_nothing(store: FakeStore, ledger: Ledger) -> None:
    store.hangs = True
    asking = asyncio.create_task(TokenLimits(ledger, store).reserve("p", PLAN, 100))
    await asyncio.sleep(0)
    assert ledger.open == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (ledger.open, ledger.state("p", PLAN).remaining) == (0, 600)


async def test_without_an_answer_the_ledger_decides_and_nothing_is_given_back(store: FakeStore, ledger: Ledger) -> None:
    limits = TokenLimits(ledger, store)
    hold = await limits.reserve("p", PLAN, 590)
    assert limits.state("p", PLAN).remaining == 10
    with pytest.raises(TokenLimited):
        await limits.reserve("p", PLAN, 100)
    hold.settle(1)
    assert store.returned == []


async def test_concurrency_is_the_instances_own(store: FakeStore, ledger: Ledger) -> None:
    store.taken = Taken(allowed=True, level=600.0)
    limits = TokenLimits(ledger, store)
    for _ in range(5):
        await limits.reserve("p", PLAN, 1)
    with pytest.raises(TooManyConcurrent):
        await limits.reserve("p", PLAN, 1)
