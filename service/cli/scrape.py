"""What `/metrics` says, and what has happened between two looks at it: PromQL's `rate`, `increase` and quantiles.

Pure values. A series that is not there, because the service is older or has not counted yet, is None throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from prometheus_client.parser import text_string_to_metric_families

STARTED = "process_start_time_seconds"

Labels = Mapping[str, str]
Values = Mapping[tuple[tuple[str, str], ...], float]


class NotMetrics(ValueError):
    """A text that is no exposition of ours."""


def every(_: Labels) -> bool:
    """Whatever the labels are."""
    return True


@dataclass(frozen=True, slots=True)
class Scrape:
    """The samples of one look, by name and by labels; `at` is monotonic seconds."""

    at: float
    samples: Mapping[str, Values]

    @classmethod
    def parse(cls, text: str, at: float) -> Scrape:
        """Raises NotMetrics."""
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = float(sample.value)
        except (ValueError, KeyError, IndexError) as error:
            raise NotMetrics("is not in Prometheus' text format") from error
        if not any(name.startswith("mlxd_") for name in found):
            raise NotMetrics("has no series of mlxd")
        return cls(at, MappingProxyType(found))

    def each(self, name: str) -> Iterator[tuple[Labels, float]]:
        """Every sample of a series."""
        for labels, value in self.samples.get(name, {}).items():
            yield dict(labels), value

    def value(self, name: str) -> float | None:
        """The sum over all labels; None where there is none, or it is not a number."""
        values = [value for _, value in self.each(name)]
        total = sum(values)
        return total if values and math.isfinite(total) else None

    def label(self, name: str, label: str) -> str | None:
        """The label of the sample that is 1, as of `mlxd_engine_state`."""
        return next((labels.get(label) for labels, value in self.each(name) if value == 1), None)


@dataclass(frozen=True, slots=True)
class Between:
    """Two looks at one service, `first` before `last`."""

    first: Scrape
    last: Scrape

    @property
    def seconds(self) -> float:
        return self.last.at - self.first.at

    @property
    def restarted(self) -> bool:
        """Whether another process answered the second time."""
        first, last = self.first.value(STARTED), self.last.value(STARTED)
        return first is not None and last is not None and abs(last - first) >= 1

    def increases(self, name: str) -> Iterator[tuple[Labels, float]]:
        """By how much each sample has grown. What has been reset, or is new, has grown from 0."""
        before = {} if self.restarted else self.first.samples.get(name, {})
        for labels, value in self.last.samples.get(name, {}).items():
            former = before.get(labels, 0.0)
            yield dict(labels), value - former if value >= former else value

    def increase(self, name: str, wanted: Callable[[Labels], bool] = every) -> float | None:
        """By how much the `wanted` samples have grown together; None where the series is not there."""
        if name not in self.last.samples:
            return None
        return sum(growth for labels, growth in self.increases(name) if wanted(labels))

    def rate(self, name: str) -> float | None:
        """The same, a second."""
        growth = self.increase(name)
        return None if growth is None or self.seconds <= 0 else growth / self.seconds

    def by(self, name: str, *labels: str, wanted: Callable[[Labels], bool] = every) -> dict[tuple[str, ...], float]:
        """What has grown, by the values of `labels`; what has not is left out."""
        found: dict[tuple[str, ...], float] = {}
        for sample, growth in self.increases(name):
            if growth > 0 and wanted(sample):
                key = tuple(sample.get(label, "") for label in labels)
                found[key] = found.get(key, 0.0) + growth
        return found

    def quantile(self, name: str, share: float) -> float | None:
        """`histogram_quantile(share, increase(name))` over all labels; None where nothing was observed.

        As there, the values of a bucket are taken to lie evenly in it, and what is beyond the last bound is told as
        that bound.
        """
        buckets = sorted((float(bound), growth) for (bound,), growth in self._buckets(name).items())
        if not buckets or buckets[-1][1] <= 0:
            return None
        rank = share * buckets[-1][1]
        lower, below = 0.0, 0.0
        for bound, growth in buckets:
            if growth >= rank and math.isfinite(bound):
                inside = growth - below
                return bound if inside <= 0 else lower + (bound - lower) * (rank - below) / inside
            if math.isfinite(bound):
                lower, below = bound, max(below, growth)
        return lower

    def _buckets(self, name: str) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], float] = {}
        for sample, growth in self.increases(f"{name}_bucket"):
            key = (sample["le"],)
            found[key] = found.get(key, 0.0) + growth
        return found
