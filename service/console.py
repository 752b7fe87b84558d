"""What the person who started the service sees: progress until it is ready, how to ask it, why it ended.

A bar for each stage on a terminal, plain lines otherwise. Logs go elsewhere (standard error).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

import rich.console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from service.engine.engine import EngineState, EngineStatus
from service.observability.logging import line_writer

POLL_INTERVAL = 0.1
BAR_WIDTH = 30
EXAMPLE = '{"prompt": "The capital of France is", "max_tokens": 40, "temperature": 0}'


@dataclass(frozen=True, slots=True)
class Credential:
    """What a shell puts between double quotes after `Bearer`: as a person may read it, and for a file that is kept."""

    inline: str = field(repr=False)
    by_reference: str


OWN_KEY = Credential("$KEY", "$KEY")
"""Where there is no development key: one that the reader has."""


def url(host: str, port: int, *, tls: bool = False) -> str:
    """How an address is asked."""
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


class Console:
    """Speaks on one stream about the service at `url`. `credential` None: nobody is asked for one.

    `ops` is where the operator's listener is, if there is one. Its lines wait for no reader, and keep their order with
    those of the log.
    """

    def __init__(
        self, stream: TextIO, *, url: str, ops: str | None = None, credential: Credential | None = None
    ) -> None:
        self._console = rich.console.Console(file=stream, highlight=False, soft_wrap=True)
        self._line = line_writer(stream)
        self._credential = credential
        self.url = url
        self.ops = ops

    async def follow(self, status: Callable[[], EngineStatus]) -> None:
        """Show the engine's progress until it is ready (then the banner) or lost."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with self._console.status(f"mlxd: {EngineState.STARTING}") as spinner:
                final = await _watch(status, lambda now: spinner.update(_drawn(now)))
        else:
            final = await _watch(status, self._line_of_stage())
        if final.state is EngineState.READY:
            self._banner()

    def draining(self, status: EngineStatus, timeout: float) -> None:
        """Say what a stop signal has begun, and how to cut it short."""
        self._line(f"mlxd: stopping; {status.running} running may take {timeout:g} s more (again to leave at once)")

    def failed(self, status: EngineStatus) -> None:
        """Say why the service ends."""
        self._line(f"mlxd: the engine failed: {status.detail}")

    def _banner(self) -> None:
        """A line that works as it is printed. Output that is no terminal may be kept: the key is not in it."""
        self._line(f"mlxd: ready on {self.url}; try")
        who = ""
        if self._credential is not None:
            key = self._credential.inline if self._console.is_terminal else self._credential.by_reference
            who = f' -H "authorization: Bearer {key}"'
        if self._credential is OWN_KEY:
            self._line("  (KEY is a key of yours; to make one: mlxd keys create --name me --scope inference)")
        self._line(f"  curl -s {self.url}/generate{who} -H 'content-type: application/json' -d '{EXAMPLE}'")
        if self.ops is not None:
            self._line(f"mlxd: probes, /metrics, /docs and /admin also on {self.ops}")

    def _line_of_stage(self) -> Callable[[EngineStatus], None]:
        """Says each stage once: files that are downloaded side by side report in turn."""
        told: set[str] = set()

        def tell(now: EngineStatus) -> None:
            if (text := _words(now)) not in told:
                told.add(text)
                self._line(text)

        return tell


def _words(now: EngineStatus) -> str:
    return f"mlxd: {now.state}: {now.detail}" if now.detail else f"mlxd: {now.state}"


def _drawn(now: EngineStatus) -> rich.console.RenderableType:
    """The words, and a bar where it is known how much there is to do."""
    grid = Table.grid(padding=(0, 1))
    cells: list[rich.console.RenderableType] = [Text(_words(now))]  # no markup: a name may have brackets
    if now.total:
        cells += [ProgressBar(total=now.total, completed=now.done, width=BAR_WIDTH), f"{now.done / now.total:.0%}"]
    grid.add_row(*cells)
    return grid


async def _watch(status: Callable[[], EngineStatus], show: Callable[[EngineStatus], None]) -> EngineStatus:
    """Call `show` with each new piece of progress; returns the first status that is no progress any more."""
    shown = None
    while (now := status()).state in {EngineState.STARTING, EngineState.WARMING}:
        if now != shown:
            show(now)
            shown = now
        await asyncio.sleep(POLL_INTERVAL)
    return now
