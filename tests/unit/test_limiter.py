"""The one object that the API asks: what it refuses and counts, what it gives back, and what it leaves at the end."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
import structlog

from service.auth.principal import LOCAL, Principal, Scope
from service.errors import (
    InvalidRequest,
    QuotaExhausted,
    RateLimited,
    ServiceError,
    StorageUnavailable,
    TokenLimited,
    TooManyConcurrent,
    UnknownLimits,
)
from service.limits import limiter
from service.limits.failures import MAX_ADDRESSES
from service.limits.limiter import SWEEP_MARGIN, Limits
from service.limits.states import TokenState
from service.limits.windows import MAX_KEYS
from service.observability.metrics import Metrics
from service.settings import ConfigurationError, LimitsSettings, PlanSettings, Settings
from service.storage import usage
from service.storage.database import Database
from service.storage.opening import OpeningDatabase, Storage
from service.storage.usage import UsageRow
from tests.redis_server import private

pytestmark = pytest.mark.anyio

NOON = datetime(2030, 1, 15, 12, tzinfo=UTC).timestamp()


def settings(**plans: dict[str, Any]) -> Settings:
    return Settings(limits=LimitsSettings(plans={name: PlanSettings(**numbers) for name, numbers in plans.items()}))


def who(name: str = "key:a", plan: str = "default", **limits: int) -> Principal:
    return Principal(id=name, tenant=name, scopes=frozenset(Scope), plan=plan, limits=limits)


def row(number: int, *, tokens: int = 10, at: float = NOON, principal: str = "key:a") -> UsageRow:
    return UsageRow(
        id=f"row-{number}", at=at, request_id="r", principal=principal, tenant="t", key_id="a", model="m",
        endpoint="/generate", stream=False, rows=1, prompt_tokens=tokens, cached_tokens=0, completion_tokens=0,
        queue_seconds=0.0, time_to_first_token=None, duration_seconds=1.0, finish_reason="stop",
    )  # fmt: skip


@dataclass
class World:
    """Limits whose clocks the test moves."""

    given: Settings = field(default_factory=settings)
    storage: Storage | None = None
    monotonic: float = 100.0
    wall: float = NOON
    sleep: Callable[[float], Any] = asyncio.sleep

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.told: list[TokenState] = []
        self.limits = Limits(
            self.given,
            self.metrics,
            self.storage,
            clock=lambda: self.monotonic,
            now=lambda: self.wall,
            sleep=self.sleep,
        )

    async def reserve(self, principal: Principal, tokens: int) -> limiter.Held:
        return await self.limits.reserve(principal, self.limits.plan_of(principal), tokens, told=self.told.append)

    async def hit(self, principal: Principal) -> str | None:
        """The code of a refusal."""
        _, refusal = await self.limits.hit(principal)
        return None if refusal is None else refusal.code

    def count(self, series: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(series, labels) or 0.0

    def refused(self, code: str) -> float:
        return self.count("mlxd_limits_refused_total", code=code)


@asynccontextmanager
async def kept(folder: Path, **more: Any) -> AsyncIterator[World]:
    """With a database; what is in it is looked at afterwards by `rows`."""
    storage = OpeningDatabase(lambda: Database.open(Settings().storage, folder, migrate=True))
    await asyncio.to_thread(storage.open)
    try:
        yield World(storage=storage, **more)
    finally:
        await asyncio.to_thread(storage.close)


def used(folder: Path, principal: str = "key:a") -> int:
    with Database.open(Settings().storage, folder) as database:
        return database.read(lambda connection: usage.totals(connection, principal, 0.0)).result()


# Who may ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("principal", "reason"),
    [(who(plan="gone"), "unknown_plan"), (who(tokens_per_minute=0), "bad_override"), (who(rpm=1), "bad_override")],
)
async def test_a_principal_whose_limits_cannot_be_told_may_do_nothing(principal: Principal, reason: str) -> None:
    world = World()
    with pytest.raises(UnknownLimits) as caught:
        await world.limits.hit(principal)
    assert (caught.value.status, caught.value.code, caught.value.reason) == (403, "unknown_limits", reason)
    assert "gone" not in caught.value.message
    assert world.refused("unknown_limits") == 1


async def test_a_keys_own_numbers_replace_those_of_its_plan() -> None:
    world = World(settings(gold={"requests_per_minute": 50}))
    assert await world.hit(who(plan="gold", requests_per_minute=1)) is None
    assert await world.hit(who(plan="gold", requests_per_minute=1)) == "rate_limit_requests"
    assert await world.hit(who("key:b", plan="gold")) is None
    assert world.refused("rate_limit_requests") == 1


async def test_headers_say_what_is_left_now() -> None:
    world = World(settings(default={"requests_per_minute": 10, "request_burst": 10, "tokens_per_minute": 600}))
    standing, _ = await world.limits.hit(LOCAL)
    held = await world.reserve(LOCAL, 60)
    assert dict(world.limits.headers(standing)) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "540",
        "x-ratelimit-reset-tokens": "6s",
    }
    held.settle(10)
    assert dict(world.limits.headers(standing))["x-ratelimit-remaining-tokens"] == "590"
    standing.note(TokenState(limit=600, remaining=7, reset_after=59.3))  # of a store that others use too
    assert dict(world.limits.headers(standing))["x-ratelimit-remaining-tokens"] == "7"


async def test_an_address_that_fails_too_often_is_told_to_stop_and_only_for_so_long() -> None:
    world = World(Settings(limits=LimitsSettings(failed_authentication_per_minute=3)))
    answers = [world.limits.stranger("203.0.113.9") for _ in range(5)]
    assert answers[:3] == [None] * 3
    assert all(isinstance(answer, RateLimited) for answer in answers[3:])
    refused = answers[3]
    assert refused is not None
    assert (refused.code, refused.retry_after, refused.should_retry) == ("rate_limit_authentication", 20.0, False)
    assert world.limits.stranger("203.0.113.10") is None
    assert world.refused("rate_limit_authentication") == 2
    world.monotonic += 20.0
    assert world.limits.stranger("203.0.113.9") is None


# What a request may take ------------------------------------------------------------------------------------


async def test_amounts_beyond_the_plan_are_refused_with_both_numbers() -> None:
    world = World(settings(default={"max_prompt_tokens": 10, "max_output_tokens": 20}))
    plan = world.limits.plan_of(LOCAL)
    world.limits.check_prompt(plan, 10, param="prompt")
    world.limits.check_output(plan, 20)
    with pytest.raises(InvalidRequest, match=r"11 tokens.*allows 10") as prompt:
        world.limits.check_prompt(plan, 11, param="messages")
    assert (prompt.value.code, prompt.value.param) == ("exceeds_prompt_limit", "messages")
    with pytest.raises(InvalidRequest, match=r"21 tokens.*allows 20") as output:
        world.limits.check_output(plan, 21)
    assert (output.value.code, output.value.param) == ("exceeds_output_limit", "max_tokens")
    assert world.refused("exceeds_prompt_limit") == world.refused("exceeds_output_limit") == 1


REFUSALS: list[tuple[dict[str, Any], type[ServiceError]]] = [
    ({"concurrent_requests": 1}, TooManyConcurrent),
    ({"tokens_per_minute": 100}, TokenLimited),
    ({"daily_tokens": 100}, QuotaExhausted),
    ({"monthly_tokens": 100}, QuotaExhausted),
]


@pytest.mark.parametrize(("numbers", "refusal"), REFUSALS)
async def test_a_reservation_is_of_everything_or_of_nothing(
    numbers: dict[str, Any], refusal: type[ServiceError], tmp_path: Path
) -> None:
    async with kept(tmp_path, given=settings(default=numbers)) as world:
        first = await world.reserve(LOCAL, 60)
        with pytest.raises(refusal) as caught:
            await world.reserve(LOCAL, 60)
        assert world.refused(caught.value.code) == 1
        assert (world.limits._ledger.open, world.limits._quotas.open) == (
            1,
            0 if "daily" not in str(numbers) and "monthly" not in str(numbers) else 1,
        )
        assert first.settle(0)
        assert not first.settle(60)
        again = await world.reserve(LOCAL, 60)
        again.settle(60)
        assert (world.limits._ledger.open, world.limits._quotas.open) == (0, 0)


async def test_what_the_budget_refuses_the_quota_gets_back(tmp_path: Path) -> None:
    given = settings(default={"tokens_per_minute": 100, "daily_tokens": 150})
    async with kept(tmp_path, given=given) as world:
        first = await world.reserve(LOCAL, 100)
        with pytest.raises(TokenLimited):
            await world.reserve(LOCAL, 40)
        first.settle(100)
        world.monotonic += 60
        (await world.reserve(LOCAL, 50)).settle(50)
        world.monotonic += 60
        with pytest.raises(QuotaExhausted) as caught:
            await world.reserve(LOCAL, 1)
        assert caught.value.retry_after == 12 * 3600
        assert caught.value.should_retry is False


async def test_a_quota_that_cannot_be_told_allows_nothing_and_holds_nothing() -> None:
    def nothing() -> Database:
        raise AssertionError

    world = World(settings(default={"daily_tokens": 100}, free={}), OpeningDatabase(nothing))
    with pytest.raises(StorageUnavailable):
        await world.reserve(LOCAL, 1)
    assert world.limits._ledger.open == 0
    (await world.reserve(who(plan="free"), 1)).settle(1)


async def test_where_nothing_is_kept_a_quota_is_an_error_of_the_configuration() -> None:
    for numbers in ({"daily_tokens": 1}, {"monthly_tokens": 1}):
        with pytest.raises(ConfigurationError, match=r"default.*quota needs auth\.enabled"):
            World(settings(default=numbers))
    world = World()
    world.limits.note(row(1))  # goes nowhere
    async with world.limits.run():
        pass


async def test_redis_without_its_extra_is_an_error_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = private(tmp_path / "redis", "redis://127.0.0.1")
    given = Settings(limits=LimitsSettings(redis_url_file=file))
    assert Limits(given, Metrics(), None)._store is not None
    monkeypatch.delitem(sys.modules, "service.limits.redis_store")
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigurationError, match=r"redis_url_file.*mlxd\[redis\]"):
        Limits(given, Metrics(), None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", redis.asyncio)
    monkeypatch.setitem(sys.modules, "service.limits.breaker", None)  # ours: a bug, and not an extra
    with pytest.raises(ImportError):
        Limits(given, Metrics(), None)


# Leaks ------------------------------------------------------------------------------------------------------


async def test_a_leak_is_swept_everywhere_told_and_counted(tmp_path: Path) -> None:
    given = settings(default={"daily_tokens": 1000})
    async with kept(tmp_path, given=given) as world:
        leaked = await world.reserve(LOCAL, 60)
        world.monotonic += given.engine.request_timeout + given.engine.drain_timeout + given.http.write_timeout
        world.monotonic += SWEEP_MARGIN
        fresh = await world.reserve(LOCAL, 40)
        assert world.limits.sweep() == 0
        world.monotonic += 0.1
        with structlog.testing.capture_logs() as lines:
            assert world.limits.sweep() == 1
        assert [(line["event"], line["principal"], line["tokens"]) for line in lines] == [
            ("reservation_swept", "local", 60)
        ]
        assert world.count("mlxd_limits_reservations_swept_total") == 1
        assert (world.limits._ledger.open, world.limits._quotas.open) == (1, 1)
        assert not leaked.settle(0)
        assert fresh.settle(40)
        assert (world.limits._ledger.open, world.limits._quotas.open) == (0, 0)


async def test_it_sweeps_by_itself_while_it_runs() -> None:
    turns: asyncio.Queue[float] = asyncio.Queue()
    go = asyncio.Semaphore(0)

    async def sleep(seconds: float) -> None:
        await turns.put(seconds)
        await go.acquire()

    world = World(sleep=sleep)
    async with world.limits.run():
        await turns.get()
        await world.reserve(LOCAL, 60)
        world.monotonic += 10_000
        go.release()
        assert await turns.get() == limiter.SWEEP_INTERVAL
        assert world.count("mlxd_limits_reservations_swept_total") == 1


async def test_a_part_that_dies_is_logged_and_counted() -> None:
    async def sleep(_: float) -> None:
        raise ZeroDivisionError

    world = World(sleep=sleep)
    with structlog.testing.capture_logs() as lines:
        async with world.limits.run():
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
    assert [(line["event"], line["task"]) for line in lines] == [("limits_task_died", "limits-sweep")]
    assert world.count("mlxd_internal_errors_total", where="limits") == 1


# The end ----------------------------------------------------------------------------------------------------


async def test_what_was_noted_is_written_before_it_ends(tmp_path: Path) -> None:
    async with kept(tmp_path) as world, world.limits.run():
        for number in range(1200):
            world.limits.note(row(number))
        assert world.count("mlxd_usage_rows_pending") == 1200
    assert used(tmp_path) == 12_000
    assert world.count("mlxd_usage_rows_pending") == 0


async def test_requests_that_were_cut_are_waited_for_before_the_last_rows_are_written(tmp_path: Path) -> None:
    async with kept(tmp_path) as world:
        started = asyncio.Event()

        async def request() -> None:
            held = await world.reserve(LOCAL, 60)
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                held.settle(7)
                world.limits.note(row(1, tokens=7))

        async with world.limits.run():
            running = asyncio.create_task(request())
            await started.wait()
            running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert used(tmp_path) == 7


async def test_neither_a_leak_nor_a_database_that_hangs_keeps_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiter, "CLOSE_TIMEOUT", 0.05)
    import threading

    go_on = threading.Event()
    async with kept(tmp_path) as world:
        with structlog.testing.capture_logs() as lines:
            async with world.limits.run():
                await world.reserve(LOCAL, 60)
                assert world.storage is not None
                world.storage.write(lambda _: go_on.wait(30))
                world.limits.note(row(1))
        go_on.set()
    events = [line["event"] for line in lines]
    assert "reservations_left_open" in events
    assert "usage_rows_lost" in events


async def test_a_retention_in_days_is_kept_to(tmp_path: Path) -> None:
    async with kept(tmp_path) as world:
        assert world.storage is not None
        old, young = row(1, at=NOON - 401 * 86400), row(2, at=NOON - 399 * 86400)
        await asyncio.wrap_future(world.storage.write(lambda connection: usage.append(connection, [old, young])))
        assert world.limits._usage is not None
        await world.limits._usage._forget_some()
    assert used(tmp_path) == 10


# Clocks, and many -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_jump_of_the_wall_clock_blocks_nobody_and_serves_nobody_more(jump: float, tmp_path: Path) -> None:
    """Forth and back. Only quotas go by wall time, and an hour within a day changes nothing for them."""
    numbers = {
        "requests_per_minute": 10, "request_burst": 10, "tokens_per_minute": 600, "daily_tokens": 1200,
    }  # fmt: skip
    async with kept(tmp_path, given=settings(default=numbers)) as world:
        codes = [await world.hit(LOCAL) for _ in range(11)]
        assert codes == [None] * 10 + ["rate_limit_requests"]
        (await world.reserve(LOCAL, 600)).settle(600)
        for wall in (NOON + jump, NOON):
            world.wall = wall
            assert await world.hit(LOCAL) == "rate_limit_requests"
            with pytest.raises(TokenLimited):
                await world.reserve(LOCAL, 1)
        world.monotonic += 60.0  # one window later everything is as it was at first
        assert [await world.hit(LOCAL) for _ in range(11)] == codes
        (await world.reserve(LOCAL, 600)).settle(600)
        world.monotonic += 60.0
        with pytest.raises(QuotaExhausted):
            await world.reserve(LOCAL, 1)


@pytest.mark.no_cover  # many turns of what others cover
async def test_a_thousand_principals_and_ten_thousand_strangers_cost_no_more_than_a_few() -> None:
    """Memory is bounded by what is remembered at all; the median of a request stays where it was."""
    world = World(settings(default={"requests_per_minute": 1_000_000, "request_burst": 1_000_000}))

    async def one(name: str) -> None:
        principal = who(name)
        await world.limits.hit(principal)
        (await world.reserve(principal, 60)).settle(30)
        world.monotonic += 0.001

    async def median(names: list[str]) -> float:
        taken = []
        for name in names:
            begin = time.perf_counter()
            await one(name)
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken) * 1e6

    few = await median([f"key:{number % 10}" for number in range(2000)])
    tracemalloc.start()
    try:
        await median([f"key:{number % 1000}" for number in range(10_000)])
        first, _ = tracemalloc.get_traced_memory()
        begin = time.perf_counter()
        for number in range(10_000):
            world.limits.stranger(f"2001:db8:{number:x}::1")
        stranger = (time.perf_counter() - begin) * 100
        for number in range(10_000):
            world.limits.stranger(f"2001:db9:{number:x}::1")
        last, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    untraced = await median([f"key:{number % 1000}" for number in range(5000)])
    print(
        f"\nhit, reserve and settle: {few:.0f} us among 10 principals, {untraced:.0f} us among 1000; {stranger:.0f} us "
        f"a stranger; {first / 1e6:.1f} MB after 1000 principals, {last / 1e6:.1f} MB after 20 000 strangers"
    )
    assert untraced < 3 * few + 50
    assert len(world.limits._strangers) == MAX_ADDRESSES
    assert first < 10e6
    assert last - first < 10e6
    assert len(world.limits._requests._local._limiter.storage) < MAX_KEYS  # type: ignore[arg-type]


async def test_plans_that_are_changed_hold_from_the_next_request_and_nothing_changes_before() -> None:
    world = World(settings(default={"concurrent_requests": 2}))
    held = await world.reserve(who(), 10)
    put_in_force = world.limits.prepared(
        LimitsSettings(
            plans={"default": PlanSettings(concurrent_requests=1), "gold": PlanSettings()},
            failed_authentication_per_minute=1,
        )
    )
    with pytest.raises(UnknownLimits):
        world.limits.plan_of(who(plan="gold"))
    put_in_force()
    assert world.limits.plan_of(who(plan="gold")).concurrent_requests == 256
    with pytest.raises(TooManyConcurrent):
        await world.reserve(who(), 10)
    held.settle(10)
    (await world.reserve(who(), 10)).settle(0)
    assert [world.limits.stranger("203.0.113.9") is None for _ in range(2)] == [True, False]
    assert world.limits.open == 0


async def test_without_a_database_a_quota_is_refused_at_a_change_too() -> None:
    world = World()
    with pytest.raises(ConfigurationError, match="quota"):
        world.limits.prepared(LimitsSettings(plans={"default": PlanSettings(daily_tokens=5)}))
    await world.limits.flush()


async def test_a_flush_writes_what_is_noted(tmp_path: Path) -> None:
    async with kept(tmp_path) as world:
        world.limits.note(row(1))
        await world.limits.flush()
        assert world.count("mlxd_usage_rows_pending") == 0
