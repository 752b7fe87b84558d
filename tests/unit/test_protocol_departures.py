"""How a connection lasts and ends: streams, pipelining, clients that leave or do not read."""

import asyncio

import pytest

from service.api.protocol import BoundedProtocol
from service.engine.generation import Delta
from tests.fakes_api import DONE
from tests.raw_http import HEALTH, STREAM, one, post, service, until_closed
from tests.server_api import serving

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": request.param})


async def test_streams_pass_and_the_connection_is_kept() -> None:
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(STREAM)
            heard = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert b"data: [DONE]" in heard
            assert b"text/event-stream" in heard
        writer.close()


async def test_a_stream_may_last_longer_than_every_timeout_of_its_request() -> None:
    found = service(head_timeout=0.02, body_timeout=0.02, write_timeout=0.02, stream_keepalive=0.05)
    found.inference.script = None
    async with serving(found) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(STREAM)
        for _ in range(3):
            await reader.readuntil(b": keep-alive\n\n")
        found.inference.generations[0].put(DONE)
        await reader.readuntil(b"[DONE]")
        writer.close()


async def test_a_request_that_comes_before_the_last_answer_is_not_read() -> None:
    found = service()
    heard = await one(found, HEALTH + HEALTH + HEALTH)
    assert heard.statuses == [200]
    assert found.count("mlxd_http_requests_total", route="/health", method="GET", status="200") == 1


async def test_garbage_behind_a_whole_request_spoils_nothing() -> None:
    found = service()
    found.inference.script = None
    async with serving(found) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(STREAM + b"garbage")
        await found.inference.started.wait()
        [generation] = found.inference.generations
        generation.put(Delta("text"))
        await reader.readuntil(b"text")
        generation.put(DONE)
        assert b"[DONE]" in (await until_closed(reader)).raw
        writer.close()


async def test_a_broken_body_behind_an_answer_ends_the_connection() -> None:
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"}}")
        writer.write(b"zz\r\n")
        assert (await until_closed(reader)).statuses == [400]
        writer.close()


async def test_a_client_that_sent_too_much_and_left_is_noticed_all_the_same() -> None:
    found = service()
    found.inference.script = None
    async with serving(found) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b'{"prompt": "x"}'))
        await found.inference.started.wait()
        writer.write(HEALTH * 3 + b"\x00garbage")
        await writer.drain()
        writer.close()
        while not found.inference.cancelled:
            await asyncio.sleep(0)
    assert found.inference.cancelled == found.inference.generations


@pytest.mark.parametrize("how", ["close", "abort", "half-close"])
async def test_a_departure_is_noticed_while_nothing_is_sent(how: str) -> None:
    found = service()
    found.inference.script = None
    async with serving(found) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(b'{"prompt": "x"}'))
        await found.inference.started.wait()
        if how == "half-close":
            writer.write_eof()
        elif how == "abort":
            writer.transport.abort()
        else:
            writer.close()
        while not found.inference.cancelled:
            await asyncio.sleep(0)
        writer.close()


async def test_a_client_that_never_reads_is_dropped() -> None:
    found = service(write_timeout=0.2)
    found.inference.script = None
    async with serving(found) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(STREAM)
        await found.inference.started.wait()
        [generation] = found.inference.generations
        while not found.inference.cancelled:
            generation.put(Delta("x" * 1_000_000))
            await asyncio.sleep(0.001)  # the loop must poll its sockets; the end is the condition above
        writer.close()
        del reader


async def test_a_client_that_reads_late_but_in_time_gets_everything() -> None:
    found = service()
    found.inference.script = [Delta("x" * 30_000_000), DONE]
    async with serving(found) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(post(b'{"prompt": "x"}', b"Connection: close\r\n"))
        while found.count("mlxd_http_requests_total", route="/generate", method="POST", status="200") == 0:
            await asyncio.sleep(0.001)
        assert len((await until_closed(reader)).raw) > 30_000_000
        writer.close()


async def test_a_broken_body_behind_a_begun_answer_ends_the_connection_without_a_word() -> None:
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n2000\r\n" + b"x" * 8192 + b"\r\n")
        await reader.readuntil(b"}}")  # the 413, which waits a moment for the rest
        writer.write(b"zz\r\n")
        assert (await until_closed(reader)).raw == b""
        writer.close()


async def test_a_refusal_closes_at_once_where_a_half_close_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedProtocol, "can_half_close", lambda _: False)
    assert (await one(service(), b"nonsense\r\n\r\n")).statuses == [400]


async def test_an_answer_that_is_never_read_is_dropped_too() -> None:
    found = service(write_timeout=0.1)
    found.inference.script = [Delta("x" * 30_000_000), DONE]
    async with serving(found) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(post(b'{"prompt": "x"}', b"Connection: close\r\n"))
        await found.inference.started.wait()
        while found.server is None or found.server.server_state.connections:
            await asyncio.sleep(0.001)
        writer.close()
        del reader
    assert found.inference.cancelled == []
