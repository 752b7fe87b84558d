"""The engine on a scripted backend: states, delivery, cancellation, deadlines, drain, and every way to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.engine.backend import ModelInfo
from service.engine.engine import Engine, EngineState
from service.engine.generation import Delta, FinishReason, Generation, GenerationRequest
from service.engine.telemetry import Telemetry
from service.errors import (
    CredentialRevoked,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    GenerationFailed,
    ModelUnavailable,
    NotReady,
    QueueFull,
)
from service.observability.metrics import Metrics
from service.settings import EngineSettings
from tests.fakes import FakeBackend, spelling

FOREVER = 100_000


class Clock:
    """Monotonic seconds that move when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(
    *, max_tokens: int = 4, stop: tuple[str, ...] = (), deadline: float | None = None, **more: Any
) -> GenerationRequest:
    return GenerationRequest(
        request_id="r", prompt=more.pop("prompt", (5, 6)), max_tokens=max_tokens, stop=stop, deadline=deadline, **more
    )


@asynccontextmanager
async def running(
    backend: FakeBackend,
    *,
    clock: Callable[[], float] | None = None,
    metrics: Metrics | None = None,
    canary_interval: float = 0.0,
    **options: Any,
) -> AsyncIterator[Engine]:
    """An engine that is ready; at the end it must hold nothing."""
    engine = Engine(
        backend,
        EngineSettings(**options),
        telemetry=Telemetry(metrics or Metrics()),
        clock=clock or Clock(),
        canary_interval=canary_interval,
    )
    await engine.start()
    await engine.wait(EngineState.READY, EngineState.FAILED)
    try:
        yield engine
    finally:
        if backend.gate is not None:
            backend.gate.release(FOREVER)
        await engine.stop()
        assert not engine._live
        assert engine._worker is None or engine._worker.idle()


async def drained(generation: Generation) -> Delta:
    """Everything a generation says, as one delta."""
    async with asyncio.timeout(10):
        whole = await generation.read()
        while not whole.final:
            whole = whole.merged(await generation.read())
    generation.close()
    return whole


async def test_the_status_says_how_far_loading_is_and_a_late_download_does_not_lead_back() -> None:
    loop = asyncio.get_running_loop()
    seen: list[tuple[str, str, int, int]] = []

    async def look() -> None:
        now = engine.status()
        seen.append((now.state.value, now.detail, now.done, now.total))

    class Looked(FakeBackend):
        def look(self) -> None:
            """What was reported before arrives on the loop before this."""
            asyncio.run_coroutine_threadsafe(look(), loop).result(10)

        def load(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> ModelInfo:
            self.download = progress
            info = super().load(progress)
            self.look()
            return info

        def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
            self.look()
            super().warm_up(progress)
            self.download("a late bar", 1, 2)
            self.look()

    engine = Engine(Looked(), EngineSettings(), telemetry=Telemetry(Metrics()), clock=Clock())
    await look()
    await engine.start()
    await engine.wait(EngineState.READY)
    await look()
    await engine.stop()
    assert seen == [
        ("starting", "loading the model", 0, 0),
        ("starting", "fake weights", 1, 4),
        ("warming", "warming up", 0, 0),
        ("warming", "fake (0/1)", 0, 1),
        ("ready", "ready", 0, 0),
    ]


async def test_a_request_runs_to_its_limit() -> None:
    async with running(FakeBackend()) as engine:
        (generation,) = engine.submit([request(max_tokens=4)])
        whole = await drained(generation)
    assert whole.text == "lmno"
    assert whole.finish_reason is FinishReason.LENGTH
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 4)


async def test_end_of_sequence_has_no_text() -> None:
    async with running(FakeBackend(script=spelling("héllo 🙂"))) as engine:
        whole = await drained(engine.submit([request(max_tokens=100)])[0])
    assert whole.text == "héllo 🙂"
    assert whole.finish_reason is FinishReason.STOP


async def test_a_stop_string_ends_a_row_and_is_not_delivered() -> None:
    backend = FakeBackend(script=spelling("one two three"))
    async with running(backend) as engine:
        whole = await drained(engine.submit([request(max_tokens=100, stop=("wo t", "zzz"))])[0])
        assert whole.text == "one t"
        assert whole.finish_reason is FinishReason.STOP
        whole = await drained(engine.submit([request(max_tokens=100, stop=("three!",))])[0])
        assert whole.text == "one two three"
    assert backend.rows == {}


async def test_characters_are_never_split() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(script=spelling("a🙂b"), gate=gate)) as engine:
        (generation,) = engine.submit([request(max_tokens=100)])
        texts = []
        for _ in range(8):
            gate.release()
        while not generation.finished:
            texts.append((await generation.read()).text)
        generation.close()
    assert "".join(texts) == "a🙂b"
    assert all("�" not in text for text in texts)


async def test_the_length_limit_may_cut_a_character_which_is_then_shown_as_such() -> None:
    async with running(FakeBackend(script=spelling("a🙂b"))) as engine:
        whole = await drained(engine.submit([request(max_tokens=3)])[0])
    assert whole.text.startswith("a�")


async def test_rows_join_and_leave_a_running_batch() -> None:
    gate = threading.Semaphore(0)
    backend = FakeBackend(gate=gate)
    async with running(backend) as engine:
        (first,) = engine.submit([request(max_tokens=50)])
        gate.release(5)
        assert (await first.read()).text.startswith("l")
        (second,) = engine.submit([request(max_tokens=2, prompt=(1,))])
        gate.release(10)
        assert (await drained(second)).text == "bc"
        assert not first.finished
        first.close()
        gate.release(3)
    assert backend.rows == {}


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
async def test_closing_gives_everything_back_in_every_phase(phase: str) -> None:
    gate = threading.Semaphore(0)
    backend = FakeBackend(gate=gate, prefill_steps=3)
    async with running(backend, max_rows=1) as engine:
        (victim,) = engine.submit([request(max_tokens=FOREVER)])
        other = None
        if phase == "queue":
            await asyncio.to_thread(backend.inserted.wait, 10)
            other, victim = victim, engine.submit([request(max_tokens=2, prompt=(1,))])[0]
            assert engine.status().waiting == 1
        elif phase == "decode":
            gate.release(4)
            await victim.read()
        else:
            gate.release(1)
        victim.close()
        if other is not None:
            assert engine.status().waiting == 0, "a waiting row leaves at once"
            other.close()
        (later,) = engine.submit([request(max_tokens=1, prompt=(2,))])
        gate.release(20)
        assert (await drained(later)).text == "c"


async def test_a_deadline_ends_the_request_and_names_the_phase() -> None:
    clock, gate = Clock(), threading.Semaphore(0)
    async with running(FakeBackend(gate=gate), clock=clock, max_rows=1) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER, deadline=110.0)])
        (waits,) = engine.submit([request(deadline=105.0)])
        gate.release(3)
        assert (await runs.read()).text
        clock.now = 106.0
        gate.release(1)
        late = (await drained(waits)).error
        assert isinstance(late, DeadlineExceeded)
        assert late.phase == "queue"
        clock.now = 111.0
        gate.release(2)
        late = (await drained(runs)).error
        assert isinstance(late, DeadlineExceeded)
        assert late.phase == "decode"


async def test_a_full_queue_refuses_and_stays_ready() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate), max_rows=1, max_queue=1) as engine:
        (first,) = engine.submit([request()])
        with pytest.raises(QueueFull):
            engine.submit([request(), request()])
        (second,) = engine.submit([request()])
        with pytest.raises(QueueFull):
            engine.submit([request()])
        assert engine.state is EngineState.READY
        gate.release(40)
        assert (await drained(first)).final
        assert (await drained(second)).final


async def test_n_rows_of_one_request_run_together() -> None:
    async with running(FakeBackend()) as engine:
        wholes = [await drained(g) for g in engine.submit([request() for _ in range(3)])]
    assert [w.text for w in wholes] == ["lmno"] * 3


async def test_a_model_that_cannot_be_batched_runs_one_at_a_time() -> None:
    seen: list[int] = []
    backend = FakeBackend(batchable=False)
    backend.before_step = lambda _: seen.append(len(backend.rows))
    async with running(backend, max_rows=8) as engine:
        generations = engine.submit([request() for _ in range(3)])
        assert [(await drained(g)).text for g in generations] == ["lmno"] * 3
    assert max(seen) == 1


async def test_one_rows_exception_fails_that_row_only() -> None:
    backend = FakeBackend(failing=lambda row: row.prompt == (13,))
    async with running(backend) as engine:
        good, bad = engine.submit([request(max_tokens=30), request(prompt=(13,))])
        assert isinstance((await drained(bad)).error, GenerationFailed)
        assert (await drained(good)).finish_reason is FinishReason.LENGTH
        assert engine.state is EngineState.READY
    assert backend.rebuilds == 0


async def test_a_lost_step_fails_its_rows_and_spares_the_queue() -> None:
    def lose(step: int) -> None:
        if step == 3:
            raise RuntimeError("lost")

    backend = FakeBackend(before_step=lose)
    async with running(backend, max_rows=1) as engine:
        first, second = engine.submit([request(), request()])
        failed = (await drained(first)).error
        assert isinstance(failed, GenerationFailed)
        assert failed.should_retry is False
        assert (await drained(second)).text == "lmno"
        assert engine.state is EngineState.READY
    assert backend.rebuilds == 1


async def test_a_failing_canary_ends_the_engine_and_nobody_waits() -> None:
    def lose(step: int) -> None:
        if step >= 3:
            raise RuntimeError("lost for good")

    async with running(FakeBackend(before_step=lose), max_rows=1) as engine:
        first, second = engine.submit([request(), request()])
        assert isinstance((await drained(first)).error, GenerationFailed)
        assert isinstance((await drained(second)).error, EngineFailed)
        assert await engine.wait(EngineState.FAILED) is EngineState.FAILED
        with pytest.raises(EngineFailed):
            engine.submit([request()])


async def test_a_canary_without_a_token_ends_the_engine() -> None:
    def lose(step: int) -> None:
        if step == 3:
            raise RuntimeError("lost")

    backend = FakeBackend(before_step=lose)
    async with running(backend) as engine:
        backend.prefill_steps = 1000
        assert isinstance((await drained(engine.submit([request(max_tokens=9)])[0])).error, GenerationFailed)
        assert await engine.wait(EngineState.FAILED)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nobody_waits_on_a_thread_that_died_of_the_unforeseen() -> None:
    class Unforeseen(BaseException):
        pass

    def die(step: int) -> None:
        if step == 2:
            raise Unforeseen

    async with running(FakeBackend(before_step=die)) as engine:
        (generation,) = engine.submit([request()])
        assert isinstance((await drained(generation)).error, EngineFailed)
        assert await engine.wait(EngineState.FAILED)


async def test_a_missing_model_is_a_failure_with_its_reason() -> None:
    def missing() -> None:
        raise ModelUnavailable("no such folder; do this")

    async with running(FakeBackend(before_load=missing)) as engine:
        assert engine.state is EngineState.FAILED
        assert engine.failure is not None
        assert "do this" in engine.status().detail


async def test_before_it_is_ready_the_engine_says_so() -> None:
    go = threading.Event()
    backend = FakeBackend(before_load=lambda: go.wait(10))
    engine = Engine(backend, EngineSettings(), telemetry=Telemetry(Metrics()))
    assert engine.status().running == 0
    await engine.start()
    with pytest.raises(NotReady):
        engine.submit([request()])
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    go.set()
    await stopping
    assert engine.state is EngineState.STOPPED
    with pytest.raises(Draining):
        engine.ready_info()


async def test_drain_lets_the_running_finish_and_refuses_the_rest() -> None:
    gate = threading.Semaphore(0)
    backend = FakeBackend(gate=gate)
    async with running(backend, max_rows=1) as engine:
        runs, waits = engine.submit([request(max_tokens=3), request()])
        gate.release(2)
        await runs.read()
        draining = asyncio.create_task(engine.drain(30))
        assert isinstance((await drained(waits)).error, Draining)
        with pytest.raises(Draining):
            engine.submit([request()])
        gate.release(20)
        assert (await drained(runs)).finish_reason is FinishReason.LENGTH
        await draining
        await engine.stop()
        assert engine.state is EngineState.STOPPED
    assert backend.closed


async def test_drain_ends_what_outlasts_its_timeout_with_a_typed_error() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER)])
        gate.release(4)
        await runs.read()
        draining = asyncio.create_task(engine.drain(0))
        gate.release(5000)  # as many as it takes until the loop has come to draining
        assert isinstance((await drained(runs)).error, Draining)
        await draining


async def test_drain_tells_them_also_when_the_step_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.drain.STEP_PATIENCE", 0.01)
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER)])
        gate.release(4)
        await runs.read()
        await engine.drain(0)
        while not (whole := await runs.read()).final:
            pass
        assert isinstance(whole.error, Draining)
        runs.close()


async def test_drain_ends_when_the_last_client_leaves_or_is_refused() -> None:
    async with running(FakeBackend()) as engine:
        left, refused = engine.submit([request(max_tokens=FOREVER)] * 2)
        for generation in (left, refused):
            await generation.read()
        draining = asyncio.create_task(engine.drain(3600))
        await asyncio.sleep(0)
        left.close()
        refused.fail(CredentialRevoked("revoked"))
        async with asyncio.timeout(10):
            await draining
        assert isinstance((await drained(refused)).error, CredentialRevoked)


async def test_stop_without_drain_tells_the_running() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER)])
        gate.release(2)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        gate.release(4)
        assert isinstance((await drained(runs)).error, Draining)
        await stopping


async def test_the_books_are_metrics_too() -> None:
    metrics = Metrics()
    async with running(FakeBackend(), metrics=metrics) as engine:
        wholes = [await drained(g) for g in engine.submit([request() for _ in range(3)])]
    value = metrics.registry.get_sample_value
    assert value("mlxd_generation_tokens_total") == sum(w.usage.completion_tokens for w in wholes if w.usage)
    assert value("mlxd_prompt_tokens_total") == 6
    assert value("mlxd_request_success_total", {"finished_reason": "length"}) == 3
    assert (engine.status().running, engine.status().waiting) == (0, 0)


async def test_the_backend_never_leaves_its_thread() -> None:
    backend = FakeBackend()
    async with running(backend) as engine:
        await drained(engine.submit([request()])[0])
    assert len(backend.threads) == 1
    assert threading.get_ident() not in backend.threads


async def test_who_submits_after_the_last_word_was_said_is_told_it_too() -> None:
    """The generation thread has ended, and the loop does not know yet: nobody would ever answer."""
    async with running(FakeBackend()) as engine:
        assert engine._worker is not None
        engine._worker.fail_all(EngineFailed("The engine has failed."))
        assert engine.state is EngineState.READY
        with pytest.raises(EngineFailed):
            engine.submit([request()])
