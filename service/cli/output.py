"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def print_json(value: object) -> None:
    """Print `value`, indented."""
    typer.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under their columns; what is too long for the terminal goes on below."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(name, no_wrap=name == "kid") for name in columns))  # a kid is there to be copied
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))  # Text: what is stored is no markup
    Console().print(table)


def when(at: float) -> str:
    """Seconds since the epoch as people write them, in UTC."""
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(sep=" ", timespec="seconds")
    except (OverflowError, ValueError, OSError):  # not as we wrote it
        return str(at)
