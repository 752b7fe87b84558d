"""What the person who started the service sees: progress until it is ready, how to ask it, why it ended.

Spinner and colours on a terminal, plain lines otherwise. Logs go elsewhere (standard error).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TextIO

import rich.console
from rich.markup import escape

from service.engine.engine import EngineState, EngineStatus

POLL_INTERVAL = 0.1
EXAMPLE = '{"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}'


class Console:
    """Speaks on one stream about one listening address."""

    def __init__(self, stream: TextIO, *, host: str, port: int) -> None:
        self._console = rich.console.Console(file=stream, highlight=False, soft_wrap=True)
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def follow(self, status: Callable[[], EngineStatus]) -> None:
        """Show the engine's progress until it is ready (then the banner) or lost."""
        if self._console.is_terminal:
            with self._console.status(f"mlxd: {EngineState.STARTING}") as spinner:
                final = await _watch(status, lambda text: spinner.update(escape(text)))
        else:
            final = await _watch(status, self._line)
        if final.state is EngineState.READY:
            self._banner()

    def draining(self, status: EngineStatus, timeout: float) -> None:
        """Say what a stop signal has begun, and how to cut it short."""
        self._line(f"mlxd: stopping; {status.running} running may take {timeout:g} s more (again to leave at once)")

    def failed(self, status: EngineStatus) -> None:
        """Say why the service ends."""
        self._line(f"mlxd: the engine failed: {status.detail}")

    def _banner(self) -> None:
        self._line(f"mlxd: ready on {self.url}; try")
        self._line(f"  curl -s {self.url}/generate -H 'content-type: application/json' -d '{EXAMPLE}'")

    def _line(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may be reading any more; that must not stop a service
            self._console.file.write(f"{text}\n")  # rich's own print would end the process on a broken pipe
            self._console.file.flush()


async def _watch(status: Callable[[], EngineStatus], show: Callable[[str], None]) -> EngineStatus:
    """Call `show` with each new piece of progress; returns the first status that is no progress any more."""
    shown = ""
    while (now := status()).state in {EngineState.STARTING, EngineState.WARMING}:
        text = f"mlxd: {now.state}: {now.detail}" if now.detail else f"mlxd: {now.state}"
        if text != shown:
            show(text)
            shown = text
        await asyncio.sleep(POLL_INTERVAL)
    return now
