"""The engine's own token: when nobody asks, after a lost step, and when memory grows beyond its bounds."""

from __future__ import annotations

import threading

import pytest
import structlog

from service.engine.backend import StepResult
from service.engine.canary import CANARY_UID, OVERGROWN, CanaryFailed
from service.engine.engine import EngineState
from service.engine.generation import Delta
from service.errors import GenerationFailed
from tests.fakes import MEMORY, FakeBackend
from tests.timed import ByHand, TimedBackend
from tests.unit.test_engine import running

MOST = int(MEMORY.budget * OVERGROWN)


class Counted(FakeBackend):
    """Says how often the canary sang, and fails its step when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.sung = threading.Semaphore(0)
        self.failures = 0

    def step(self) -> StepResult:
        singing = CANARY_UID in self.rows
        if singing and self.failures:
            self.failures -= 1
            raise RuntimeError("scripted")
        result = super().step()
        if singing and result.tokens:
            self.sung.release()
        return result


async def test_without_work_the_canary_sings_again_and_again() -> None:
    backend = Counted()
    async with running(backend, canary_interval=0.01):
        for _ in range(3):
            assert backend.sung.acquire(timeout=10)


async def test_without_an_interval_it_never_does() -> None:
    driven = ByHand(TimedBackend())
    driven.submit()
    driven.finish()
    assert driven.worker._canary_interval is None


async def test_a_canary_that_fails_once_is_a_lost_step_and_twice_the_end() -> None:
    backend = Counted()
    backend.failures = 1
    with structlog.testing.capture_logs() as lines:
        async with running(backend, canary_interval=0.01) as engine:
            assert backend.sung.acquire(timeout=10)
            assert (engine.state, backend.rebuilds) == (EngineState.READY, 1)
        assert [line["event"] for line in lines] == ["step_failed"]
        lines.clear()
        backend = Counted()
        backend.failures = 2
        async with running(backend, canary_interval=0.01) as engine:
            assert await engine.wait(EngineState.FAILED)
        assert [line["event"] for line in lines] == ["step_failed", "canary_failed", "engine_failed"]


def test_memory_beyond_its_bounds_fails_the_rows_and_is_over_when_it_is_given_back() -> None:
    class Leaking(TimedBackend):
        def rebuild(self) -> None:
            super().rebuild()
            self.active = 0

    driven = ByHand(backend := Leaking())
    generation = driven.submit(max_tokens=100)
    driven.turn(3)
    backend.active = MOST
    driven.turn()
    assert not generation.finished, "the bound itself is allowed"
    backend.active += 1
    with structlog.testing.capture_logs() as lines:
        driven.turn()
    assert isinstance(last(driven, generation).error, GenerationFailed)
    assert [(line["event"], line["active"], line["most"]) for line in lines] == [("memory_overgrown", MOST + 1, MOST)]
    assert driven.metrics.registry.get_sample_value("mlxd_internal_errors_total", {"where": "memory"}) == 1
    assert driven.worker.memory.active == 0
    driven.submit(max_tokens=2)
    driven.finish()


def test_memory_that_is_not_given_back_is_the_end() -> None:
    driven = ByHand(backend := TimedBackend())
    driven.submit(max_tokens=100)
    driven.turn(2)
    backend.active = MOST + 1
    with pytest.raises(CanaryFailed):
        driven.turn()


def last(driven: ByHand, generation: object) -> Delta:
    return driven.said[generation][-1]  # type: ignore[index]
