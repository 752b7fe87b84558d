"""Reading several generations as one, and noticing that nobody listens any more."""

import asyncio
from typing import Any

import pytest

from service.api.answer import ClientGone, Deltas, while_connected
from service.engine.generation import Delta, FinishReason, Generation, GenerationRequest
from tests.fakes_api import DONE, USAGE

pytestmark = pytest.mark.anyio


def generations(count: int) -> list[Generation]:
    request = GenerationRequest(request_id="r", prompt=(1,), max_tokens=1)
    return [Generation(request, lambda _: None) for _ in range(count)]


async def test_several_rows_are_read_as_one_and_nothing_is_lost() -> None:
    rows = generations(3)
    deltas = Deltas(rows)
    for number in range(30):
        rows[number % 3].put(Delta(f"{number} "))
        if number % 4 == 0:
            await deltas.next()
    for row in rows:
        row.put(DONE)
    while not deltas.finished:
        await deltas.next()
    texts = ["".join(choice.text).split() for choice in deltas.choices]
    assert texts == [[str(number) for number in range(30) if number % 3 == row] for row in range(3)]
    assert all(choice.usage == USAGE for choice in deltas.choices)


async def test_the_last_row_of_several_loses_nothing_when_the_others_have_ended() -> None:
    first, second = generations(2)
    deltas = Deltas([first, second])
    first.put(DONE)
    assert await deltas.next() == [(0, DONE)]
    second.put(Delta("kept"))
    for _ in range(3):
        await asyncio.sleep(0)  # the pending read takes it
    second.put(Delta(finish_reason=FinishReason.LENGTH, usage=USAGE))
    while not deltas.finished:
        await deltas.next()
    assert "".join(deltas.choices[1].text) == "kept"


async def test_waiting_in_vain_loses_nothing() -> None:
    for count in (1, 2):
        rows = generations(count)
        deltas = Deltas(rows, 0.001)
        assert await deltas.next() == []
        assert await deltas.next() == []
        rows[0].put(Delta("a"))
        assert await deltas.next() == [(0, Delta("a"))]
        await deltas.close()


async def test_closing_stops_the_pending_reads() -> None:
    rows = generations(2)
    deltas = Deltas(rows, 0.001)
    assert await deltas.next() == []
    before = asyncio.all_tasks()
    await deltas.close()
    assert len(asyncio.all_tasks()) == len(before) - 2


async def test_who_does_not_read_is_given_up() -> None:
    given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    given_up.set_result(None)
    with pytest.raises(ClientGone):
        await while_connected(asyncio.sleep(3600), asyncio.Event().wait, given_up)  # type: ignore[arg-type]


async def test_a_departure_may_come_twice() -> None:
    """The client left, and while the work is being unwound it is given up too."""
    given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            given_up.set_result(None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    with pytest.raises(ClientGone):
        await while_connected(work(), receive, given_up)
    assert failures == []


async def test_a_timeout_of_the_work_and_a_cancellation_from_outside_are_no_departure() -> None:
    before = asyncio.all_tasks()

    async def work() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await while_connected(work(), asyncio.Event().wait)  # type: ignore[arg-type]
    task = asyncio.create_task(while_connected(asyncio.sleep(3600), asyncio.Event().wait))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before, "nobody watches any more"


async def test_a_broken_watch_is_not_taken_for_a_departure() -> None:
    async def receive() -> Any:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        await while_connected(asyncio.sleep(3600), receive)


async def test_only_a_departure_is_a_departure() -> None:
    messages = iter(["http.request", "http.request", "http.disconnect"])

    async def receive() -> Any:
        return {"type": next(messages)}

    with pytest.raises(ClientGone):
        await while_connected(asyncio.sleep(3600), receive)
    assert next(messages, None) is None


async def test_work_that_is_done_counts_even_if_the_client_left_meanwhile() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def work() -> str:
        return "done"

    assert await while_connected(work(), receive) == "done"
    with pytest.raises(ClientGone):
        await while_connected(asyncio.sleep(3600), receive)
