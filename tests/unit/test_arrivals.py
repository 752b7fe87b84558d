"""Requests that come together are begun together, and who comes alone waits for nobody."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from service.engine import arrivals
from service.engine.arrivals import TURNS, Arrivals
from service.engine.backend import StepResult
from service.settings import Settings
from tests.fakes import FakeBackend
from tests.raw_http import post
from tests.serving import AMPLE, Served, served

LONG = 3600.0


@dataclass
class Told:
    """Stands for the worker: what it was told."""

    worth: float = LONG
    held: list[bool] = field(default_factory=list)

    def patience(self, prompt: int) -> float:
        return self.worth

    def hold(self, held: bool) -> None:
        self.held.append(held)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(arrivals, "MOST_PATIENCE", LONG)
    return Told()


def came(come: Arrivals, worker: Told) -> None:
    come.came(cast("Any", worker), 10)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_who_comes_alone_is_held_for_a_few_turns_of_the_loop(worker: Told) -> None:
    come = Arrivals()
    came(come, worker)
    await turns(TURNS - 1)
    assert worker.held == [True]
    await turns(1)
    assert worker.held == [True, False]
    came(come, worker)
    await turns(TURNS)
    assert worker.held == [True, False] * 2


async def test_all_who_come_within_a_few_turns_of_each_other_are_waited_for(worker: Told) -> None:
    come = Arrivals()
    for _ in range(20):
        came(come, worker)
        await turns(TURNS - 1)
    assert worker.held == [True]
    await turns(TURNS)
    assert worker.held == [True, False]


async def test_who_is_made_ready_off_the_loop_is_waited_for(worker: Told) -> None:
    come = Arrivals()
    with come.underway():
        with come.underway():
            came(come, worker)
            await turns(5 * TURNS)
        await turns(5 * TURNS)
        assert worker.held == [True]
    await turns(TURNS)
    assert worker.held == [True, False]


@pytest.mark.parametrize(("worth", "most"), [(0.002, LONG), (LONG, 0.002)])
async def test_nobody_is_held_for_long_and_who_is_slow_holds_others_up_once(
    monkeypatch: pytest.MonkeyPatch, worth: float, most: float
) -> None:
    monkeypatch.setattr(arrivals, "MOST_PATIENCE", most)
    come, worker = Arrivals(), Told(worth)
    loop = asyncio.get_running_loop()
    with come.underway():
        began = loop.time()
        came(come, worker)
        while worker.held == [True]:
            await turns(1)
        assert worker.held == [True, False]
        assert loop.time() - began >= 0.001  # a timer may be early by the resolution of its clock
        came(come, worker)
        await turns(5 * TURNS)
        assert worker.held == [True, False]
    await turns(TURNS)
    came(come, worker)
    assert worker.held == [True, False, True], "by then all had come"
    await turns(TURNS)


async def test_nobody_is_held_where_that_saves_nothing() -> None:
    come, worker = Arrivals(), Told(0.0)
    came(come, worker)
    await turns(2 * TURNS)
    assert worker.held == []


async def test_a_worker_that_is_lost_is_told_nothing(worker: Told) -> None:
    come = Arrivals()
    came(come, worker)
    come.lose()
    await turns(2 * TURNS)
    assert worker.held == [True]


class Beginning(FakeBackend):
    """`cohorts`: how many prompts were begun with in each step that began with any."""

    def __init__(self) -> None:
        super().__init__(worth_waiting=LONG)
        self.cohorts: list[int] = []

    def step(self) -> StepResult:
        begun = sum(live.prefill > 0 for live in self.rows.values())
        if begun:
            self.cohorts.append(begun)
        return super().step()


def wave(service: Served, clients: int, prompt: str) -> None:
    """So many requests, each on a connection of its own, all of them in their sockets when the loop looks."""
    looks = threading.Event()
    service.loop.call_soon_threadsafe(looks.wait)
    host, port = service.url.removeprefix("http://").split(":")
    request = post(b'{"prompt": "%s", "max_tokens": 2}' % prompt.encode(), b"Connection: close\r\n")
    with ExitStack() as stack:
        stack.callback(looks.set)
        connections = [stack.enter_context(socket.create_connection((host, int(port)), 60)) for _ in range(clients)]
        for connection in connections:
            connection.sendall(request)
        looks.set()
        for connection in connections:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 200")


@contextmanager
def beginning(folder: Path, **more: Any) -> Iterator[tuple[Served, list[int]]]:
    """A service, and the cohorts that it begins with."""
    ours = {"server.port": 0, "server.state_dir": folder, "auth.enabled": False}
    backend = Beginning()
    with served(Settings.load(None, {**ours, **AMPLE, **more}), backend) as service:
        yield service, backend.cohorts


@pytest.mark.parametrize("prompt", ["short", "encoded off the loop " * 100])
def test_a_wave_of_requests_begins_as_one_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str) -> None:
    monkeypatch.setattr(arrivals, "MOST_PATIENCE", 60.0)
    with beginning(tmp_path, **{"engine.max_prefill_rows": 8}) as (service, cohorts):
        for _ in range(3):
            wave(service, 6, prompt)
        assert cohorts == [6, 6, 6]


def test_who_are_a_cohort_already_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with beginning(tmp_path, **{"engine.max_prefill_rows": 2}) as (service, cohorts):
        monkeypatch.setattr(arrivals, "MOST_PATIENCE", LONG)
        monkeypatch.setattr(arrivals, "TURNS", 10**12)
        wave(service, 2, "short")
        worker = service.app.engine._worker
        assert worker is not None
        assert worker._lineup.held
        assert cohorts == [2]
