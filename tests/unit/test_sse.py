"""The stream and the whole answer, over generations that the test feeds."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service.api.sse import DONE as TERMINATOR, KEEPALIVE, event
from service.engine.generation import Delta
from service.errors import EngineFailed, GenerationFailed
from service.settings import HttpSettings, Settings
from tests.fakes_api import DONE, Client, Exchange, FakeInference, Service, sse_events

pytestmark = pytest.mark.anyio

STREAM = {"prompt": "x", "stream": True}
ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


def impatient(**limits: float) -> Settings:
    return Settings(http=HttpSettings(**limits))


async def begin(service: Service, payload: dict[str, Any], path: str = "/generate") -> tuple[Exchange, Any]:
    """Start a request, and wait until its generations exist."""
    exchange, task = Client(service).begin(path, payload)
    await service.inference.started.wait()
    return exchange, task


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_an_event_is_one_line_and_says_what_it_was_given(payload: dict[str, Any]) -> None:
    wire = event(payload)
    assert wire.startswith(b"data: ")
    assert wire.endswith(b"\n\n")
    assert wire.count(b"\n") == 2
    assert b"\r" not in wire
    assert list(sse_events(wire)) == [json.loads(json.dumps(payload))]


def test_an_event_with_half_a_character_can_still_be_sent() -> None:
    assert event({"text": "\ud800"}) == b'data: {"text":"?"}\n\n'


async def test_text_goes_out_as_it_comes() -> None:
    service = Service()
    exchange, task = await begin(service, STREAM)
    [generation] = service.inference.generations
    generation.put(Delta("Hel"))
    await exchange.until(lambda seen: b"Hel" in seen.body)
    assert exchange.answer.status == 200
    assert not exchange.complete
    generation.put(Delta("lo"))
    await exchange.until(lambda seen: b"lo" in seen.body)
    generation.put(DONE)
    await task
    *texts, last, terminator = exchange.answer.events()
    assert texts == [{"text": "Hel"}, {"text": "lo"}]
    assert (last["text"], last["finish_reason"], last["usage"]["total_tokens"]) == ("", "stop", 8)
    assert terminator == "[DONE]"
    assert exchange.starts == 1
    headers = exchange.answer.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-length" not in headers


async def test_a_slow_client_gets_merged_events_and_all_of_the_text() -> None:
    service = Service()
    exchange, task = await begin(service, STREAM)
    [generation] = service.inference.generations
    exchange.reading.clear()
    generation.put(Delta("a"))
    for _ in range(1000):
        generation.put(Delta("b"))
        await asyncio.sleep(0)
    generation.put(DONE)
    exchange.reading.set()
    await task
    events = [one for one in exchange.answer.events() if one != "[DONE]"]
    assert len(events) < 10
    assert "".join(one["text"] for one in events) == "a" + "b" * 1000


@pytest.mark.parametrize("path", ROUTES)
async def test_silence_is_filled_with_comments(path: str) -> None:
    service = Service(settings=impatient(stream_keepalive=0.001))
    exchange, task = await begin(service, {**ROUTES[path], "stream": True}, path)
    await exchange.until(lambda seen: seen.body.count(KEEPALIVE) > 2)
    assert exchange.answer.status == 200
    service.inference.generations[0].put(Delta("late"))
    await exchange.until(lambda seen: b"late" in seen.body)
    service.inference.generations[0].put(DONE)
    await task
    assert exchange.body.endswith(TERMINATOR)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_failure_before_the_first_byte_is_a_proper_status(path: str, stream: bool) -> None:
    failed = Delta(error=EngineFailed("The engine is lost.", retry_after=2))
    service = Service(inference=FakeInference([failed]))
    answer = await Client(service).post(path, {**ROUTES[path], "stream": stream})
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "engine_failed", "2")


@pytest.mark.parametrize("path", ROUTES)
async def test_a_failure_in_mid_stream_is_an_error_event_and_no_normal_end(path: str) -> None:
    service = Service()
    exchange, task = await begin(service, {**ROUTES[path], "stream": True}, path)
    service.inference.generations[0].put(Delta("some text"))
    await exchange.until(lambda seen: b"some text" in seen.body)
    service.inference.generations[0].put(Delta(error=GenerationFailed("It broke.")))
    await task
    assert exchange.complete
    assert exchange.starts == 1
    last = exchange.answer.events()[-1]
    assert last == {
        "error": {"message": "It broke.", "type": "server_error", "param": None, "code": "generation_failed"}
    }
    assert b"[DONE]" not in exchange.body
    assert b'"stop"' not in exchange.body


async def test_text_that_arrived_with_the_failure_does_not_hide_it() -> None:
    service = Service(inference=FakeInference([Delta("some"), Delta(error=GenerationFailed("It broke."))]))
    answer = await Client(service).post("/generate", {"prompt": "x"})
    assert (answer.status, answer.headers["x-should-retry"]) == (500, "false")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_leaves_cancels_everything_it_asked_for(path: str, stream: bool) -> None:
    service = Service()
    rows = {} if path == "/generate" else {"n": 3}
    exchange, task = await begin(service, {**ROUTES[path], **rows, "stream": stream}, path)
    exchange.leave()
    await task
    assert exchange.sent == []
    assert set(service.inference.cancelled) == set(service.inference.generations)
    assert all(generation.closed for generation in service.inference.generations)
    assert service.count("mlxd_http_requests_total", route=path, method="POST", status="499") == 1


async def test_a_client_that_leaves_in_mid_stream_cancels_its_generation() -> None:
    service = Service()
    exchange, task = await begin(service, STREAM)
    [generation] = service.inference.generations
    generation.put(Delta("some"))
    await exchange.until(lambda seen: b"some" in seen.body)
    exchange.leave()
    await task
    assert service.inference.cancelled == [generation]
    assert not exchange.complete


async def test_a_client_that_leaves_while_a_send_is_stuck_cancels_its_generation() -> None:
    service = Service()
    exchange, task = await begin(service, STREAM)
    exchange.reading.clear()
    [generation] = service.inference.generations
    generation.put(Delta("some"))
    exchange.leave()
    await task
    assert service.inference.cancelled == [generation]


async def test_a_client_that_does_not_read_is_given_up() -> None:
    service = Service(settings=impatient(write_timeout=0.01))
    exchange, task = await begin(service, STREAM)
    exchange.reading.clear()
    [generation] = service.inference.generations
    generation.put(Delta("some"))
    await task
    assert service.inference.cancelled == [generation]
    assert exchange.sent == []


async def test_the_exit_stack_closes_the_generation_before_the_request_ends_without_a_collection() -> None:
    """The dependency's exit is what counts: no generator's `finally`, no garbage collection."""
    import gc

    gc.disable()
    try:
        service = Service()
        exchange, task = await begin(service, STREAM)
        [generation] = service.inference.generations
        generation.put(Delta("some"))
        await exchange.until(lambda seen: b"some" in seen.body)
        task.cancel()  # what a server does at the end of its patience
        with pytest.raises(asyncio.CancelledError):
            await task
        assert generation.closed
    finally:
        gc.enable()


async def test_the_exit_stack_unwinds_before_the_last_byte() -> None:
    service = Service()
    exchange, task = await begin(service, STREAM)
    [generation] = service.inference.generations
    generation.put(Delta("x"))
    await exchange.until(lambda seen: b"x" in seen.body)
    exchange.reading.clear()
    generation.put(DONE)
    async with asyncio.timeout(5):
        while not generation.closed:
            await asyncio.sleep(0)
    before = exchange.complete
    exchange.reading.set()
    await task
    assert (before, exchange.complete) == (False, True)
    assert service.inference.cancelled == []


async def test_no_task_outlives_a_request() -> None:
    service = Service()
    before = asyncio.all_tasks()
    for path, payload in ROUTES.items():
        for stream in (True, False):
            service.inference.started.clear()
            exchange, task = await begin(service, {**payload, "stream": stream}, path)
            exchange.leave()
            await task
    assert asyncio.all_tasks() == before
