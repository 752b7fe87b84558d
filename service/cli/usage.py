"""`mlxd usage`: who has used how much, from the database, beside a running service or without one.

Changes nothing. What a running service has not written yet, the last second, is missing. Exit codes as of `mlxd db`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.context import with_storage
from service.cli.output import AsJson, print_json

if TYPE_CHECKING:
    from rich.text import Text

    from service.limits.usage_report import UsageReport
    from service.storage.usage import UsageSum

WIDE = 100
"""Columns of a terminal from which all numbers are shown; a narrower one gets requests and total, and the bars."""

BESIDE_BARS = 75
NARROWEST_BAR, WIDEST_BAR = 17, 50
"""The narrowest is as wide as its heading."""


class SumBy(StrEnum):
    """What `--by` takes: a `service.storage.usage.By`."""

    DAY = "day"
    KEY = "key"
    TENANT = "tenant"
    MODEL = "model"


def usage(
    context: typer.Context,
    *,
    first: Annotated[
        str | None, typer.Option("--from", metavar="DAY", help="As 2030-01-31; 30 days if not given.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="DAY", help="The last day; today if not given.")] = None,
    by: Annotated[SumBy, typer.Option(help="What to sum by.")] = SumBy.DAY,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV for a spreadsheet.")] = False,
) -> None:
    """Print everybody's usage, with a bar chart. Days are of UTC, both included."""
    from service.limits.usage_report import Span, UsageReport
    from service.storage.database import Database
    from service.storage.usage import report

    if as_json and as_csv:
        raise typer.BadParameter("one of --json and --csv", param_hint="--csv")
    begins, ends = _day("--from", first), _day("--to", last)
    with with_storage(context) as settings:
        span = Span.of(begins, ends, time.time())
        with Database.open(settings.storage, settings.server.state_dir) as database:
            found = database.read(
                lambda connection: report(connection, since=span.since, until=span.until, by=by.value)
            ).result()
        made = UsageReport.of(span, by.value, found)
    if as_json:
        print_json(made.as_json())
    elif as_csv:
        typer.echo(made.as_csv(), nl=False)
    else:
        _draw(made)


def _day(option: str, text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("not a day, as 2030-01-31", param_hint=option) from None


def _draw(report: UsageReport) -> None:
    """A table with a bar for each sum, as long as its tokens are many."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    width = min(WIDEST_BAR, max(NARROWEST_BAR, console.width - BESIDE_BARS))
    shown = ("requests", "prompt", "cached", "output", "total") if console.width >= WIDE else ("requests", "total")
    blocks = "█▒" if console.encoding.startswith("utf") else "#-"
    table = Table(
        Column(report.by, overflow="fold", min_width=12),
        *(Column(name, justify="right", no_wrap=True) for name in shown),
        Column(f"{blocks[0]} prompt {blocks[1]} output", no_wrap=True, min_width=width),
        caption=f"{report.span.first} to {report.span.last} (UTC)",
    )
    most = max((each.total_tokens for each in report.sums), default=0)
    for each in report.sums:
        name = "-" if each.name is None else each.name
        table.add_row(Text(name), *_numbers(each, shown), _bar(each, most, width, blocks))  # Text: a name is no markup
    if len(report.sums) != 1:
        table.add_section()
        table.add_row("total", *_numbers(report.total, shown), "")
    console.print(table)


def _numbers(each: UsageSum, shown: Sequence[str]) -> list[str]:
    numbers = {
        "requests": each.requests,
        "prompt": each.prompt_tokens,
        "cached": each.cached_tokens,
        "output": each.completion_tokens,
        "total": each.total_tokens,
    }
    return [f"{numbers[name]:,}" for name in shown]


def _bar(each: UsageSum, most: int, width: int, blocks: str) -> Text:
    """Whatever was used can be seen, be it ever so little."""
    from rich.text import Text

    if not each.total_tokens:
        return Text()
    whole = max(1, round(width * each.total_tokens / most))
    prompt = round(whole * each.prompt_tokens / each.total_tokens)
    return Text.assemble((blocks[0] * prompt, "cyan"), (blocks[1] * (whole - prompt), "green"))
