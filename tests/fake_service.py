"""A service without a model, for the tests of `serve.py`: `python -m tests.fake_service STATE_DIR OPTION...`.

`POST /generate` streams `data: N` frames; `GET /health` mirrors the engine's state.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.engine.backend import MemoryUse
from service.engine.engine import EngineState, EngineStatus
from service.errors import EngineFailed, ModelUnavailable, ServiceError
from service.observability.logging import configure, get_logger
from service.observability.metrics import Metrics
from service.observability.reloads import Reloads
from service.serve import run
from service.settings import Settings

Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class FakeEngine:
    """Loads for `load` seconds; then `fails` or is ready. A stream has `frames` frames, one each 20 ms."""

    load: float = 0.05
    frames: int = 10
    fails: str = ""
    fail_after: float = 0.0
    drain_hangs: bool = False
    lifespan_fails: bool = False
    state: EngineState = EngineState.STARTING
    detail: str = "reading [weights]"
    done: int = 0
    total: int = 0
    failure: ServiceError | None = None
    running: int = 0
    stopped: bool = False
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self.state,
            detail=self.detail,
            done=self.done,
            total=self.total,
            waiting=0,
            running=self.running,
            step_age=None,
            memory=MemoryUse(),
        )

    async def wait(self, *states: EngineState) -> EngineState:
        while self.state not in states:
            await self.changed.wait()
        return self.state

    async def start(self) -> None:
        self.background.add(asyncio.create_task(self._load()))

    async def _load(self) -> None:
        await asyncio.sleep(self.load)
        self.move(EngineState.WARMING)
        self.done = self.total // 2
        await asyncio.sleep(self.load)
        if self.fails == "model":
            self.fail(ModelUnavailable("no such model"))
            return
        self.move(EngineState.READY)
        if self.fails:
            await asyncio.sleep(self.fail_after)
            self.fail(EngineFailed("the canary died"))

    def move(self, state: EngineState) -> None:
        if self.state is not EngineState.DRAINING or state is EngineState.STOPPED:
            self.state = state
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def fail(self, error: ServiceError) -> None:
        self.failure, self.detail = error, error.message
        self.cut.set()
        self.move(EngineState.FAILED)

    async def drain(self, timeout: float) -> None:
        self.move(EngineState.DRAINING)
        if self.drain_hangs:
            await asyncio.Event().wait()
        try:
            async with asyncio.timeout(timeout):
                while self.running:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self.cut.set()
            while self.running:
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self.stopped = True
        self.move(EngineState.STOPPED)


class FakeApp:
    protocol = HttpToolsProtocol

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.reloads = Reloads(Metrics())
        self.seen: list[str] = []
        """What ended, in order."""
        self.close_hangs = False
        self.looked = 0

    def watch(self) -> AbstractContextManager[object]:
        return nullcontext()

    def open(self) -> None:
        """There is nobody to ask for a key here."""

    async def close(self) -> None:
        self.seen.append("store closed")
        get_logger("fake").info("store_closed")
        if self.close_hangs:
            await asyncio.Event().wait()

    def prepared(self, settings: Settings) -> Callable[[], None]:
        return lambda: None

    async def refresh(self) -> None:
        self.looked += 1
        get_logger("fake").info("keys_looked_at")

    @property
    def operations(self) -> Any:
        return self.asgi

    async def asgi(self, scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self.engine.state is not EngineState.READY:
            await _answer(send, 503, b"not ready")
        elif scope["path"] == "/health":
            await _answer(send, 200, b"ok")
        else:
            await self._stream(send)

    async def _lifespan(self, receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
        await receive()
        if self.engine.lifespan_fails:
            raise RuntimeError("no start-up today")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.seen.append("ledger written")
        await send({"type": "lifespan.shutdown.complete"})

    async def _stream(self, send: Send) -> None:
        engine = self.engine
        engine.running += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for number in range(engine.frames):
                await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
                await asyncio.sleep(0.02)
                if engine.cut.is_set():
                    await send({"type": "http.response.body", "body": b"data: error\n\n", "more_body": True})
                    break
            await send({"type": "http.response.body", "body": b""})
        finally:
            engine.running -= 1


async def _answer(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def free_ports(state_dir: Path) -> Settings:
    return Settings.load(None, {"server.port": 0, "ops.bind": "127.0.0.1:0", "server.state_dir": state_dir})


def main(state_dir: str, *options: str) -> int:
    values = dict(option.split("=", 1) for option in options)
    drain_timeout = float(values.pop("drain_timeout", "30"))
    supervised = bool(values.pop("supervised", ""))
    log_file = values.pop("log", None)
    configure(level="info", fmt="json", file=None if log_file is None else Path(log_file))
    settings = Settings.load(
        None,
        {
            "server.port": int(values.pop("port", "0")),
            "server.state_dir": Path(state_dir),
            "auth.enabled": False,
            "ops.bind": values.pop("ops", "127.0.0.1:0"),
            "engine.drain_timeout": drain_timeout,
        },
    )
    types: dict[str, Callable[[str], Any]] = {
        "load": float,
        "frames": int,
        "fails": str,
        "fail_after": float,
        "total": int,
    }
    given = {name: types.get(name, bool)(value) for name, value in values.items()}
    return run(settings, build=lambda _: FakeApp(FakeEngine(**given)), supervised=supervised)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
