"""The engine while its model is tried again: what it says, what it refuses, and how it stops."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from service.engine.engine import Engine, EngineState
from service.engine.generation import GenerationRequest
from service.engine.telemetry import Telemetry
from service.errors import ModelUnavailable, NotReady
from service.observability.metrics import Metrics
from service.settings import EngineSettings
from service.supervision.attempts import Attempts
from tests.fakes import FakeBackend

pytestmark = pytest.mark.anyio
LONG = 3600.0


def missing_at_first(times: int) -> FakeBackend:
    tries = itertools.count(1)

    def look() -> None:
        if next(tries) <= times:
            raise ModelUnavailable("no such folder")

    return FakeBackend(before_load=look)


def engine(backend: FakeBackend, attempts: Attempts) -> Engine:
    return Engine(backend, EngineSettings(), telemetry=Telemetry(Metrics()), attempts=attempts)


async def detail(found: Engine, text: str) -> None:
    """Wait until the engine says it."""
    async with asyncio.timeout(10):
        while text not in found.status().detail:
            await found._changed.wait()


async def test_a_load_that_fails_twice_is_ready_in_the_end() -> None:
    backend = missing_at_first(2)
    found = engine(backend, Attempts(patience=60, first=0.001, longest=0.001))
    await found.start()
    assert await found.wait(EngineState.READY, EngineState.FAILED) is EngineState.READY
    assert len(backend.threads) == 1, "each try is on the thread that owns the model"
    await found.stop()


async def test_while_it_waits_it_is_starting_says_why_and_refuses_work() -> None:
    found = engine(missing_at_first(1), Attempts(patience=60, first=LONG, longest=LONG))
    await found.start()
    await detail(found, "no such folder; next try at ")
    assert found.state is EngineState.STARTING
    with pytest.raises(NotReady):
        found.submit([GenerationRequest(request_id="r", prompt=(1,), max_tokens=1)])
    await found.stop()


@pytest.mark.parametrize("delay", [0.0, LONG])
async def test_a_stop_ends_the_wait_at_once_and_cleanly(delay: float) -> None:
    backend = missing_at_first(1)
    found = engine(
        backend, Attempts(delay=delay, because="the last starts failed", patience=60, first=LONG, longest=LONG)
    )
    await found.start()
    await detail(found, "the last starts failed; loading begins at " if delay else "next try at ")
    async with asyncio.timeout(1):
        await found.drain(30)
        await found.stop()
    assert found.state is EngineState.STOPPED
    assert found.failure is None
    assert backend.closed
    assert not backend.loaded.is_set()


async def test_when_patience_is_over_it_has_failed_with_the_reason() -> None:
    found = engine(missing_at_first(1000), Attempts(patience=0.01, first=0.005, longest=0.005))
    await found.start()
    await found.wait(EngineState.FAILED)
    assert isinstance(found.failure, ModelUnavailable)
    assert found.status().detail == "no such folder"
    await found.stop()
