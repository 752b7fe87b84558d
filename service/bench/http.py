"""One HTTP/1.1 connection of a load client, as cheap as Python allows: a protocol that reads where bytes arrive.

A client that shares its cores with the server must not cost what it measures, and must not read late: the time of
every byte is taken in `data_received`, before anything else is done with it. Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Protocol, cast

MAX_HEAD = 64 * 1024
MAX_LINE = 1024
"""Bytes of a chunk's size line or of one trailer."""


FINAL = 200
"""The lowest status that is an answer; those below are interim."""


class Broken(Exception):
    """The server broke off, or what it sent is no HTTP; `reason` is one word for a tally."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class Receiver(Protocol):
    """Who is told what arrives."""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """The status and the headers, names in lower case; called once."""

    def body(self, piece: bytes, at: float) -> None:
        """Bytes of the body, and when they arrived. Raises Broken when they make no sense."""


class _Part(Enum):
    HEAD = auto()
    LENGTH = auto()
    UNTIL_CLOSE = auto()
    SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    COMPLETE = auto()


class ResponseReader:
    """Takes one response after the other from bytes that may be split anywhere. Raises Broken."""

    def __init__(self) -> None:
        self._part = _Part.HEAD
        self._rest = b""
        self._left = 0
        self._closing = False
        self.status = 0
        self.headers: Mapping[str, str] = {}

    @property
    def complete(self) -> bool:
        return self._part is _Part.COMPLETE

    @property
    def started(self) -> bool:
        """Whether any byte of this response has arrived."""
        return self._part is not _Part.HEAD or bool(self._rest)

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow on this connection."""
        return self.complete and not self._rest and not self._closing

    def restart(self) -> None:
        """Expect the next response."""
        self._part, self._rest, self._left = _Part.HEAD, b"", 0
        self.status, self.headers = 0, {}

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body in `data`; `status` and `headers` are there before the first of them."""
        buffer = self._rest + data if self._rest else data
        if self._part is _Part.HEAD:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(buffer) > MAX_HEAD:
                    raise Broken("malformed", "the head of the answer has no end")
                self._rest = buffer
                return []
            self._read_head(buffer[:end].decode("latin-1"))
            buffer, self._rest = buffer[end + 4 :], b""
            if self._part is _Part.HEAD:  # an interim response
                return self.feed(buffer)
        if self._part is _Part.UNTIL_CLOSE:
            return [buffer] if buffer else []
        if self._part is _Part.LENGTH:
            return self._counted(buffer)
        pieces: list[bytes] = []
        self._rest = self._chunks(buffer, pieces)
        return pieces

    def end(self) -> None:
        """The server closed. Raises Broken unless that is how this response ends."""
        if self._part is _Part.UNTIL_CLOSE:
            self._part = _Part.COMPLETE
            self._closing = True
        if not self.complete:
            raise Broken("cut", "the connection was closed before the answer's end")

    def _read_head(self, text: str) -> None:
        first, *lines = text.split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise Broken("malformed", "the answer is not HTTP/1")
        self.status = int(rest[:3])
        named = (line.partition(":") for line in lines)
        self.headers = {name.lower(): value.strip() for name, _, value in named}
        wish = self.headers.get("connection", "").lower()
        self._closing = wish == "close" or (version == "HTTP/1.0" and wish != "keep-alive")
        if self.status < FINAL:
            return
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._part = _Part.SIZE
        elif (length := self.headers.get("content-length")) is not None:
            if not length.isdigit():
                raise Broken("malformed", "content-length is no number")
            self._left = int(length)
            self._part = _Part.LENGTH
        else:
            self._part = _Part.UNTIL_CLOSE

    def _counted(self, buffer: bytes) -> list[bytes]:
        piece, self._rest = buffer[: self._left], buffer[self._left :]
        self._left -= len(piece)
        if not self._left:
            self._part = _Part.COMPLETE
        return [piece] if piece else []

    def _chunks(self, buffer: bytes, pieces: list[bytes]) -> bytes:
        """Take what is whole off the buffer, data also in part; returns what is left of it."""
        at = 0
        while self._part is not _Part.COMPLETE:
            if self._part is _Part.SIZE:
                at = self._whole_chunks(buffer, at, pieces)
            if self._part is _Part.CHUNK:
                piece = buffer[at : at + self._left]
                if not piece:
                    break
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._part = _Part.CHUNK_END
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if len(buffer) - at > MAX_LINE:
                    raise Broken("malformed", "a chunk's size has no end")
                break
            self._line(buffer[at:end])
            at = end + 2
        return buffer[at:]

    def _whole_chunks(self, buffer: bytes, at: int, pieces: list[bytes]) -> int:
        """Take chunks off that are there as a whole, as nearly all are; returns where the next begins."""
        while (end := buffer.find(b"\r\n", at)) > at:
            try:
                size = int(buffer[at:end], 16)
            except ValueError:
                break  # an extension, or nonsense
            after = end + 2 + size
            if not size or buffer[after : after + 2] != b"\r\n":
                break
            pieces.append(buffer[end + 2 : after])
            at = after + 2
        return at

    def _line(self, line: bytes) -> None:
        """A line between the chunks: a size, the end of a chunk, a trailer."""
        if self._part is _Part.SIZE:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise Broken("malformed", "a chunk's size is no number") from None
            self._part = _Part.CHUNK if self._left else _Part.TRAILERS
        elif self._part is _Part.CHUNK_END:
            if line:
                raise Broken("malformed", "a chunk is longer than its size")
            self._part = _Part.SIZE
        elif not line:
            self._part = _Part.COMPLETE


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reader = ResponseReader()
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._done: asyncio.Future[None] | None = None
        self._told = False

    @property
    def usable(self) -> bool:
        """Whether a request may be sent now."""
        return self._transport is not None and self._receiver is None

    @property
    def answered(self) -> bool:
        """Whether any byte of the last answer has arrived."""
        return self._reader.started

    async def exchange(self, request: bytes, receiver: Receiver) -> None:
        """Send a request and tell `receiver` the answer until its end. Raises Broken. Cancelled, it closes."""
        assert self._transport is not None
        self._reader.restart()
        self._told = False
        self._receiver = receiver
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            self._receiver = None
            if not self._reader.keeps_alive:
                self.close()

    def close(self) -> None:
        """Let the connection go, whatever is still in it."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class

    def data_received(self, data: bytes) -> None:
        at = self._clock()
        receiver, done, reader = self._receiver, self._done, self._reader
        if receiver is None or done is None or done.done():
            self.close()  # nobody asked
            return
        try:
            pieces = reader.feed(data)
            if not self._told and reader.status >= FINAL:
                self._told = True
                receiver.head(reader.status, reader.headers)
            for piece in pieces:
                receiver.body(piece, at)
        except Broken as broken:
            done.set_exception(broken)
            return
        if reader.complete:
            done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a reset and a close are both an end
        self._transport = None
        if self._done is None or self._done.done():
            return
        try:
            self._reader.end()
        except Broken as broken:
            self._done.set_exception(broken)
        else:
            self._done.set_result(None)
