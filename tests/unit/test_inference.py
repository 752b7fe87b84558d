"""From a request to the engine and back to the books: what is reserved, charged and kept, however it ends."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import structlog

from service.api.answer import Deltas
from service.auth.principal import LOCAL, Principal, Scope
from service.engine.backend import Row, StepResult
from service.engine.engine import Engine, EngineState
from service.engine.generation import Generation, SamplingParams
from service.engine.telemetry import Telemetry
from service.engine.tokenizer import SHORT
from service.errors import (
    CredentialRevoked,
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    ServiceError,
    TokenLimited,
    TooManyConcurrent,
    UnknownLimits,
)
from service.inference import Ask, Inference
from service.limits.limiter import Held, Limits
from service.limits.states import TokenState
from service.observability.metrics import Metrics
from service.observability.request_metrics import RequestMetrics
from service.settings import EngineSettings, LimitsSettings, PlanSettings, Settings
from service.storage.usage import UsageRow
from tests.fakes import EOS, FakeBackend, fake_tokenizer, spelling

pytestmark = pytest.mark.anyio

RICH = PlanSettings(tokens_per_minute=10**9, concurrent_requests=10**6)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class KeptLimits(Limits):
    """Remembers what was held and noted. `look` is asked at each note."""

    look: Callable[[str], int] = staticmethod(lambda _: 0)

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.held: list[Held] = []
        self.rows: list[tuple[UsageRow, int]] = []

    async def reserve(self, *given: Any, **more: Any) -> Held:
        held = await super().reserve(*given, **more)
        self.held.append(held)
        return held

    def note(self, row: UsageRow) -> None:
        super().note(row)
        self.rows.append((row, self.look(row.request_id)))

    @property
    def settled(self) -> list[int | None]:
        return [held._hold.reservation.settled for held in self.held]


class World:
    """Inference over the real engine and a scripted backend, for LOCAL on `plan`."""

    def __init__(self, backend: FakeBackend, plan: PlanSettings = RICH, **engine: Any) -> None:
        self.settings = Settings(engine=EngineSettings(**engine), limits=LimitsSettings(plans={"default": plan}))
        self.backend = backend
        self.clock = Clock()
        self.metrics = Metrics()
        self.limits = KeptLimits(self.settings, self.metrics, None, clock=self.clock)
        self.engine = Engine(backend, self.settings.engine, telemetry=Telemetry(self.metrics), clock=self.clock)
        self.inference = Inference(
            self.engine,
            self.settings,
            self.limits,
            observers=[RequestMetrics(self.metrics, max_consumers=5)],
            now=lambda: 1_900_000_000.0,
            new_id=lambda: "row",
        )

    async def start(self, stack: AsyncExitStack, prompt: str = "abc", **more: Any) -> list[Generation]:
        return await self.inference.start(ask(prompt, **more), LOCAL, stack)

    async def whole(self, prompt: str = "abc", **more: Any) -> None:
        """One request from its start to its end."""
        async with AsyncExitStack() as stack:
            await read(await self.start(stack, prompt, **more))

    @property
    def open(self) -> int:
        return self.limits._ledger.open

    def check_metrics(self) -> None:
        """The counters of the generation thread, and those of the records, hold exactly what the rows of usage do."""
        rows, count = [row for row, _ in self.limits.rows], self.metrics.registry.get_sample_value
        consumer = {"tenant": LOCAL.tenant, "key_id": ""}
        live = {"prompt": "prompt_tokens", "cached": "prompt_tokens_cached", "completion": "generation_tokens"}
        for kind, series in live.items():
            used = sum(getattr(row, f"{kind}_tokens") for row in rows)
            assert count(f"mlxd_{series}_total") == used
            assert (count("mlxd_consumer_tokens_total", {**consumer, "kind": kind}) or 0) == used
        assert (count("mlxd_consumer_requests_total", consumer) or 0) == len(rows)
        assert count("mlxd_request_queue_time_seconds_count") == sum(row.rows for row in rows)


def ask(prompt: str = "abc", **more: Any) -> Ask:
    given = {"request_id": prompt, "endpoint": "/generate", "prompts": (prompt,), "max_tokens": 4, **more}
    return Ask(**{"default_max_tokens": 100, "told": lambda _: None, "over": lambda _: None, **given})


async def read(generations: list[Generation]) -> None:
    deltas = Deltas(generations)
    try:
        async with asyncio.timeout(10):
            while not deltas.finished:
                await deltas.next()
    finally:
        await deltas.close()


@asynccontextmanager
async def running(backend: FakeBackend, plan: PlanSettings = RICH, **engine: Any) -> AsyncIterator[World]:
    world = World(backend, plan, **engine)
    await world.engine.start()
    await world.engine.wait(EngineState.READY)
    try:
        yield world
    finally:
        if backend.gate is not None:
            backend.gate.release(5000)
        await world.engine.stop()
        world.inference.close()
        world.limits._ledger.check_integrity()
        assert world.open == 0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.0005)


# What is charged, and what is kept --------------------------------------------------------------------------


async def test_a_request_is_charged_what_it_used_and_kept_as_one_row() -> None:
    who = Principal(id="key:a", tenant="acme", scopes=frozenset(Scope), key_id="a")
    async with running(FakeBackend(script=spelling("Hi"))) as world, AsyncExitStack() as stack:
        given = ask("abc", stream=True, max_tokens=50, request_id="r-1")
        generations = await world.inference.start(given, who, stack)
        [held] = world.limits.held
        assert held._hold.reservation.tokens == 3 + 50
        await read(generations)
        world.clock.now += 2.5
        await stack.aclose()
        [(row, _)] = world.limits.rows
        assert world.limits.settled == [3 + 3]
    assert row == UsageRow(
        id="row",
        at=1_900_000_000.0,
        request_id="r-1",
        principal="key:a",
        tenant="acme",
        key_id="a",
        model="fake",
        endpoint="/generate",
        stream=True,
        rows=1,
        prompt_tokens=3,
        cached_tokens=0,
        completion_tokens=3,
        queue_seconds=0.0,
        time_to_first_token=0.0,
        duration_seconds=2.5,
        finish_reason="stop",
    )


async def test_every_row_prefills_the_prompt_so_every_row_is_charged_for_it() -> None:
    async with running(FakeBackend()) as world:
        await world.whole("abc", prompts=("abc", "de"), n=2, max_tokens=5)
        assert [held._hold.reservation.tokens for held in world.limits.held] == [2 * (3 + 5) + 2 * (2 + 5)]
        assert world.limits.settled == [2 * (3 + 5) + 2 * (2 + 5)]
        [(row, _)] = world.limits.rows
    assert (row.rows, row.prompt_tokens, row.completion_tokens, row.finish_reason) == (4, 10, 20, "length")


async def test_several_prompts_are_one_of_the_concurrent_requests() -> None:
    async with running(FakeBackend(), RICH.model_copy(update={"concurrent_requests": 1})) as world:
        await world.whole(prompts=("a", "b", "c"), n=2)
        assert len(world.limits.rows) == 1


async def test_the_worst_row_says_how_the_request_ended() -> None:
    def script(row: Row, index: int) -> int:
        return EOS if index == 1 and len(row.prompt) == 3 else 7

    async with running(FakeBackend(script=script)) as world:
        await world.whole(prompts=("abc", "d"))
        assert [row.finish_reason for row, _ in world.limits.rows] == ["length"]
        world.backend.failing = lambda row: len(row.prompt) == 1
        with pytest.raises(GenerationFailed):
            await world.whole(prompts=("abc", "d"))
        assert [row.finish_reason for row, _ in world.limits.rows] == ["length", "generation_failed"]


async def test_one_that_leaves_before_its_prefill_pays_nothing_and_is_kept_as_cancelled() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate), max_rows=1) as world:
        async with AsyncExitStack() as first, AsyncExitStack() as second:
            [generation] = await world.start(first, "running", max_tokens=4000)
            await until(world.backend.inserted.is_set)
            await world.start(second, "waiting")
            await second.aclose()
            gate.release(3)  # its prefill, and two tokens
            await until(lambda: generation.meter.completion_tokens == 2)
            await first.aclose()
        assert world.limits.settled == [7 + 2, 0]
        assert [(row.request_id, row.finish_reason) for row, _ in world.limits.rows] == [
            ("waiting", "cancelled"),
            ("running", "cancelled"),
        ]
        waiting = world.limits.rows[0][0]
        assert (waiting.queue_seconds, waiting.time_to_first_token) == (None, None)


async def test_a_revoked_credential_is_charged_up_to_then() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as world, AsyncExitStack() as stack:
        [generation] = await world.start(stack, max_tokens=4000)
        gate.release(2)
        await generation.read()
        generation.fail(CredentialRevoked("revoked"))
        await stack.aclose()
        assert world.limits.settled == [3 + 1]
        assert [row.finish_reason for row, _ in world.limits.rows] == ["credential_revoked"]


# Refusals ---------------------------------------------------------------------------------------------------


async def test_what_the_engine_refuses_costs_nothing_and_is_not_kept() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate), max_rows=1, max_queue=0) as world, AsyncExitStack() as stack:
        await world.start(stack)
        async with AsyncExitStack() as refused:
            with pytest.raises(QueueFull):
                await world.start(refused)
            assert world.limits.settled == [None, 0]  # at once, not when the answer has been sent
        assert world.open == 1
        assert world.limits.rows == []


@pytest.mark.parametrize(
    ("plan", "asked", "code", "param"),
    [
        ({"max_prompt_tokens": 2}, {}, "exceeds_prompt_limit", "prompt"),
        ({"max_prompt_tokens": 2}, {"prompts": ([5, 6, 7],)}, "exceeds_prompt_limit", "prompt"),
        ({"max_output_tokens": 3}, {}, "exceeds_output_limit", "max_tokens"),
        ({"tokens_per_minute": 6}, {}, "exceeds_token_limit", "max_tokens"),
    ],
)
async def test_what_the_plan_never_allows_is_400(
    plan: dict[str, int], asked: dict[str, Any], code: str, param: str
) -> None:
    async with running(FakeBackend(), RICH.model_copy(update=plan)) as world:
        with pytest.raises(InvalidRequest) as caught:
            await world.whole(**asked)
        assert (caught.value.code, caught.value.param) == (code, param)
        assert world.limits.settled == []


async def test_a_prompt_that_must_be_too_long_for_the_plan_is_not_even_encoded() -> None:
    async with running(FakeBackend(), RICH.model_copy(update={"max_prompt_tokens": 2})) as world:
        world.inference._encoders.shutdown()
        with pytest.raises(InvalidRequest, match=r"at least \d+ tokens; your plan allows 2"):
            await world.whole(prompts=(), messages=[{"role": "user", "content": "x" * 2000}])


async def test_a_short_prompt_needs_no_thread_and_a_long_one_is_not_encoded_on_the_loop() -> None:
    async with running(FakeBackend()) as world:
        world.inference._encoders.shutdown()
        await world.whole(prompts=("x" * SHORT,), max_tokens=1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            await world.whole(prompts=("x" * (SHORT + 1),), max_tokens=1)


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        ({"prompts": ([5, 259],)}, "invalid_request", "prompt"),
        ({"prompts": ("",)}, "invalid_request", "prompt"),
        ({"prompts": ([5] * 4096,)}, "context_length_exceeded", "prompt"),
        ({"prompts": (), "messages": [{"role": "user", "content": "Hi"}]}, "invalid_request", "messages"),
        ({"max_tokens": 16385}, "invalid_request", "max_tokens"),
        ({"sampling": SamplingParams(logit_bias=((259, 1.0),))}, "invalid_request", "logit_bias"),
        ({"model": "another"}, "model_not_found", "model"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_anything_is_held(
    asked: dict[str, Any], code: str, param: str
) -> None:
    async with running(FakeBackend()) as world:
        with pytest.raises(ServiceError) as caught:
            await world.whole(**asked)
        assert (caught.value.code, caught.value.param) == (code, param)
        assert world.limits.held == []


async def test_each_choice_has_its_own_dice() -> None:
    async with running(FakeBackend()) as world, AsyncExitStack() as stack:
        rows = await world.start(stack, prompts=("a", "b"), n=2, sampling=SamplingParams(seed=7))
        assert [row.request.sampling.seed for row in rows] == [7, 8, 7, 8]


async def test_models_are_those_that_a_principal_may_use() -> None:
    async with running(FakeBackend()) as world:
        one = replace(LOCAL, models=frozenset({"default"}))
        none = replace(LOCAL, models=frozenset({"another"}))
        assert world.inference.models_of(LOCAL) == ("fake", "default")
        assert (world.inference.models_of(one), world.inference.models_of(none)) == (("default",), ())


async def test_without_max_tokens_a_request_gets_what_its_plan_allows() -> None:
    async with running(FakeBackend(), RICH.model_copy(update={"max_output_tokens": 3})) as world:
        await world.whole(max_tokens=None)
        assert world.limits.settled == [3 + 3]


async def test_a_principal_without_a_plan_and_one_that_asks_too_much_at_once() -> None:
    plan = RICH.model_copy(update={"concurrent_requests": 2, "tokens_per_minute": 20})
    async with running(FakeBackend(gate=threading.Semaphore(0)), plan) as world, AsyncExitStack() as stack:
        with pytest.raises(UnknownLimits):
            await world.inference.start(ask(), replace(LOCAL, plan="gone"), stack)
        await world.start(stack)
        with pytest.raises(TokenLimited):
            await world.start(stack, max_tokens=17)
        await world.start(stack)
        with pytest.raises(TooManyConcurrent):
            await world.start(stack)


@pytest.mark.parametrize(("limit", "wins"), [("concurrent_requests", 10), ("tokens_per_minute", 10 * 7)])
async def test_of_100_that_race_for_10_exactly_10_run(limit: str, wins: int) -> None:
    plan = RICH.model_copy(update={limit: wins})
    async with running(FakeBackend(gate=threading.Semaphore(0)), plan) as world, AsyncExitStack() as stack:
        results = await asyncio.gather(*(world.start(stack) for _ in range(100)), return_exceptions=True)
        assert sum(isinstance(result, list) for result in results) == 10
        assert sum(isinstance(result, TokenLimited | TooManyConcurrent) for result in results) == 90
        assert world.open == 10


async def test_who_asked_is_told_where_a_shared_budget_stands() -> None:
    told: list[TokenState] = []
    async with running(FakeBackend()) as world:
        await world.whole(told=told.append)
    assert told == []  # there is none


# Random cancels and faults ----------------------------------------------------------------------------------


class Stepped(FakeBackend):
    """Waits before each step until it is let through, and keeps its own account of what each prompt has used."""

    def __init__(self) -> None:
        super().__init__(before_step=self._turn)
        self.used: Counter[tuple[int, ...]] = Counter()
        self.turns = threading.Semaphore(0)
        self.waits = threading.Event()
        self.raises = 0

    def _turn(self, _: int) -> None:
        self.waits.set()
        self.turns.acquire()
        if self.raises:
            self.raises -= 1
            raise RuntimeError("scripted")

    def insert(self, row: Row) -> None:
        def begins(cached: int) -> None:
            self.used[row.prompt] += len(row.prompt)
            row.on_prefill(cached)

        super().insert(replace(row, on_prefill=begins))

    def step(self) -> StepResult:
        prompts = {uid: live.row.prompt for uid, live in self.rows.items()}
        result = super().step()
        for token in result.tokens:
            self.used[prompts[token.uid]] += 1
        return result


ENDINGS = ("finish", "drain", "stop", "die")


class Chaos:
    """Requests that come, stay or leave, and faults of the engine, all by one generator of chance.

    Everything is done while the engine stands still before a step, so that the backend's own account says exactly
    what a request had used when it ended.
    """

    def __init__(self, world: World, backend: Stepped, rng: random.Random) -> None:
        self.rng = rng
        self.encode = fake_tokenizer().encode
        self.world = world
        self.backend = backend
        self.outcomes: Counter[str] = Counter()
        self.tasks: list[asyncio.Task[None]] = []
        world.limits.look = self._used

    def _used(self, request_id: str) -> int:
        return self.backend.used[tuple(self.encode(request_id))]

    async def run(self) -> None:
        for _ in range(self.rng.randint(5, 40)):
            await self._still()
            self._act()
            await self._unwind()
            if self.backend.waits.is_set():
                self.backend.waits.clear()
                self.backend.turns.release()
        await self._still()
        self.how = self.rng.choice(ENDINGS)
        await self._end(self.how)

    async def _still(self) -> None:
        """Until the engine waits before a step, or has nothing to do, and every reader has read."""

        def still() -> bool:
            status = self.world.engine.status()
            return self.backend.waits.is_set() or not (status.waiting or status.running)

        await until(still)
        await self._unwind()

    async def _unwind(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    def _act(self) -> None:
        match self.rng.choices(("come", "leave", "revoke", "row", "step", "late", "nothing"), (9, 4, 1, 1, 1, 1, 4))[0]:
            case "come":
                for _ in range(self.rng.randint(1, 4)):
                    self.tasks.append(asyncio.create_task(self._request(f"{len(self.tasks):03}")))
            case "leave" if self.tasks:
                self.rng.choice(self.tasks).cancel()
            case "revoke":
                for generation in list(self.world.engine._live)[:1]:
                    generation.fail(CredentialRevoked("revoked"))
            case "row":
                chosen = self.rng.randint(0, 2)
                self.backend.failing = lambda row: row.uid % 3 == chosen and row.uid > 0
            case "step":
                self.backend.raises = 1
            case "late":
                self.world.clock.now += self.rng.choice((1.0, 700.0))
            case _:
                self.backend.failing = lambda _: False

    async def _request(self, name: str) -> None:
        asked = {"n": self.rng.randint(1, 3), "max_tokens": self.rng.randint(1, 12)}
        before = len(self.world.limits.held)
        outcome = "whole"
        try:
            await self.world.whole(name, **asked)
        except asyncio.CancelledError:
            outcome = "cancelled"
        except ServiceError as error:
            outcome = error.code
        self.outcomes[outcome] += 1
        assert before <= len(self.world.limits.held)

    async def _end(self, how: str) -> None:
        ending: asyncio.Task[None] | None = None
        self.backend.failing = lambda _: False
        match how:
            case "drain":
                ending = asyncio.create_task(self.world.engine.drain(0.0))
            case "stop":
                ending = asyncio.create_task(self.world.engine.stop())
            case "die":
                self.backend.raises = 1000
        await self._unwind()
        self.backend.turns.release(5000)
        await asyncio.wait_for(asyncio.gather(*self.tasks, *([ending] if ending else [])), 20)


async def test_whatever_happens_each_request_is_settled_once_for_exactly_what_it_used(
    count: Callable[[str, int, int], int],
) -> None:
    outcomes: Counter[str] = Counter()
    requests = 0
    with structlog.testing.capture_logs():  # tracebacks of scripted faults, which are slow to print
        for seed in range(count("random runs of requests, cancels and faults", 50, 2000)):
            backend = Stepped()
            world = World(
                backend,
                RICH.model_copy(update={"concurrent_requests": 12, "tokens_per_minute": 120}),
                max_rows=4,
                max_queue=8,
            )
            await world.engine.start()
            await world.engine.wait(EngineState.READY)
            chaos = Chaos(world, backend, random.Random(seed))
            await chaos.run()
            assert world.open == 0, seed
            assert None not in world.limits.settled, seed
            charged = [row.prompt_tokens + row.completion_tokens for row, _ in world.limits.rows]
            assert charged == [used for _, used in world.limits.rows], seed
            # Each was settled once, for that; those that the engine refused have no row, and were settled for nothing.
            assert sorted(filter(None, world.limits.settled)) == sorted(filter(None, charged)), seed
            assert sum(backend.used.values()) >= sum(charged), seed
            world.check_metrics()
            world.limits._ledger.check_integrity()
            backend.turns.release(5000)
            await world.engine.stop()
            world.inference.close()
            outcomes += chaos.outcomes
            requests += len(chaos.tasks)
    print(f"\n{requests} requests: {dict(outcomes)}")
    assert {"whole", "cancelled", "generation_failed", "draining", "engine_failed"} <= outcomes.keys()
    assert {"credential_revoked", "deadline_exceeded", "rate_limit_tokens", "queue_full"} <= outcomes.keys()
