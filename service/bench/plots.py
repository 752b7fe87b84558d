"""Pictures of result files side by side. The only module that imports matplotlib (extra `bench`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from service.bench.report import Report

Load = Mapping[str, Any]

LINEAR = 0.1
"""Milliseconds below which an axis is linear: pieces that came in one read have no time between them."""

MARKS = (2, 5)
"""Beside each power of ten."""


def draw(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write `latency.png`, `goodput.png` and `inter_token.png` into `folder`; one line a report. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"latency": _latency(reports), "goodput": _goodput(reports), "inter_token": _inter_token(reports)}
    paths = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120)
        paths.append(path)
    return paths


def _latency(reports: Sequence[Report]) -> Figure:
    """Time to first token and gaps against load, median and 99th percentile."""
    figure, (left, right) = _panels("time to first token", "between two pieces of text")
    for axes, key in ((left, "time_to_first_token"), (right, "inter_token")):
        for number, report in enumerate(reports):
            _line(axes, report, number, lambda load, key=key: _milli(load, key, "p50"), label=report.name)  # type: ignore[misc]
            _line(axes, report, number, lambda load, key=key: _milli(load, key, "p99"), dashes=True)  # type: ignore[misc]
        axes.set_ylabel("ms (dashed: 99th percentile)")
        axes.set_yscale("symlog", linthresh=LINEAR, subs=MARKS)
        _in_full(axes.yaxis)
    return _finished(figure, reports, left, right)


def _goodput(reports: Sequence[Report]) -> Figure:
    """Tokens a second, and requests a second that met the objective, against load."""
    figure, (left, right) = _panels("output tokens a second", "good requests a second")
    for number, report in enumerate(reports):
        _line(left, report, number, lambda load: load["tokens_per_second"], label=report.name)
        _line(right, report, number, lambda load: load["good_per_second"], label=report.name)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    return _finished(figure, reports, left, right)


def _inter_token(reports: Sequence[Report]) -> Figure:
    """The share of gaps that are shorter, at each report's heaviest load."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, report in enumerate(reports):
        load = max(report.loads, key=_amount)
        curve = load["inter_token_curve"]
        shares = [point / max(1, len(curve) - 1) for point in range(len(curve))]
        axes.plot([gap * 1e3 for gap in curve], shares, color=f"C{number}", label=f"{report.name}, {_name(load)}")
    axes.set_xscale("symlog", linthresh=LINEAR, subs=MARKS)
    _in_full(axes.xaxis)
    axes.set_xlabel("ms between two pieces of text")
    axes.set_ylabel("share of gaps that are shorter")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _panels(*titles: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title)
    return figure, (left, right)


def _line(
    axes: Axes,
    report: Report,
    number: int,
    value: Callable[[Load], float | None],
    *,
    label: str | None = None,
    dashes: bool = False,
) -> None:
    points = sorted((_amount(load), found) for load in report.loads if (found := value(load)) is not None)
    amounts, values = [at for at, _ in points], [found for _, found in points]
    axes.plot(amounts, values, "o--" if dashes else "o-", color=f"C{number}", label=label)


def _in_full(axis: Axis) -> None:
    """Numbers as people write them."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def _finished(figure: Figure, reports: Sequence[Report], *panels: Axes) -> Figure:
    streams = any(load["streams"] is not None for report in reports for load in report.loads)
    for axes in panels:
        axes.set_xlabel("streams" if streams else "requests a second that arrive")
        axes.grid(alpha=0.3)
    panels[0].legend()
    return figure


def _amount(load: Load) -> float:
    return float(load["streams"] or load["rate"] or 0)


def _name(load: Load) -> str:
    return f"{load['streams']} streams" if load["streams"] is not None else f"{load['rate']:g} a second"


def _milli(load: Load, key: str, of: str) -> float | None:
    return None if load[key] is None else float(load[key][of]) * 1e3
