"""The soak as a picture: a panel for each thing, over the requests, with its fitted line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from tests.load.slopes import Slope
from tests.load.svg import svg

LEFT, WIDTH, HEIGHT, STEP = 130, 560, 60, 92


class Sampled(Protocol):
    @property
    def requests(self) -> int: ...

    @property
    def values(self) -> Mapping[str, float]: ...


def drawing(samples: Sequence[Sampled], slopes: Mapping[str, Slope], counted_from: int) -> str:
    """An SVG; what was before `counted_from` requests is shaded and not in the fits."""
    parts = ['<text x="130" y="20">A soak of mixed traffic, 10 % of clients leaving; over thousands of requests</text>']
    last = samples[-1].requests
    for number, (name, fitted) in enumerate(slopes.items()):
        points = [(each.requests, each.values[name]) for each in samples]
        parts += _panel(name, points, fitted, top=48 + STEP * number, counted_from=counted_from)
    bottom = 48 + STEP * len(slopes)
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = f'x="{LEFT + WIDTH * share:.1f}" y="{bottom}"'
        parts.append(f'<text {at} font-size="11" text-anchor="middle">{last * share / 1000:.3g}</text>')
    return svg(LEFT + WIDTH + 30, bottom + 16, parts)


def _panel(
    name: str, samples: Sequence[tuple[int, float]], fitted: Slope, *, top: int, counted_from: int
) -> Iterator[str]:
    most, last = max(1e-9, *(value for _, value in samples)) * 1.1, max(1, samples[-1][0])

    def x(count: float) -> float:
        return LEFT + WIDTH * count / last

    def y(value: float) -> float:
        return top + HEIGHT * (1 - min(max(value, 0), most) / most)

    yield f'<rect x="{LEFT}" y="{top}" width="{x(counted_from) - LEFT:.1f}" height="{HEIGHT}" fill="#eee"/>'
    yield f'<rect x="{LEFT}" y="{top}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>'
    yield f'<text x="{LEFT - 8}" y="{top + 12}" text-anchor="end">{name}</text>'
    yield f'<text x="{LEFT - 8}" y="{top + 28}" font-size="10" text-anchor="end">0 to {most:.3g}</text>'
    points = " ".join(f"{x(count):.1f},{y(value):.1f}" for count, value in samples)
    yield f'<polyline points="{points}" fill="none" stroke="#2f6db0"/>'
    ends = [f"{x(count):.1f},{y(fitted.at(count)):.1f}" for count in (counted_from, last)]
    yield f'<polyline points="{" ".join(ends)}" fill="none" stroke="#b0402f" stroke-width="2"/>'
    told = f"{fitted.per_thousand:+.3g} in 1,000 requests; 95 % below {fitted.upper:+.3g}"
    yield f'<text x="{LEFT + WIDTH}" y="{top - 4}" font-size="10" text-anchor="end">{told}</text>'
