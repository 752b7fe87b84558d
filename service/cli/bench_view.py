"""How `mlxd bench` shows itself: a bar while it runs, tables at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.bench.ceiling import Standing
    from service.bench.client import Outcome
    from service.bench.summary import Spread, Summary

REFRESH = 4
"""Pictures a second: drawing takes time from a client that measures."""


@contextmanager
def bar(label: str, total: int | None) -> Iterator[Callable[[Outcome], None]]:
    """A bar on standard error, a step for every request, while the block runs; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, refresh_per_second=REFRESH, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(label, total=total)
        failed = 0

        def tell(outcome: Outcome) -> None:
            nonlocal failed
            failed += outcome.error is not None
            progress.advance(task)
            if outcome.error is not None:
                progress.update(task, description=f"{label}, {failed} failed")

        yield tell


def label(load: Summary) -> str:
    """What a load is called."""
    return f"{load.streams} streams" if load.streams is not None else f"{load.rate:g} a second"


def loads_table(loads: Sequence[Summary]) -> Table:
    """A column for each load."""
    table = Table("", *(label(load) for load in loads))
    lines: list[tuple[str, Callable[[Summary], str]]] = [
        ("output tokens a second", lambda load: f"{load.tokens_per_second:,.1f}"),
        ("requests a second", lambda load: f"{load.requests_per_second:.2f}"),
        ("good requests a second", lambda load: f"{load.good_per_second:.2f}"),
        ("requests, failed", lambda load: f"{load.requests}, {load.failed}"),
        ("output tokens", lambda load: f"{load.output_tokens:,}{'' if load.tokens_told else ' (pieces)'}"),
        ("prompt tokens, cached", lambda load: f"{load.prompt_tokens:,}, {load.cached_tokens:,}"),
        ("to first token, ms", lambda load: _milli(load.time_to_first_token)),
        ("between pieces, ms", lambda load: _milli(load.inter_token)),
        ("per output token, ms", lambda load: _milli(load.time_per_output_token)),
        ("end to end, ms", lambda load: _milli(load.end_to_end)),
        ("client CPU a token, us", lambda load: _micro(load.client_cpu_per_token)),
        ("server CPU a token, us", lambda load: _micro(load.server_cpu_per_token)),
    ]
    for name, text in lines:
        table.add_row(name, *(text(load) for load in loads))
    table.caption = "ms: p50 / p90 / p99"
    return table


def errors_of(loads: Sequence[Summary]) -> Iterator[str]:
    """A line for each kind of failure of each load."""
    for load in loads:
        for error, count in sorted(load.errors.items()):
            yield f"{label(load)}: {count} x {error}"


def standings_table(standings: Sequence[Standing]) -> Table:
    """A row for each contender at each number of streams."""
    table = Table("streams", "engine", "tokens a second", "of mlx-lm's batch", "CPU a token, us", "tokens")
    for each in standings:
        table.add_row(
            str(each.streams),
            each.contender,
            f"{each.tokens_per_second:,.1f}",
            f"{each.ratio:.3f}",
            f"{each.cpu_per_token * 1e6:,.1f}",
            f"{each.tokens:,}",
        )
    return table


def _milli(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{value * 1e3:,.1f}" for value in (spread.p50, spread.p90, spread.p99))


def _micro(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"
