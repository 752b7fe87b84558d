"""The life of the process in this one: signals by hand, real sockets, an engine that only pretends."""

import asyncio
import gc
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from service import process as life
from service.console import Console
from service.engine.engine import EngineState
from service.leaving import StopGuard
from service.listening import Listeners, listen
from service.process import YOUNG_OBJECTS, Process
from service.reload import Reloader
from tests.fake_service import FakeApp, FakeEngine, free_ports

pytestmark = pytest.mark.usefixtures("_signals_as_they_were")

Build = Callable[..., Process]


@pytest.fixture
def in_process(tmp_path: Path) -> Iterator[Build]:
    """Makes a Process that runs in this one; the time for its stop is over with the test."""
    guards: list[StopGuard] = []

    def build(
        engine: FakeEngine,
        *,
        leave: Callable[[int], object],
        drain_timeout: float = 1.0,
        supervised: bool = False,
        app: FakeApp | None = None,
        hangups: asyncio.Event | None = None,
    ) -> Process:
        settings, app = free_ports(tmp_path), app or FakeApp(engine)
        guards.append(StopGuard(leave))
        return Process(
            Listeners(settings, app, listen(settings)),
            app,
            Console(io.StringIO(), url="http://127.0.0.1:0"),
            drain_timeout=drain_timeout,
            leave=leave,
            supervised=supervised,
            reloader=Reloader(settings, lambda: settings, app, app.reloads),
            guard=guards[-1],
            hangups=hangups,
        )

    yield build
    for guard in guards:
        guard.disarm()


def test_a_generation_thread_that_does_not_end_is_left_behind_when_the_store_is_closed(
    in_process: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wedged(FakeEngine):
        async def stop(self) -> None:
            await asyncio.Event().wait()

    async def scenario() -> list[int]:
        left: list[int] = []
        engine = Wedged()
        app = FakeApp(engine)
        process = in_process(engine, app=app, leave=lambda code: left.extend((code, app.seen.index("store closed"))))
        running = asyncio.create_task(process.run())
        await engine.wait(EngineState.READY)
        process._on_signal(signal.SIGTERM)
        await running
        return left

    monkeypatch.setattr(life, "STOP_TIMEOUT", 0.05)
    assert asyncio.run(scenario()) == [0, 1]


def test_a_drain_that_hangs_is_overdue_and_the_process_goes_on_to_stop(
    in_process: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> tuple[int, list[int]]:
        left: list[int] = []
        engine = FakeEngine(drain_hangs=True)
        process = in_process(engine, leave=left.append, drain_timeout=0.05)
        running = asyncio.create_task(process.run())
        await engine.wait(EngineState.READY)
        process._on_signal(signal.SIGTERM)
        process._on_signal(signal.SIGINT)
        code = await running
        assert engine.stopped
        return code, left

    monkeypatch.setattr(life, "FLUSH_TIMEOUT", 0)
    assert asyncio.run(scenario()) == (0, [130])


async def test_collections_do_not_visit_what_has_been_loaded(in_process: Build) -> None:
    gc.unfreeze()  # other tests' processes
    young, *older = gc.get_threshold()
    loaded: list[object] = []
    engine = FakeEngine()
    process = in_process(engine, leave=lambda _: None)
    running = asyncio.create_task(process.run())
    try:
        async with asyncio.timeout(10):
            while not gc.get_freeze_count():
                await asyncio.sleep(0)
        later: list[object] = []
        visited = set(map(id, gc.get_objects()))
        assert id(loaded) not in visited
        assert id(later) in visited
        assert gc.get_threshold()[0] == YOUNG_OBJECTS
    finally:
        gc.set_threshold(young, *older)
        process._on_signal(signal.SIGTERM)
        await running
        gc.unfreeze()


class Recorded(FakeEngine):
    """Writes down what happens to it, in the list of its application."""

    def __init__(self, seen: list[str], **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self.seen = seen

    async def drain(self, timeout: float) -> None:
        self.seen.append("drain")
        await super().drain(timeout)
        self.seen.append("drained")

    async def stop(self) -> None:
        self.seen.append("engine freed")
        await super().stop()


class Life:
    """One run, with what it left with."""

    def __init__(self, build: Build, *, hangups: asyncio.Event | None = None, **more: bool) -> None:
        self.left: list[int] = []
        self.engine = Recorded([])
        self.app = FakeApp(self.engine)
        self.engine.seen = self.app.seen
        self.process = build(self.engine, app=self.app, leave=self.left.append, hangups=hangups, **more)

    async def ready(self) -> asyncio.Task[int]:
        running = asyncio.create_task(self.process.run())
        await self.engine.wait(EngineState.READY)
        return running


def test_a_stop_has_one_order(in_process: Build) -> None:
    async def scenario() -> tuple[int, list[str], list[int]]:
        one = Life(in_process)
        running = await one.ready()
        one.process._on_signal(signal.SIGTERM)
        return await running, one.app.seen, one.left

    with structlog.testing.capture_logs() as lines:
        code, seen, left = asyncio.run(scenario())
    assert (code, left) == (0, [])
    assert seen == ["drain", "drained", "ledger written", "engine freed", "store closed"]
    assert [line["event"] for line in lines][-2:] == ["store_closed", "stopped"]


@pytest.mark.parametrize(
    ("supervised", "number", "code"),
    [
        (True, signal.SIGTERM, 0),
        (True, signal.SIGINT, 0),
        (False, signal.SIGTERM, 143),
        (False, signal.SIGINT, 130),
    ],
)
def test_a_second_signal_skips_to_closing_the_store(
    in_process: Build, *, supervised: bool, number: signal.Signals, code: int
) -> None:
    async def scenario() -> tuple[list[str], list[int]]:
        one = Life(in_process, supervised=supervised)
        one.engine.drain_hangs = True
        await one.ready()
        one.process._on_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        one.process._on_signal(number)
        while not one.left:
            await asyncio.sleep(0.001)
        return list(one.app.seen), one.left

    assert asyncio.run(scenario()) == (["drain", "store closed"], [code])


def test_a_third_signal_does_not_wait_for_the_store(in_process: Build) -> None:
    async def scenario() -> list[int]:
        one = Life(in_process)
        one.engine.drain_hangs = one.app.close_hangs = True
        await one.ready()
        for _ in range(3):
            one.process._on_signal(signal.SIGINT)
            await asyncio.sleep(0)
        return one.left

    assert asyncio.run(scenario()) == [130]


def test_a_store_that_does_not_close_does_not_keep_the_process(
    in_process: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> int:
        one = Life(in_process)
        one.app.close_hangs = True
        running = await one.ready()
        one.process._on_signal(signal.SIGTERM)
        return await running

    monkeypatch.setattr(life, "CLOSE_TIMEOUT", 0.02)
    with structlog.testing.capture_logs() as lines:
        assert asyncio.run(scenario()) == 0
    assert "close_overdue" in [line["event"] for line in lines]


def test_a_window_that_is_closed_drains_once_however_often_it_hangs_up(in_process: Build) -> None:
    async def scenario() -> tuple[int, list[str], list[int]]:
        one = Life(in_process)
        running = await one.ready()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.01)
        return await running, one.app.seen, one.left

    code, seen, left = asyncio.run(scenario())
    assert (code, left) == (0, [])
    assert seen.count("drain") == 1


def test_a_hangup_otherwise_reloads_also_one_that_came_before_the_start(in_process: Build) -> None:
    async def scenario() -> tuple[int, int, int]:
        hangups = asyncio.Event()
        hangups.set()
        one = Life(in_process, hangups=hangups)
        running = await one.ready()
        while one.app.looked == 0:
            await asyncio.sleep(0.001)
        early = one.app.looked
        os.kill(os.getpid(), signal.SIGHUP)
        while one.app.looked == early:
            await asyncio.sleep(0.001)
        assert one.engine.state is EngineState.READY
        one.process._on_signal(signal.SIGTERM)
        return await running, early, one.app.looked

    assert asyncio.run(scenario()) == (0, 1, 2)


def test_a_task_beside_that_dies_is_logged_and_the_service_goes_on(in_process: Build) -> None:
    async def scenario() -> int:
        one = Life(in_process)
        running = await one.ready()
        one.process._beside("fated", broken())
        await asyncio.sleep(0.01)
        assert not running.done()
        one.process._on_signal(signal.SIGTERM)
        return await running

    async def broken() -> None:
        raise ZeroDivisionError

    with structlog.testing.capture_logs() as lines:
        assert asyncio.run(scenario()) == 0
    assert [line["task"] for line in lines if line["event"] == "task_died"] == ["fated"]


def test_what_hangs_in_a_stop_is_left_behind_when_its_time_is_over() -> None:
    left, over = [], threading.Event()

    def leave(code: int) -> None:
        left.append(code)
        over.set()

    guard = StopGuard(leave)
    guard.arm(0.01, lambda: 7)
    guard.arm(0.0, lambda: 8)
    assert over.wait(10)
    assert left == [7]
    guard.disarm()
    StopGuard(leave).disarm()
