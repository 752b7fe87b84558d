"""A client that leaves, in every phase and in every way, gives everything back within one step + 100 ms."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.engine.engine import EngineStatus
from service.settings import Settings
from tests.fakes import FakeBackend, letters
from tests.serving import AMPLE, Served, served

pytestmark = pytest.mark.alone

GRACE = 0.1
"""Seconds beyond one step within which everything must be back."""


def settings_for(state: Path) -> Settings:
    return Settings.load(
        None, {"server.port": 0, "server.state_dir": state, "engine.max_rows": 1, "auth.enabled": False}
    )


class Gated:
    """A scripted engine whose steps a test lets through one by one."""

    def __init__(self, state: Path) -> None:
        self.gate = threading.Semaphore(0)
        self.backend = FakeBackend(gate=self.gate, prefill_steps=3)
        self._serving = served(settings_for(state), self.backend)
        self.service: Served = self._serving.__enter__()

    def close(self) -> None:
        self.gate.release(100_000)
        self._serving.__exit__(None, None, None)

    def until(self, condition: Callable[[EngineStatus], bool], seconds: float = 10) -> float:
        """Wait for a condition on the engine's status; returns how long it took."""
        began = time.perf_counter()
        while not condition(self.service.app.engine.status()):
            assert time.perf_counter() - began < seconds, self.service.app.engine.status()
            time.sleep(0.001)
        return time.perf_counter() - began


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[Gated]:
    made = Gated(tmp_path)
    yield made
    made.close()


def connect(service: Served, *, stream: bool) -> socket.socket:
    """A client that has asked for more than will ever come."""
    port = int(service.url.rsplit(":", 1)[1])
    client = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"prompt": "ab", "max_tokens": 4000, "stream": stream}).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


def leave(client: socket.socket, how: str) -> None:
    if how == "RST":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    elif how == "half-close":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_leaving_gives_everything_back(gated: Gated, phase: str, *, stream: bool, how: str) -> None:
    first = connect(gated.service, stream=False) if phase == "queued" else None
    if first is not None:
        gated.until(lambda status: status.running == 1)
    client = connect(gated.service, stream=stream)
    if phase == "queued":
        gated.until(lambda status: status.waiting == 1)
    else:
        gated.until(lambda status: status.running == 1)
        gated.gate.release(1 if phase == "prefill" else 5)
        wanted = 1 if phase == "prefill" else 5
        while gated.backend.steps < wanted:
            time.sleep(0.001)
    leave(client, how)
    if phase == "queued":
        assert gated.until(lambda status: status.waiting == 0) < GRACE, "a waiting row needs no step"
    else:
        while not gated.service.app.engine._worker._orders.cancelled:  # type: ignore[union-attr]
            time.sleep(0.001)
        gated.gate.release(1)
        assert gated.until(lambda status: status.running == 0) < GRACE, "one step, and it is gone"
        assert gated.backend.rows == {}
    client.close()
    if first is not None:
        first.close()
        gated.gate.release(100_000)
        gated.until(lambda status: status.running == 0)
    asyncio.run(gated.service.settled())


def test_a_reader_that_stalls_is_dropped_and_holds_nobody_up(tmp_path: Path) -> None:
    limit = 2_000_000
    settings = Settings.load(
        None,
        {
            "server.port": 0,
            "server.state_dir": tmp_path,
            "http.write_timeout": 0.3,
            "auth.enabled": False,
            "engine.max_rows": 5,
            "engine.max_output_tokens": limit,
            **AMPLE,
        },
    )
    # A token of many bytes, so that the kernel's socket buffers (megabytes) are soon full.
    backend = FakeBackend(
        context_length=2 * limit, script=lambda row, index: 0 if len(row.prompt) > 2 else letters(row, index)
    )
    with served(settings, backend) as service, socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", int(service.url.rsplit(":", 1)[1])))
        body = json.dumps({"prompt": "long", "n": 4, "max_tokens": limit, "stream": True, "model": "fake"}).encode()
        stalled.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        while service.app.engine.status().running < 4:
            time.sleep(0.001)
        assert service.generate("ab", max_tokens=50)["text"], "somebody else is served meanwhile"
        asyncio.run(service.settled(60))
