"""Several loads on one server, one after the other: warmed, measured, summed up. Belongs to the event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

from service.bench.client import Client, Outcome
from service.bench.load import Arrivals, Limit, Load
from service.bench.report import Setup
from service.bench.summary import Summary, summarise
from service.observability.process import cpu_seconds

EACH = 8
"""Conversations of each stream, and for each one a second of an open loop, where nothing says how many."""

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[Outcome], None]]]
"""Shows how far a load of so many requests (None: nobody knows) is; what it yields is told every outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Which loads, and when each ends. Before each, `warm_up` conversations a stream are had and not counted (of one
    stream before an open loop). `pid` is the server's process, whose CPU time is wanted."""

    arrivals: Sequence[Arrivals]
    conversations: int | None = None
    seconds: float | None = None
    warm_up: int = 1
    pid: int | None = None

    def limit(self, arrivals: Arrivals) -> Limit:
        """Of one load."""
        if self.conversations is None and self.seconds is None:
            return Limit(conversations=max(1, round(EACH * arrivals.amount)))
        return Limit(conversations=self.conversations, seconds=self.seconds)


async def measure(series: Series, setup: Setup, bar: Bar) -> list[Summary]:
    """Carry out the series. Raises BadTarget and NoSuchProcess."""
    target = setup.target
    with closing(Client(target)) as client:
        load = Load(client, setup.workload, api=target.api, model=target.model)
        return [await _one(load, arrivals, series, setup, bar) for arrivals in series.arrivals]


async def _one(load: Load, arrivals: Arrivals, series: Series, setup: Setup, bar: Bar) -> Summary:
    if series.warm_up:
        streams = arrivals.streams or 1
        await load.put(Arrivals(streams=streams), Limit(conversations=streams * series.warm_up))
    limit = series.limit(arrivals)
    requests = None if limit.conversations is None else limit.conversations * setup.workload.turns
    with bar(arrivals.label, requests) as tell:
        server, client = _cpu(series.pid), time.process_time()
        run = await load.put(arrivals, limit, tell)
        client = time.process_time() - client
        taken = None if server is None else (_cpu(series.pid) or 0.0) - server
    return summarise(run, setup.objective, client_cpu=client, server_cpu=taken)


def _cpu(pid: int | None) -> float | None:
    return None if pid is None else cpu_seconds(pid)
