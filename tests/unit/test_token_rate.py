import asyncio
from collections.abc import Callable

import pytest

from service.observability.metrics import Metrics
from service.observability.token_rate import LOOKS, TokenRate, TokensPerSecond, current

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_told_before_a_second_is_over() -> None:
    metrics, clock = Metrics(), Clock()
    rate = TokenRate(metrics, clock=clock)
    assert rate.per_second() is None
    rate.look()
    metrics.generation_tokens.inc(7)
    clock.now += 0.9
    assert rate.per_second() is None
    clock.now += 0.1
    assert rate.per_second() == TokensPerSecond(prompt=0.0, generation=7.0, seconds=1.0)


def test_what_is_told_is_of_the_last_seconds_only() -> None:
    metrics, clock = Metrics(), Clock()
    rate = TokenRate(metrics, clock=clock)
    metrics.prompt_tokens.inc(1_000_000)
    for _ in range(3 * LOOKS):
        rate.look()
        clock.now += 1
        metrics.prompt_tokens.inc(20)
        metrics.generation_tokens.inc(5)
    assert rate.per_second() == TokensPerSecond(prompt=20.0, generation=5.0, seconds=float(LOOKS))


async def test_it_looks_once_a_second_until_the_block_ends() -> None:
    waits: list[float] = []
    looked: asyncio.Queue[Callable[[], None]] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        go_on = asyncio.Event()
        looked.put_nowait(go_on.set)
        await go_on.wait()

    rate = TokenRate(Metrics(), clock=Clock(), sleep=sleep)
    with rate.run():
        for number in range(1, 4):
            go_on = await looked.get()
            assert len(rate._looks) == number
            go_on()
        await looked.get()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        if task.get_name() == "token-rate":
            with pytest.raises(asyncio.CancelledError):
                await task
    assert set(waits) == {1.0}


def test_a_series_has_a_value_without_being_rendered() -> None:
    metrics = Metrics()
    metrics.rows_capacity.set(32)
    metrics.generation_tokens.inc(3)
    assert (current(metrics.rows_capacity), current(metrics.generation_tokens)) == (32.0, 3.0)
