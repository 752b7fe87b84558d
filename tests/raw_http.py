"""Raw bytes over real sockets, and what was heard back."""

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.engine.generation import Delta
from service.settings import HttpSettings, Settings
from tests.fakes_api import DONE, FakeInference, Service
from tests.server_api import serving

HOST = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
CLOSE = b"GET /livez HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
TIGHT = HttpSettings(
    max_body_bytes=4096,
    max_header_bytes=8192,
    max_headers=16,
    head_timeout=60,
    body_timeout=60,
    write_timeout=60,
    stream_keepalive=60,
)


def service(**limits: Any) -> Service:
    settings = Settings(http=TIGHT.model_copy(update=limits))
    return Service(settings=settings, inference=FakeInference([Delta("ok"), DONE]))


def post(body: bytes, *headers: bytes, path: bytes = b"/generate") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + JSON + length + b"".join(headers) + b"\r\n" + body


STREAM = post(b'{"prompt": "x", "stream": true}')


@dataclass
class Heard:
    raw: bytes

    @property
    def statuses(self) -> list[int]:
        return [int(part[:3]) for part in self.raw.split(b"HTTP/1.1 ")[1:]]

    @property
    def code(self) -> str:
        return str(json.loads(self.raw.rpartition(b"\r\n\r\n")[2])["error"]["code"])


async def until_closed(reader: asyncio.StreamReader) -> Heard:
    """Everything until the server closes; the test's own timeout is the bound."""
    heard = b""
    with suppress(ConnectionError):
        while chunk := await reader.read(65536):
            heard += chunk
    return Heard(heard)


async def talk(port: int, *pieces: bytes) -> Heard:
    """Send the pieces, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
    heard = await until_closed(reader)
    writer.close()
    return heard


async def one(found: Service, *pieces: bytes) -> Heard:
    async with serving(found) as port:
        return await talk(port, *pieces)
