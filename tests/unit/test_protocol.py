"""What a connection may say: the contract between our protocol class and the pinned uvicorn and httptools."""

import asyncio
from collections.abc import Sequence

import pytest

from tests.raw_http import CLOSE, HEALTH, HOST, JSON, STREAM, one, post, service, until_closed
from tests.server_api import serving

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": request.param})


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", "invalid_host"),
        (b"GET /health HTTP/1.1\r\nHost: \r\n\r\n", "invalid_host"),
        (b"GET /health HTTP/1.1\r\n" + HOST + HOST + b"\r\n", "invalid_host"),
        (b"GET /health HTTP/1.0\r\n\r\n", "invalid_host"),
        (b"GET http://localhost/health HTTP/1.1\r\n" + HOST + b"\r\n", "invalid_target"),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", "invalid_target"),
        (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", "invalid_target"),
        (b"\x16\x03\x01\x02\x00\x01", "invalid_http"),
        (b"GET /health\r\n\r\n", "invalid_host"),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", "invalid_http"),
        (b"GET /health HTTP/1.1\r\n" + HOST + b" folded: x\r\n\r\n", "invalid_http"),
        (b"GET /health HTTP/1.1\r\n" + HOST + b"a: b\x00\r\n\r\n", "invalid_http"),
        (post(b"{}", b"Transfer-Encoding: chunked\r\n"), "invalid_http"),
        (post(b"{}", b"Content-Length: 2\r\n"), "invalid_http"),
        (b"POST /generate HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "invalid_http"),
    ],
    ids=lambda value: repr(value)[:50],
)
async def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(head: bytes, code: str) -> None:
    found = service()
    heard = await one(found, head)
    assert (heard.statuses, heard.code) == ([400], code)
    assert b"connection: close" in heard.raw
    assert b"x-request-id: refused" in heard.raw
    assert b"x-content-type-options: nosniff" in heard.raw
    assert found.inference.asks == []
    assert found.count("mlxd_http_refused_total", reason=code) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 8192 + b"\r\n\r\n"],
        [b"GET /health HTTP/1.1\r\n" + HOST + b"X: ", *[b"a" * 65536] * 32],
        [b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\n" + HOST + b"\r\n"],
        [b"GET /", *[b"a" * 65536] * 32],
        [b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 16 + b"\r\n"],
        [HEALTH.replace(b"\r\n\r\n", b"\r\n") + b"X: y\r\n" * 100_000],
    ],
    ids=["value", "endless value", "target", "endless target", "lines", "endless lines"],
)
async def test_a_head_over_its_bounds_is_a_431(pieces: Sequence[bytes]) -> None:
    heard = await one(service(), *pieces)
    assert (heard.statuses, heard.code) == ([431], "request_head_too_large")


async def test_a_head_within_its_bounds_is_not() -> None:
    head = b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n"
    for padding in (b"X: " + b"a" * 8000 + b"\r\n", b"X: y\r\n" * 14):
        assert (await one(service(), head + padding + b"\r\n")).statuses == [200]


async def test_a_head_that_does_not_end_in_time_is_a_408() -> None:
    heard = await one(service(head_timeout=0.1), b"GET /health HTTP/1.1\r\n" + HOST)
    assert (heard.statuses, heard.code) == ([408], "request_timeout")


@pytest.mark.parametrize("noise", [b"", b"\r\n\r\n"])
async def test_a_client_that_says_nothing_is_let_go_without_a_word(noise: bytes) -> None:
    assert (await one(service(head_timeout=0.1), noise)).raw == b""


async def test_a_body_that_does_not_end_in_time_is_a_408() -> None:
    heard = await one(service(body_timeout=0.1), post(b"{}" + b" " * 10)[:-5])
    assert (heard.statuses, heard.code) == ([408], "request_timeout")


async def test_the_rest_of_a_body_that_nobody_reads_has_its_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from service.api import protocol

    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.0)
    heard = await one(service(body_timeout=0.1), post(b"x" * 100, path=b"/nope")[:-5])
    assert heard.statuses == [404]


async def test_a_connection_is_kept_after_an_early_answer_whose_body_came_whole() -> None:
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request_bytes = post(b"x" * 100, path=b"/nope")
        writer.write(request_bytes[:-5])
        assert b"404" in await reader.readuntil(b"}}")
        writer.write(request_bytes[-5:] + CLOSE)
        assert (await until_closed(reader)).statuses == [200]
        writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(b"x" * 3_000_000),
        b"POST /generate HTTP/1.1\r\n" + HOST + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"400\r\n" + b"x" * 1024 + b"\r\n" + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 3000 + b"0\r\n\r\n",
        b"POST /generate HTTP/1.1\r\n" + HOST + JSON + b"Expect: 100-continue\r\nContent-Length: 5000\r\n\r\n",
    ],
    ids=["declared", "chunked", "expect"],
)  # fmt: skip
async def test_a_body_over_the_limit_is_a_413_that_the_client_gets_to_read(request_bytes: bytes) -> None:
    heard = await one(service(), request_bytes)
    assert (heard.statuses, heard.code) == ([413], "request_too_large")


async def test_a_body_within_the_limit_is_asked_for() -> None:
    body = b'{"prompt": "x"}'
    head = post(body, b"Expect: 100-continue\r\n", b"Connection: close\r\n")[: -len(body)]
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await until_closed(reader)).statuses == [200]
        writer.close()


@pytest.mark.parametrize("request_bytes", [post(b'{"prompt": "x"}', b"Upgrade: h2c\r\n", b"Connection: Upgrade\r\n")])
async def test_an_offer_of_another_protocol_is_declined_and_the_body_read(request_bytes: bytes) -> None:
    """Java's client sends its first POST so; httptools alone would drop the body."""
    async with serving(service()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(request_bytes)
            assert b"HTTP/1.1 200" in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b"}")
            await reader.readuntil(b"}")
        writer.close()


async def test_an_encoded_slash_is_a_slash() -> None:
    request_bytes = CLOSE.replace(b"/livez", b"/v1/models/org%2Fmodel")
    assert b'"id":"org/model"' in (await one(service(), request_bytes)).raw


async def test_the_answer_names_no_server() -> None:
    assert b"\r\nserver:" not in (await one(service(), CLOSE)).raw.lower()


async def test_connections_leave_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with serving(service()) as port:
        for piece in (HEALTH, STREAM, b"GET", b"", post(b"x" * 5000), HEALTH * 2):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(piece)
            await writer.drain()
            writer.transport.abort()
    assert asyncio.all_tasks() == before
