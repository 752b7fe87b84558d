"""`mlxd top`: how the service is doing, live in a terminal, from what it tells Prometheus.

Asks `/metrics` and nothing else, so its key needs the scope `metrics` only. A service that is slow, restarts or goes
away is a line under the last picture, and is asked again; a key that is refused ends it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from service.cli.context import load_settings
from service.cli.output import AsJson
from service.cli.reach import Unanswered, configured, credential

if TYPE_CHECKING:
    import httpx

    from service.cli.scrape import Scrape
    from service.cli.top_frame import Frame

TIMEOUT = 5.0
"""Seconds for a whole answer."""

MAX_BYTES = 32 * 1024 * 1024

WINDOW = 30.0
"""Seconds that percentiles, requests and consumers are of: in one interval there may be a single event, or none."""


class Source:
    """The metrics endpoint of a service at `url`. `clock` is monotonic. Raises httpx.InvalidURL when it is made."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        import ssl

        import httpx

        self._url = httpx.URL(url.rstrip("/") + "/metrics")
        self._clock = clock
        self._client = httpx.Client(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            transport=transport,
            trust_env=False,  # a proxy would get the key
            verify=ssl.create_default_context(),
        )

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def look(self) -> Scrape:
        """One scrape. Raises Unanswered."""
        import httpx

        from service.cli.scrape import NotMetrics, Scrape

        try:
            text = self._text().decode("utf-8", "replace")
            return Scrape.parse(text, self._clock())
        except httpx.TimeoutException:
            raise Unanswered(f"no answer in {TIMEOUT:g} s") from None
        except httpx.UnsupportedProtocol as error:
            raise Unanswered(str(error), for_good=True) from None
        except httpx.ConnectError as error:
            raise Unanswered(f"cannot be reached: {error}") from None
        except httpx.HTTPError as error:
            raise Unanswered(f"the answer broke off: {error}") from None
        except NotMetrics as error:
            raise Unanswered(f"what is there {error}; is it mlxd?", for_good=True) from None

    def _text(self) -> bytes:
        import httpx

        began = self._clock()
        body = bytearray()
        with self._client.stream("GET", self._url) as answer:
            if (refusal := _refusal(answer.status_code)) is not None:
                raise refusal
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > MAX_BYTES:
                    raise Unanswered(f"more than {MAX_BYTES} bytes; is it mlxd?", for_good=True)
                if self._clock() - began > TIMEOUT:
                    raise httpx.ReadTimeout("slow")
        return bytes(body)


def _refusal(status: int) -> Unanswered | None:
    match status:
        case 200:
            return None
        case 401:
            return Unanswered("a key is needed, or this one is refused (401): --key-file FILE", for_good=True)
        case 403:
            return Unanswered("the key lacks the scope `metrics` (403)", for_good=True)
        case 404:
            return Unanswered("there is no /metrics (404); is it mlxd?", for_good=True)
        case 429:
            return Unanswered("too many requests with this key (429)")
        case _:
            return Unanswered(f"answers {status}")


class Pause:
    """Waits between two looks, which Ctrl-C ends with a KeyboardInterrupt; while it is entered, on the main thread.

    Elsewhere the first Ctrl-C is noted, and raised by the next wait: raised inside httpx it left a lock taken for which
    the pool's own `close` then waited for ever, and inside a finaliser it is lost. The second is raised wherever it
    comes, for who does not want to wait for an answer.
    """

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self._sleep = sleep
        self._noted = self._waiting = False

    def __enter__(self) -> Self:
        self._former = signal.getsignal(signal.SIGINT)
        if self._former is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)

    def __call__(self, seconds: float) -> None:
        """Wait so long. Raises KeyboardInterrupt."""
        self._waiting = True
        if self._noted:
            raise KeyboardInterrupt
        self._sleep(seconds)
        self._waiting = False

    def _on_interrupt(self, *_: object) -> None:
        if self._noted or self._waiting:
            raise KeyboardInterrupt
        self._noted = True


def pictures(
    look: Callable[[], Scrape],
    interval: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
    now: Callable[[], float] = time.time,
) -> Iterator[Frame | Unanswered]:
    """One each `interval` seconds, from the second look on. Raises Unanswered where that is for good."""
    from service.cli.scrape import Between
    from service.cli.top_frame import frame

    looks: deque[Scrape] = deque()
    while True:
        try:
            last = look()
        except Unanswered as unanswered:
            if unanswered.for_good:
                raise
            yield unanswered
        else:
            if looks and Between(looks[-1], last).restarted:
                looks = deque([looks[-1]])  # what came before is another process's
            while len(looks) > 1 and last.at - looks[0].at > WINDOW:
                looks.popleft()
            if looks:
                yield frame(looks[0], looks[-1], last, now=now())
            looks.append(last)
        sleep(interval)


def top(
    context: typer.Context,
    *,
    url: Annotated[str | None, typer.Option(help="Of the service; as configured when not given.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A key (0600) with the scope metrics; the development key.")
    ] = None,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option(help="Print one picture, after two looks, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a running service is doing, live. Ctrl-C ends it."""
    import httpx

    settings = load_settings(context)
    where = url or configured(settings)
    try:
        source = Source(where, credential(settings, url, key_file))
    except httpx.InvalidURL as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
    try:
        with closing(source), suppress(KeyboardInterrupt), Pause() as pause:
            found = pictures(source.look, interval, sleep=pause)
            if once:
                _print(_first(found), where, as_json)
            elif as_json or not sys.stdout.isatty():
                for each in found:
                    _print(each, where, as_json)
            else:
                _live(found, where)
    except Unanswered as unanswered:
        typer.echo(f"mlxd: {where}: {unanswered}", err=True)
        raise typer.Exit(1 if unanswered.for_good else os.EX_UNAVAILABLE) from None


def _first(found: Iterator[Frame | Unanswered]) -> Frame:
    each = next(found)
    if isinstance(each, Unanswered):
        raise each
    return each


def _print(each: Frame | Unanswered, url: str, as_json: bool) -> None:
    import dataclasses
    import json

    if isinstance(each, Unanswered):
        typer.echo(f"mlxd: {url}: {each}", err=True)
    elif as_json:
        typer.echo(json.dumps(dataclasses.asdict(each)))
    else:
        from rich.console import Console

        from service.cli.top_view import draw

        Console().print(draw(each, url))


def _live(found: Iterator[Frame | Unanswered], url: str) -> None:
    """On a screen of its own, which is gone afterwards."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from service.cli.top_view import draw

    picture = Group(Text(f"mlxd: {url}: the first look"))
    with Live(picture, console=Console(), screen=True, auto_refresh=False) as live:
        live.refresh()
        for each in found:
            if isinstance(each, Unanswered):
                shown = Group(Text(f"mlxd: {url}: {each}; asking again", "bold red"), picture)
            else:
                shown = picture = Group(draw(each, url))
            live.update(shown, refresh=True)
