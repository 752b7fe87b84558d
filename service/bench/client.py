"""Sends requests to one server and measures each: the client side of a load. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from service.bench.answer import STREAM, Answer
from service.bench.http import Broken, Connection


class BadTarget(ValueError):
    """The URL names no server that can be asked."""


class Api(StrEnum):
    """Which route is asked."""

    CHAT = "chat"
    COMPLETIONS = "completions"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self is Api.CHAT else "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is asked, and how. `url` is the server's, with `/v1` or without; `key` is a bearer token."""

    url: str
    api: Api = Api.CHAT
    model: str = "default"
    key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    """Seconds for a whole answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request as its client saw it. Times are seconds of the client's clock; `due` is when it ought to have been
    sent, and what latencies are counted from."""

    due: float
    sent: float
    ended: float
    first: float | None = None
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """Seconds between two pieces of text, one after the other."""
    output_tokens: int = 0
    told: bool = False
    """Whether the server told the tokens; else they are the pieces of text."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    retry_after: float | None = None
    text: str = ""

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first is None else self.first - self.due

    @property
    def end_to_end(self) -> float:
        return self.ended - self.due

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds, the first token apart; None of a single one."""
        return sum(self.gaps) / (self.output_tokens - 1) if self.gaps and self.output_tokens > 1 else None


class Client:
    """Asks one server over connections that are kept. `clock` is monotonic, in seconds."""

    def __init__(self, target: Target, *, clock: Callable[[], float] = time.perf_counter) -> None:
        parts = urlsplit(target.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BadTarget(f"{target.url} is no http address")
        self._target = target
        self._clock = clock
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._head = _head(target, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"))
        self._idle: list[Connection] = []

    def close(self) -> None:
        """Let all idle connections go."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def ask(self, body: Mapping[str, Any], *, due: float | None = None, keep_text: bool = False) -> Outcome:
        """Send one request and read its answer to the end; what goes wrong is in the outcome."""
        payload = json.dumps(body, separators=(",", ":")).encode()
        request = self._head + b"%d\r\n\r\n" % len(payload) + payload
        sent, answer, error = self._clock(), Answer(keep_text=keep_text), None
        try:
            async with asyncio.timeout(self._target.timeout):
                await self._exchange(request, answer)
        except TimeoutError:
            error = "timeout"
        except Broken as broken:
            error = broken.reason
        except OSError:
            error = "connect"
        return _outcome(answer, sent if due is None else due, sent, self._clock(), error or answer.error)

    async def _exchange(self, request: bytes, answer: Answer) -> None:
        """Over a kept connection; over another one where the server has closed that without a byte."""
        while connection := self._kept():
            try:
                await connection.exchange(request, answer)
            except Broken:
                if connection.answered:
                    raise
            else:
                self._keep(connection)
                return
        connection = await self._connect()
        await connection.exchange(request, answer)
        self._keep(connection)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self._clock), self._host, self._port, ssl=self._tls
        )
        return connection

    def _kept(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    def _keep(self, connection: Connection) -> None:
        if connection.usable:
            self._idle.append(connection)


def _head(target: Target, host: str, prefix: str) -> bytes:
    """The head of every request, up to the length of its body."""
    path = prefix.removesuffix("/v1") + target.api.path
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Accept: {STREAM}"]
    if target.key is not None:
        lines.append(f"Authorization: Bearer {target.key}")
    return "\r\n".join([*lines, "Content-Length: "]).encode("latin-1")


def _outcome(answer: Answer, due: float, sent: float, ended: float, error: str | None) -> Outcome:
    arrivals, usage = answer.arrivals, answer.usage
    told = usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details") or {}
    return Outcome(
        due=due,
        sent=sent,
        ended=ended,
        first=arrivals[0] if arrivals else None,
        gaps=array("d", (later - earlier for earlier, later in pairwise(arrivals))),
        output_tokens=len(arrivals) if told is None else int(told),
        told=told is not None,
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        error=error,
        retry_after=answer.retry_after,
        text=answer.text,
    )
