"""A server of raw bytes whose truth is known: what it sends, and at which second of a clock that it moves itself."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


class Clock:
    """Seconds that the script moves. Who looks at it is noticed: that is how the server knows that bytes were read."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looked = asyncio.Event()

    def __call__(self) -> float:
        self.looked.set()
        return self.now


@dataclass(frozen=True)
class Send:
    """`data`, so many seconds after the request."""

    seconds: float
    data: bytes


@dataclass(frozen=True)
class Cut:
    """The connection is reset."""


@dataclass(frozen=True)
class Close:
    """The connection is closed in an orderly way."""


Script = Sequence[Send | Cut | Close]


@dataclass
class Scripted:
    """Plays one script for each request, in turn, the last one again and again."""

    scripts: Sequence[Script]
    clock: Clock = field(default_factory=Clock)
    watched: bool = True
    """Whether the client looks at that clock."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.strip().split("\r\n")[1:])
        body = await reader.readexactly(int(fields["content-length"]))
        script = self.scripts[min(len(self.requests), len(self.scripts) - 1)]
        self.heads.append(head)
        self.requests.append(json.loads(body))
        began = self.clock.now
        for step in script:
            match step:
                case Send(seconds, data):
                    self.clock.now = began + seconds
                    self.clock.looked.clear()
                    writer.write(data)
                    if self.watched:
                        await self.clock.looked.wait()
                case Cut():
                    writer.transport.abort()
                    return False
                case Close():
                    return False
        return True


@asynccontextmanager
async def playing(*scripts: Script, watched: bool = True, tls: ssl.SSLContext | None = None) -> AsyncIterator[Scripted]:
    """A server on a free port of this machine."""
    scripted = Scripted(scripts, watched=watched)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0, ssl=tls)
    scripted.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield scripted


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(payload: dict[str, Any] | str) -> bytes:
    text = payload if isinstance(payload, str) else json.dumps(payload)
    return b"data: " + text.encode() + b"\n\n"


def said(text: str) -> bytes:
    """A chat chunk with so much text."""
    return event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})


def usage(completion: int, *, prompt: int = 7, cached: int = 0) -> bytes:
    tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": {**tokens, "prompt_tokens_details": {"cached_tokens": cached}}})


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
OPENING = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
CLOSING = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
DONE = event("[DONE]")
END = b"0\r\n\r\n"


def plain(status: str, body: bytes, *headers: str) -> bytes:
    """An answer that is no stream."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body
