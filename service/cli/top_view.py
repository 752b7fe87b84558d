"""How `mlxd top` looks: a frame drawn for a terminal. Where nothing is known there is a dash."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from service.cli.top_frame import Consumer, Frame

UNKNOWN = "-"
MINUTE, HOUR, DAY = 60, 3600, 86_400
KIBI = 1024
BUSY, FULL = 0.7, 0.9
"""Shares from which a number is yellow, and red."""


def draw(frame: Frame, url: str) -> RenderableType:
    """The whole picture."""
    left = Group(_panel("tokens a second", _tokens(frame)), _panel("rows", _rows(frame)))
    first = _panel(f"first token, {frame.window_seconds:.0f} s", _first_token(frame))
    middle = Group(first, _panel("next token", _pairs([("p95", _seconds(frame.latency.inter_token_p95))])))
    right = _panel("memory", _memory(frame))
    upper = Table.grid(expand=True)
    for share in (4, 4, 7):
        upper.add_column(ratio=share)
    upper.add_row(left, middle, right)
    return Group(_title(frame, url), upper, _traffic(frame), _consumers(frame.consumers, frame.window_seconds))


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=title, title_align="left", box=box.ROUNDED, padding=(0, 1))


def _title(frame: Frame, url: str) -> RenderableType:
    service = frame.service
    state = service.state or UNKNOWN
    grid = Table.grid(Column(ratio=1), Column(justify="right"), expand=True)
    grid.add_row(
        Text.assemble(
            ("mlxd ", "bold"),
            service.version or "",
            "  ",
            (service.model or UNKNOWN, "bold cyan"),
            f" ({service.device})" if service.device else "",
        ),
        Text.assemble(
            (state, "green" if state == "ready" else "bold red"),
            f"  up {_duration(service.uptime_seconds)}",
            ("  restarted", "bold yellow") if service.restarted else "",
        ),
    )
    grid.add_row("", Text(url, "dim"))
    return grid


def _pairs(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(Column(style="dim"), Column(justify="right"), padding=(0, 2), expand=True)
    for row in rows:
        table.add_row(*row)
    return table


def _tokens(frame: Frame) -> Table:
    return _pairs(
        [
            ("generated", Text(_number(frame.load.generation_tokens_per_second), "bold green")),
            ("of prompts", _number(frame.load.prompt_tokens_per_second)),
        ]
    )


def _rows(frame: Frame) -> Table:
    load = frame.load
    return _pairs(
        [
            ("running", _share(load.running, load.max_running, _number)),
            ("waiting", _share(load.waiting, load.max_waiting, _number)),
        ]
    )


def _first_token(frame: Frame) -> Table:
    latency = frame.latency
    return _pairs(
        [
            ("p50", _seconds(latency.first_token_p50)),
            ("p95", _seconds(latency.first_token_p95)),
            ("p99", _seconds(latency.first_token_p99)),
        ]
    )


def _memory(frame: Frame) -> Table:
    memory = frame.memory
    return _pairs(
        [
            ("arrays", _share(memory.active, memory.recommended, _bytes)),
            ("their peak", _bytes(memory.peak)),
            ("reserved", _share(memory.reserved, memory.budget, _bytes)),
            ("prefix cache", _share(memory.prefix_cache, memory.prefix_capacity, _bytes)),
            ("its hits", UNKNOWN if memory.prefix_hit_rate is None else f"{memory.prefix_hit_rate:.0%}"),
            ("process", _bytes(memory.resident)),
        ]
    )


def _traffic(frame: Frame) -> RenderableType:
    answers = "  ".join(f"{status} {rate:.1f}/s" for status, rate in frame.requests.items()) or "none"
    refused = "  ".join(f"{reason} {count:.0f}" for reason, count in frame.refusals.items()) or "none"
    table = Table.grid(Column(style="dim", no_wrap=True), Column(ratio=1), padding=(0, 2), expand=True)
    table.add_row("requests", Text(answers))
    table.add_row("refused", Text(refused, "yellow" if frame.refusals else ""))
    return _panel(f"requests, {frame.window_seconds:.0f} s", table)


def _consumers(consumers: Sequence[Consumer], window: float) -> Table:
    table = Table(
        Column("tenant", ratio=2, no_wrap=True, overflow="ellipsis"),
        Column("key", ratio=1, no_wrap=True, overflow="ellipsis"),
        *(Column(name, justify="right", no_wrap=True) for name in ("prompt", "cached", "completion", "since start")),
        box=box.SIMPLE_HEAD,
        expand=True,
        title=f"tokens by consumer, {window:.0f} s",
        title_justify="left",
        title_style="",
    )
    for one in consumers:
        numbers = (one.prompt_tokens, one.cached_tokens, one.completion_tokens, one.total_tokens)
        # Text: what is stored is no markup
        table.add_row(Text(one.tenant), Text(one.key_id or UNKNOWN), *(f"{number:,.0f}" for number in numbers))
    if not consumers:
        table.add_row(UNKNOWN)
    return table


def _share(value: float | None, most: float | None, spell: Callable[[float | None], str]) -> Text:
    """A number, of how many where that is known, in the colour of how full that is."""
    if value is None or not most:
        return Text(spell(value))
    share = value / most
    return Text(f"{spell(value)}/{spell(most)}", "red" if share >= FULL else "yellow" if share >= BUSY else "green")


def _number(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:,.1f}"  # noqa: PLR2004 - three digits


def _bytes(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < KIBI:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"  # noqa: PLR2004
        value /= KIBI
    return f"{value:.1f} TiB"


def _seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _duration(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    whole = int(value)
    clock = f"{whole % DAY // HOUR:02}:{whole % HOUR // MINUTE:02}:{whole % MINUTE:02}"
    return f"{whole // DAY} d {clock}" if whole >= DAY else clock
