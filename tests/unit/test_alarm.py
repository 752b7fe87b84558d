"""A deadline that is set again for each token, over one timer."""

from __future__ import annotations

import asyncio

import pytest

from service.api.alarm import Alarm

pytestmark = pytest.mark.anyio


async def test_it_rings_once_when_it_was_on_for_long_enough() -> None:
    rung: asyncio.Queue[float] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    alarm = Alarm(0.02, lambda: rung.put_nowait(loop.time()))
    began = loop.time()
    alarm.on()
    assert await rung.get() >= began + 0.02
    began = loop.time()
    alarm.on()
    assert await rung.get() >= began + 0.02
    assert rung.empty()


async def test_what_is_switched_off_or_set_anew_in_time_does_not_ring_early() -> None:
    loop = asyncio.get_running_loop()
    rung: list[float] = []
    alarm = Alarm(0.05, lambda: rung.append(loop.time()))
    began = loop.time()
    while loop.time() < began + 0.2:
        alarm.on()
        await asyncio.sleep(0.001)
        alarm.off()
    alarm.on()
    last = loop.time()
    while not rung:
        await asyncio.sleep(0.001)
    assert rung[0] >= last + 0.049


async def test_there_is_one_timer_however_often_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, made = asyncio.get_running_loop(), 0
    real = loop.call_at

    def call_at(*arguments: object) -> asyncio.TimerHandle:
        nonlocal made
        made += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_at", call_at)
    alarm = Alarm(3600, lambda: None)
    for _ in range(1000):
        alarm.on()
        alarm.off()
    alarm.stop()
    assert made == 1


async def test_stopped_it_holds_nothing() -> None:
    rung: list[None] = []
    alarm = Alarm(0.001, lambda: rung.append(None))
    alarm.on()
    alarm.stop()
    await asyncio.sleep(0.01)
    assert rung == []
