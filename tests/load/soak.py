"""The soak: a real service under mixed traffic with 10 % of clients leaving; does anything grow with the requests?

`python -m tests.load.soak` (`make soak-traffic`) runs it for half an hour, prints the table and writes
`docs/soak.json` and `docs/soak.svg`; `--seconds` and `--out` say otherwise. A small version of it is a test.

What is asked is a tiny random model, so that an hour holds many requests: what could leak is the service around it.
The first quarter, and what more it takes to fill the prefix cache, is not counted: pools and threads come to be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil

from service.cli.scrape import Scrape
from service.cli.top import Source
from service.settings import Settings
from tests.load.slopes import Slope, slope
from tests.load.soak_plot import drawing
from tests.load.traffic import Tally, clients
from tests.serving import AMPLE, Running, bearer, make_key, started
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).parent.parent.parent

WARM = 0.25
"""Share of the time that is not counted, at least. Of half an hour that is long enough for the slowest: the page cache
of the database, 2.7 MB, is full after 9,000 rows of usage."""

CLIENTS = 6

MODEL_BUDGET, BUFFER_CACHE = 64 << 20, 32 << 20
"""Bytes: small, so that the prefix cache (a quarter of the former) and mlx's pool of freed buffers (the latter; its
default of 512 MB takes hundreds of requests to fill) have their size before anything is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What 1,000 requests may add at most, by the slope's upper bound, and why not less.

    `coarse` holds for a run of less than a minute, in which noise is larger: it finds what leaks with every departure.
    `resting`: what may be left when everybody has gone; None where there is no such number.
    """

    unit: str = ""
    most: float
    coarse: float
    why: str
    resting: float | None = None


DEPARTURES = "a leak would be one for each departure: 75 in 1,000"

BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "memory": Bound(unit="MB", most=1.0, coarse=50.0, why="1 kB a request; the allocator breathes in megabytes"),
        "descriptors": Bound(most=0.5, coarse=15, why=DEPARTURES),
        "threads": Bound(most=0.1, coarse=5, why="none is made for a request"),
        "tasks": Bound(most=0.5, coarse=25, why=DEPARTURES),
        "rows held": Bound(most=0.5, coarse=15, why=DEPARTURES, resting=0),
        "reservations": Bound(most=0.5, coarse=15, why=DEPARTURES, resting=0),
        "prefix cache": Bound(unit="MB", most=0.5, coarse=50, why="it is full, and rows take from it and give back"),
        "freed buffers": Bound(unit="MB", most=0.5, coarse=50, why="mlx's pool is full, and stays so"),
    }
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look: seconds and requests since the beginning, and what there was of everything."""

    at: float
    requests: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Soak:
    """A run. `resting` is the look when everybody has gone; `counters` are the service's, for what must not happen."""

    samples: Sequence[Sample]
    resting: Mapping[str, float]
    outcomes: Mapping[str, int]
    unexpected: Sequence[str]
    counters: Mapping[str, float]

    @property
    def counted(self) -> Sequence[Sample]:
        """Without the warm phase."""
        full = 0.95 * max(each.values["prefix cache"] for each in self.samples)
        filled = next(each.at for each in self.samples if each.values["prefix cache"] >= full)
        return [each for each in self.samples if each.at >= max(filled, WARM * self.samples[-1].at)]

    def slopes(self) -> dict[str, Slope]:
        xs = [float(each.requests) for each in self.counted]
        return {name: slope(xs, [each.values[name] for each in self.counted]) for name in BOUNDS}

    def problems(self, *, coarse: bool = False) -> list[str]:
        """Everything that should not be; none is a run that is passed."""
        most = {name: bound.coarse if coarse else bound.most for name, bound in BOUNDS.items()}
        grown = [
            f"{name}: {each.upper:+.3g} {BOUNDS[name].unit} in 1,000 requests, at most {most[name]:g}"
            for name, each in self.slopes().items()
            if each.upper > most[name]
        ]
        left = [
            f"{name}: {self.resting[name]:g} at rest"
            for name, bound in BOUNDS.items()
            if bound.resting is not None and self.resting[name] > bound.resting
        ]
        counted = [f"{name}: {value:g}" for name, value in self.counters.items() if value]
        return [*grown, *left, *counted, *self.unexpected[:10]]


COUNTERS = (
    *("mlxd_internal_errors_total", "mlxd_usage_rows_lost_total", "mlxd_limits_reservations_swept_total"),
    *("mlxd_log_lines_dropped_total", "mlxd_storage_failures_total"),
)
"""Of the service: none of them is normal."""


class Watch:
    """Samples a running service. `look` blocks for a scrape."""

    def __init__(self, running: Running, key: str) -> None:
        self._process = psutil.Process(running.pid)
        self._source = Source(running.url, key)

    def look(self) -> tuple[Mapping[str, float], Scrape]:
        scrape = self._source.look()
        with self._process.oneshot():
            values = {
                "memory": self._process.memory_info().rss / 1e6,
                "descriptors": float(self._process.num_fds()),
                "threads": float(self._process.num_threads()),
            }
        of_metrics = (
            ("tasks", "mlxd_event_loop_tasks", 1.0),
            ("rows held", "mlxd_rows_held", 1.0),
            ("reservations", "mlxd_reservations_open", 1.0),
            ("prefix cache", "mlxd_prefix_cache_bytes", 1e-6),
            ("freed buffers", "mlxd_memory_buffer_cache_bytes", 1e-6),
        )
        for name, series, factor in of_metrics:
            value = scrape.value(series)
            assert value is not None, series
            values[name] = value * factor
        return values, scrape

    def close(self) -> None:
        self._source.close()


async def soak(running: Running, key: str, seconds: float) -> Soak:
    """Traffic for so many seconds, looked at once a second."""
    watch, tally, samples = Watch(running, key), Tally(), []
    began = time.monotonic()
    limits = httpx.Limits(max_connections=CLIENTS * 2, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=running.url, headers=bearer(key), timeout=60, limits=limits) as http:
        asking = [
            asyncio.create_task(client.run(lambda: time.monotonic() - began < seconds))
            for client in clients(http, tally, CLIENTS)
        ]
        while not all(task.done() for task in asking):
            values, _ = await asyncio.to_thread(watch.look)
            samples.append(Sample(time.monotonic() - began, tally.requests, values))
            await asyncio.wait(asking, timeout=1)
        await asyncio.gather(*asking)
    resting, scrape = await _at_rest(watch)
    counters = {name: scrape.value(name) or 0.0 for name in COUNTERS}
    watch.close()
    return Soak(samples, resting, dict(tally.outcomes), tally.unexpected, counters)


async def _at_rest(watch: Watch) -> tuple[Mapping[str, float], Scrape]:
    """The look when nothing runs any more; after 10 s the look that there is."""
    ends = time.monotonic() + 10
    while True:
        values, scrape = await asyncio.to_thread(watch.look)
        at_rest = all(values[name] <= bound.resting for name, bound in BOUNDS.items() if bound.resting is not None)
        if at_rest or time.monotonic() > ends:
            return values, scrape
        await asyncio.sleep(0.1)


def run(folder: Path, model: Path, seconds: float) -> Soak:
    """Start a service with its state in `folder`, soak it, stop it."""
    plans = json.dumps(AMPLE["limits.plans"])
    key = make_key(Settings.load(None, {"server.state_dir": folder}), "inference", "models", "metrics")
    outside = {
        "MLXD_MODEL__REFERENCE": str(model),
        "MLXD_AUTH__ENABLED": "true",
        "MLXD_LIMITS__PLANS": plans,
        "MLXD_LIMITS__FAILED_AUTHENTICATION_PER_MINUTE": "1000000",
        "MLXD_ENGINE__MAX_ROWS": "4",
        "MLXD_ENGINE__MAX_PREFILL_CHUNK": "2048",
        "MLXD_ENGINE__MEMORY_BUDGET": str(MODEL_BUDGET),
        "MLXD_ENGINE__BUFFER_CACHE_LIMIT": str(BUFFER_CACHE),
    }
    with started(folder, timed=True, **outside) as running:
        return asyncio.run(soak(running, key.text, seconds))


def table(found: Soak) -> str:
    """Markdown."""
    rows = ["| what | slope in 1,000 requests | upper bound (95 %) | may be | at the end |", "|" + " --- |" * 5]
    for name, each in found.slopes().items():
        unit = f" {BOUNDS[name].unit}".rstrip()
        rows.append(
            f"| {name} | {each.per_thousand:+.3f}{unit} | {each.upper:+.3f}{unit} | {BOUNDS[name].most:g}{unit} "
            f"| {found.resting[name]:.4g}{unit} |"
        )
    return "\n".join(rows)


def report(found: Soak) -> dict[str, Any]:
    """For `docs/soak.json`; samples thinned to 300."""
    step = math.ceil(len(found.samples) / 300)
    return {
        "machine": f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores",
        "seconds": round(found.samples[-1].at, 1),
        "requests": sum(found.outcomes.values()),
        "outcomes": found.outcomes,
        "slopes": {name: asdict(each) for name, each in found.slopes().items()},
        "resting": found.resting,
        "problems": found.problems(),
        "samples": [
            [round(each.at, 1), each.requests, *(round(each.values[name], 2) for name in BOUNDS)]
            for each in found.samples[::step]
        ],
    }


def main(arguments: Sequence[str]) -> int:
    """Run it in full and write what was found; 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_llama(Path(folder) / "tiny")
        found = run(Path(folder) / "state", model, given.seconds)
    (given.out / "soak.json").write_text(json.dumps(report(found), indent=1) + "\n", "utf-8")
    (given.out / "soak.svg").write_text(drawing(found.samples, found.slopes(), found.counted[0].requests), "utf-8")
    print(f"{sum(found.outcomes.values())} requests: {found.outcomes}\n\n{table(found)}")
    for problem in found.problems():
        print(f"PROBLEM: {problem}")
    return 1 if found.problems() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
