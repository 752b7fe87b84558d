"""Drains of the engine on a scripted backend: what an operator begins and undoes, and what a signal makes of it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.engine import drain
from service.engine.engine import Engine, EngineState
from service.engine.telemetry import Telemetry
from service.errors import Draining
from service.observability.metrics import Metrics
from service.settings import EngineSettings
from tests.fakes import FakeBackend
from tests.unit.test_engine import FOREVER, drained, request, running


async def test_an_operators_drain_lets_the_running_finish_and_stays_up_until_it_is_undone() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate), max_rows=1) as engine:
        runs, waits = engine.submit([request(max_tokens=3), request()])
        gate.release(2)
        await runs.read()
        task = engine.begin_drain(30, for_good=False)
        assert engine.state is EngineState.DRAINING
        assert engine.status().detail == "asked for by an operator"
        assert engine.begin_drain(0, for_good=False) is task, "the second joins, with the first one's timeout"
        refused = (await drained(waits)).error
        assert isinstance(refused, Draining)
        assert refused.retry_after == 30
        with pytest.raises(Draining, match="at the moment"):
            engine.submit([request()])
        gate.release(20)
        assert (await drained(runs)).text
        await task
        assert (engine.state, engine.status().drain_for_good) == (EngineState.DRAINING, False)
        engine.resume()
        engine.resume()
        assert (engine.state, engine.status().drain_for_good) == (EngineState.READY, None)
        assert (await drained(engine.submit([request()])[0])).text == "lmno"


async def test_one_that_is_undone_ends_nothing_that_runs_nor_does_its_timeout_hold_later() -> None:
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=8)])
        gate.release(2)
        await runs.read()
        first = engine.begin_drain(0, for_good=False)
        engine.resume()
        second = engine.begin_drain(3600, for_good=False)
        with pytest.raises(asyncio.CancelledError):
            await first  # which alone would have ended it
        gate.release(20)
        assert (await drained(runs)).error is None
        await second


async def test_a_signal_makes_an_operators_drain_one_for_good() -> None:
    async with running(FakeBackend()) as engine:
        await engine.begin_drain(30, for_good=False)
        await engine.drain(30)
        assert engine.status().detail == "shutting down"
        with pytest.raises(Draining, match="shutting down"):
            engine.resume()
        engine.begin_drain(30, for_good=False)
        with pytest.raises(Draining, match="shutting down"):
            engine.submit([request()])
        await engine.stop()
        assert engine.state is EngineState.STOPPED


async def test_a_drain_while_it_loads_holds_it_back_when_it_has_loaded() -> None:
    go = threading.Event()
    backend = FakeBackend(before_load=lambda: go.wait(10))
    engine = Engine(backend, EngineSettings(), telemetry=Telemetry(Metrics()))
    await engine.start()
    await engine.begin_drain(30, for_good=False)
    assert engine.state is EngineState.DRAINING
    go.set()
    await asyncio.to_thread(backend.loaded.wait, 10)
    while engine._state is not EngineState.READY:
        await asyncio.sleep(0.001)
    with pytest.raises(Draining):
        engine.submit([request()])
    engine.resume()
    assert await engine.wait(EngineState.READY)
    assert (await drained(engine.submit([request()])[0])).text == "lmno"
    await engine.stop()


async def test_an_engine_that_fails_while_it_drains_has_failed() -> None:
    def lose(step: int) -> None:
        if step >= 3:
            raise RuntimeError("lost for good")

    gate = threading.Semaphore(0)
    async with running(FakeBackend(before_step=lose, gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER)])
        gate.release(2)
        await runs.read()
        draining = asyncio.create_task(engine.drain(3600))
        gate.release(FOREVER)
        async with asyncio.timeout(10):
            await engine.wait(EngineState.FAILED)
            await draining
        assert (await drained(runs)).error is not None


async def test_a_step_that_does_not_end_keeps_no_reader_from_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "STEP_PATIENCE", 0.05)
    gate = threading.Semaphore(0)
    async with running(FakeBackend(gate=gate)) as engine:
        (runs,) = engine.submit([request(max_tokens=FOREVER)])
        gate.release(2)
        await runs.read()
        async with asyncio.timeout(10):
            await engine.drain(0)  # no step is let through: the boundary never comes
            assert isinstance((await drained(runs)).error, Draining)
