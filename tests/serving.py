"""A real service on a real socket, in a thread of the test process."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service import serve
from service.app import App, build
from service.engine.backend import Backend
from service.engine.engine import EngineState
from service.settings import Settings

START_TIMEOUT = 120


@dataclass(frozen=True)
class Served:
    """A running service. Its loop is not the test's: reach it over HTTP, or by `call`."""

    url: str
    app: App
    loop: asyncio.AbstractEventLoop

    def generate(self, prompt: str, **more: Any) -> dict[str, Any]:
        """One greedy `/generate`, whole."""
        body = {"prompt": prompt, "temperature": 0, **more}
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=300)
        answer.raise_for_status()
        return dict(answer.json())

    def books_closed(self) -> bool:
        """Whether no row, queue place or reader is left anywhere."""
        worker = self.app.engine._worker
        return worker is None or (worker.idle() and not self.app.engine._live)

    async def settled(self, timeout: float = 10) -> None:
        """Wait until everything has been given back; fails after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            while not self.books_closed():
                await asyncio.sleep(0.005)


@contextmanager
def process(state_dir: Path, *, timed: bool = False, **overrides: str) -> Iterator[str]:
    """`mlxd serve` with the demo model as a process of its own; yields its URL once it is ready.

    One whose answers are `timed` is not traced for coverage.
    """
    outside = {name: value for name, value in os.environ.items() if not (timed and name.startswith("COVERAGE_"))}
    environment = {**outside, "MLXD_MODEL__REFERENCE": "demo", "MLXD_SERVER__STATE_DIR": str(state_dir), **overrides}
    command = [sys.executable, "-m", "service", "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            yield next(found[0] for line in running.stdout if (found := re.search(r"http://[^;\s]+", line)))
        finally:
            running.terminate()
            assert running.wait(60) == 0


@contextmanager
def served(settings: Settings, backend: Backend | None = None) -> Iterator[Served]:
    """Run the service until the block ends; it is ready (or failed) when the block begins."""
    listener = serve.listen(settings.server)
    app = build(settings, backend)
    server = serve.Server(serve._uvicorn_config(settings, app))
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await app.engine.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await app.engine.wait(EngineState.READY, EngineState.FAILED)
        ready.set()
        await serving
        await app.engine.stop()

    def own_loop() -> None:
        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(main())

    thread = threading.Thread(target=own_loop, name="service")
    thread.start()
    try:
        assert ready.wait(START_TIMEOUT)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", app, loops[0])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
