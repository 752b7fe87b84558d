"""As test_disconnect.py, on a real model: the row, its queue place and every byte of its caches are back in time."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import pytest

from service.engine.backend import Row, StepResult
from service.engine.mlx_backend import MlxBackend
from service.settings import Settings
from tests.faults.test_disconnect import GRACE, leave
from tests.serving import Served, served
from tests.tiny import make_tiny_llama

pytestmark = pytest.mark.alone

CONTEXT = 32768
ENDLESS = 16000
"""Tokens that take far longer than any test."""

PROMPTS = {"queued": 5, "prefill": CONTEXT - ENDLESS - 1, "decode": 5}
"""Bytes, which are tokens, by phase; at 16 tokens a step the long one is in prefill for a thousand steps."""


class Watched(MlxBackend):
    """The real backend, which notes how long steps take and where it found the rows that it was told to remove."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.inserted = 0
        self.tokens = 0
        self.steps: list[float] = []
        self.left_from: list[str] = []

    def insert(self, row: Row) -> None:
        self.inserted += 1
        super().insert(row)

    def remove(self, uids: Iterable[int], *, keep_prefix: bool = False) -> None:
        gone = set(uids)
        prefill = set(self._prefill.uids) if self._prefill else set()
        decode = {state.row.uid for state in self._decode.rows}
        self.left_from += ["prefill"] * len(gone & prefill) + ["decode"] * len(gone & decode)
        super().remove(gone, keep_prefix=keep_prefix)

    def step(self) -> StepResult:
        began = time.perf_counter()
        result = super().step()
        self.tokens += len(result.tokens)
        self.steps.append(time.perf_counter() - began)
        return result

    def empty(self) -> bool:
        """Whether nothing of any row is left."""
        rows = self._waiting or self._prefill is not None or len(self._decode)
        return not (rows or self.busy or self._gone)

    def watch(self) -> None:
        """Forget what was noted; only while nothing runs."""
        self.inserted = self.tokens = 0
        self.steps.clear()
        self.left_from.clear()


def beside_prefixes(service: Served) -> int:
    """Active bytes of mlx, less those that the prefix cache keeps on purpose."""
    return int(mx.get_active_memory()) - service.app.engine.status().memory.prefix_cache


@dataclass(frozen=True)
class Scene:
    """One row's place, a queue behind it, and what memory was before anybody came."""

    service: Served
    backend: Watched
    resting: int

    def at_rest(self) -> bool:
        """Whether prefixes of rows that ended are kept by now, and the engine says so."""
        return self.backend.empty() and self.service.app.engine.status().memory == self.backend.memory()

    def until(self, condition: Callable[[], bool], seconds: float = 30) -> float:
        """Wait for a condition; returns the seconds that it took."""
        began = time.perf_counter()
        while not condition():
            assert time.perf_counter() - began < seconds, self.service.app.engine.status()
            time.sleep(0.0005)
        return time.perf_counter() - began

    def connect(self, phase: str, *, stream: bool) -> socket.socket:
        """A client that has asked for more than will ever come, in a model that may not end by itself."""
        body = json.dumps(
            {
                "model": "default",
                "prompt": "x" * PROMPTS[phase],
                "max_tokens": ENDLESS,
                "stream": stream,
                "logit_bias": {"2": -100},
            }
        ).encode()
        client = socket.create_connection(("127.0.0.1", int(self.service.url.rsplit(":", 1)[1])))
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
        client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return client

    def reach(self, phase: str) -> None:
        """Wait until the client that came last is in `phase`."""
        engine, backend = self.service.app.engine, self.backend
        if phase == "queued":
            self.until(lambda: engine.status().waiting == 1 and backend.tokens > 0)
        elif phase == "prefill":
            self.until(lambda: len(backend.steps) >= 3)
        else:
            self.until(lambda: backend.tokens >= 3)

    def all_back(self) -> bool:
        """Books, batches, and mlx's own count of bytes."""
        memory = self.service.app.engine.status().memory
        return (
            self.service.books_closed()
            and self.backend.empty()
            and memory.batch == 0
            and beside_prefixes(self.service) <= self.resting
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Watched]]:
    folder: Path = tmp_path_factory.mktemp("state")
    settings = Settings.load(
        None,
        {
            "model.reference": str(make_tiny_llama(folder / "tiny", max_position_embeddings=CONTEXT)),
            "server.port": 0,
            "server.state_dir": folder,
            "auth.enabled": False,
            "engine.max_rows": 1,
            "engine.max_prefill_chunk": 16,
            "engine.memory_budget": 1 << 30,
        },
    )
    backend = Watched(settings)
    with served(settings, backend) as found:
        found.generate("a prefix that stays, so that there is something to tell apart", max_tokens=20)
        yield found, backend


@pytest.fixture
def scene(service: tuple[Served, Watched]) -> Scene:
    found, backend = service
    asyncio.run(found.settled())
    here = Scene(found, backend, 0)
    here.until(here.at_rest)
    backend.watch()
    return replace(here, resting=beside_prefixes(found))


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_leaving_a_real_model_gives_everything_back(scene: Scene, phase: str, *, stream: bool, how: str) -> None:
    engine, backend = scene.service.app.engine, scene.backend
    kept = engine.status().memory.prefix_cache
    assert kept > 0
    first = scene.connect("decode", stream=False) if phase == "queued" else None
    if first is not None:
        scene.until(lambda: engine.status().running == 1)
    with closing(scene.connect(phase, stream=stream)) as client:
        scene.reach(phase)
        assert beside_prefixes(scene.service) > scene.resting, "its caches are real"
        leave(client, how)
        if first is not None:
            queued = scene.until(lambda: engine.status().waiting == 0)
            print(f"\nqueued, {how}: out of the queue in {queued * 1000:.1f} ms")
            assert queued < GRACE, "a waiting row needs no step"
            assert (engine.status().running, backend.inserted) == (1, 1), "the backend never saw it"
            first.close()
        seconds = scene.until(scene.all_back)
    longest = max(backend.steps)
    print(f"\n{phase}, {how}: all back in {seconds * 1000:.1f} ms, longest step {longest * 1000:.1f} ms")
    assert backend.left_from == [phase if first is None else "decode"], "it left in the phase that is meant"
    assert seconds <= longest + GRACE
    assert engine.status().memory.prefix_cache == kept
    asyncio.run(scene.service.settled())
