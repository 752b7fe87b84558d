"""A real service on a real socket, in a thread of the test process."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from service.app import App, build
from service.auth.access_control import AccessService
from service.auth.api_keys import IssuedKey, Operator
from service.auth.key_spec import KeySpec
from service.auth.pepper import Peppers, pepper_file
from service.engine.backend import Backend
from service.engine.engine import EngineState
from service.listening import Listeners, listen
from service.settings import OpsSettings, Settings
from service.storage.database import Database

START_TIMEOUT = 120

BRIEF_CHUNK = 512
"""`engine.max_prefill_chunk` with which a tiny model of a long context is ready 2.5 s sooner: a start measures chunks
up to the largest, and one of 2,048 tokens takes long also there."""

AMPLE: Mapping[str, Any] = {
    "limits.failed_authentication_per_minute": 1_000_000,
    "limits.plans": {
        "default": {
            "requests_per_minute": 1_000_000,
            "request_burst": 1_000_000,
            "tokens_per_minute": 2**50,
            "max_output_tokens": 2**50,
            "concurrent_requests": 1_000_000,
        },
        "gold": {},
    },
}
"""Settings for tests that are about something else than limits, and ask more than anybody may by default."""


@dataclass(frozen=True)
class Served:
    """A running service. Its loop is not the test's: reach it over HTTP, or by `call`."""

    url: str
    app: App
    loop: asyncio.AbstractEventLoop
    ops_url: str
    """The operator's listener."""

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


def make_key(settings: Settings, *scopes: str, **more: Any) -> IssuedKey:
    """A key in the database of `settings`, made as another process would; `more` are fields of KeySpec."""
    peppers = Peppers.open(pepper_file(settings.auth, settings.server.state_dir))
    operator = Operator(actor="test", peppers=peppers, environment="test", now=more.pop("now", time.time))
    spec = KeySpec.of(**{"name": "test", "scopes": scopes, **more})
    with Database.open(settings.storage, settings.server.state_dir, migrate=True) as database:
        return database.write(lambda connection: operator.create(connection, spec)).result()


def bearer(key: IssuedKey | str) -> dict[str, str]:
    """The header that shows a key."""
    return {"authorization": f"Bearer {key if isinstance(key, str) else key.text}"}


@dataclass(frozen=True)
class Running:
    """A service in a process of its own. `output` is what it has printed so far, logs included."""

    url: str
    pid: int
    output: Path


@contextmanager
def started(
    state_dir: Path, *, timed: bool = False, folder: str | None = None, module: str = "service", **overrides: str
) -> Iterator[Running]:
    """`mlxd serve` with the demo model as a process of its own, once it is ready.

    Nobody is asked for a credential unless `overrides` say so. One whose answers are `timed` is not traced for
    coverage. `folder` is the one that it is started in. Another `module` is one that changes something first.
    """
    outside = {name: value for name, value in os.environ.items() if not (timed and name.startswith("COVERAGE_"))}
    ours = {
        "MLXD_MODEL__REFERENCE": "demo",
        "MLXD_SERVER__STATE_DIR": str(state_dir),
        "MLXD_AUTH__ENABLED": "false",
        "MLXD_OPS__BIND": "127.0.0.1:0",
        "MLXD_ENGINE__MAX_PREFILL_CHUNK": str(BRIEF_CHUNK),
    }
    command = [sys.executable, "-m", module, "serve", "--port", "0"]
    with (
        tempfile.NamedTemporaryFile("wb", suffix=".log") as log,
        subprocess.Popen(command, cwd=folder, env={**outside, **ours, **overrides}, stdout=log, stderr=log) as running,
    ):
        output = Path(log.name)
        try:
            yield Running(_banner_url(running, output), running.pid, output)
        finally:
            running.terminate()
            assert running.wait(60) == 0


def _banner_url(running: subprocess.Popen[bytes], output: Path) -> str:
    """Wait for the banner, and take the address from it."""
    ends = time.monotonic() + START_TIMEOUT
    while (found := re.search(r"ready on (https?://[^;\s]+);", output.read_text("utf-8", "replace"))) is None:
        assert running.poll() is None, output.read_text("utf-8", "replace")
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found[1]


@contextmanager
def process(state_dir: Path, *, timed: bool = False, **overrides: str) -> Iterator[str]:
    """As `started`; yields the URL."""
    with started(state_dir, timed=timed, **overrides) as running:
        yield running.url


@asynccontextmanager
async def opened(access: AccessService) -> AsyncIterator[None]:
    """What is behind authentication, running; closed after the block."""
    try:
        async with access.run():
            yield
    finally:
        await access.close()


@contextmanager
def served(settings: Settings, backend: Backend | None = None) -> Iterator[Served]:
    """Run the service until the block ends, with an operator's listener on a free port; it is ready (or failed) when
    the block begins."""
    settings = settings.model_copy(update={"ops": OpsSettings(bind="127.0.0.1:0")})
    sockets = listen(settings)
    assert sockets.ops is not None
    app = build(settings, backend)
    listeners = Listeners(settings, app, sockets)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await app.engine.start()
        serving = asyncio.create_task(listeners.serve())
        await app.engine.wait(EngineState.READY, EngineState.FAILED)
        ready.set()
        assert await serving
        await app.engine.stop()
        await app.close()

    def own_loop() -> None:
        with asyncio.Runner(loop_factory=listeners.loop_factory) as runner:
            runner.run(main())

    thread = threading.Thread(target=own_loop, name="service")
    public, ops = (f"127.0.0.1:{each.getsockname()[1]}" for each in (sockets.public, sockets.ops))
    thread.start()
    try:
        assert ready.wait(START_TIMEOUT)
        scheme = "https" if settings.server.tls_certificate else "http"
        yield Served(f"{scheme}://{public}", app, loops[0], f"http://{ops}")
    finally:
        listeners.close()
        thread.join(60)
        assert not thread.is_alive()
