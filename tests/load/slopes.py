"""By how much something grows with the number of requests, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = 20
"""Samples a second apart know of each other (a batch, a garbage collection, a full cache), so that each of them would
promise too much. They are averaged in this many blocks, which are taken to be independent."""

FEWEST = 6


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth in 1,000 requests: the best estimate, and the bounds that 95 % of repetitions would be below and above."""

    per_thousand: float
    upper: float
    lower: float
    start: float
    """The fitted value at 0 requests."""

    def at(self, requests: float) -> float:
        return self.start + self.per_thousand * requests / 1000


def slope(requests: Sequence[float], values: Sequence[float]) -> Slope:
    """Least squares through the means of blocks. Raises ValueError for samples that are too few."""
    xs, ys = _blocks(requests), _blocks(values)
    if len(xs) < FEWEST or xs[0] == xs[-1]:
        raise ValueError(f"{len(xs)} blocks of samples are too few")
    fit = statistics.linear_regression(xs, ys)
    freedom = len(xs) - 2
    centre = statistics.fmean(xs)
    left = sum((y - fit.intercept - fit.slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(left / freedom / sum((x - centre) ** 2 for x in xs))
    margin = _t95(freedom) * error
    return Slope(fit.slope * 1000, (fit.slope + margin) * 1000, (fit.slope - margin) * 1000, fit.intercept)


def _blocks(values: Sequence[float]) -> list[float]:
    length = max(1, math.ceil(len(values) / BLOCKS))
    return [statistics.fmean(values[at : at + length]) for at in range(0, len(values), length)]


def _t95(freedom: int) -> float:
    """Student's t, one-sided 95 %: the first terms of its expansion, within 0.01 from 5 degrees of freedom on."""
    z = statistics.NormalDist().inv_cdf(0.95)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
