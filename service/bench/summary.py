"""From the outcomes of one load to its figures. Pure; `docs/performance.md` says what each means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from service.bench.client import Outcome
from service.bench.load import Run

CURVE_POINTS = 201


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How values lie, linearly between neighbours as numpy has it; in the unit of the values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread | None:
        """None of no values."""
        if not len(values):
            return None
        found = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = (float(each) for each in np.percentile(found, (50, 90, 99)))
        return cls(count=len(found), mean=float(found.mean()), p50=p50, p90=p90, p99=p99, most=float(found.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a good request keeps to, in seconds: its first token within `first_token`, and 99 of 100 of its gaps within
    `gap`. None: not asked for."""

    first_token: float | None = None
    gap: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Whether the request ended well, and in time."""
        first = outcome.time_to_first_token
        if outcome.error is not None:
            return False
        if self.first_token is not None and (first is None or first > self.first_token):
            return False
        return self.gap is None or not outcome.gaps or float(np.percentile(outcome.gaps, 99)) <= self.gap


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The figures of one load. Seconds, tokens, and both together; what is None was not to be had.

    Latencies and tokens are those of requests that ended well.
    """

    streams: int | None
    rate: float | None
    seconds: float
    """From the first request to the last byte."""
    requests: int
    failed: int
    errors: dict[str, int]
    output_tokens: int
    tokens_told: bool
    """Whether the server told all of them; else some are counted as pieces of text."""
    pieces: int
    """Pieces of text in which they came."""
    prompt_tokens: int
    cached_tokens: int
    tokens_per_second: float
    requests_per_second: float
    good_per_second: float
    """Requests that met the objective."""
    time_to_first_token: Spread | None
    inter_token: Spread | None
    time_per_output_token: Spread | None
    end_to_end: Spread | None
    late: Spread | None
    """By how much requests of an open loop were sent later than due: the client's own fault."""
    client_cpu_per_token: float | None
    server_cpu_per_token: float | None
    inter_token_curve: list[float]
    """Gaps at evenly spaced shares from none to all of them: the inverse of their cumulative distribution."""


def summarise(
    run: Run,
    objective: Objective = Objective(),
    *,
    client_cpu: float | None = None,
    server_cpu: float | None = None,
) -> Summary:
    """The figures of `run`, for which client and server took so many seconds of CPU."""
    ended = [outcome for outcome in run.outcomes if outcome.error is None]
    seconds = run.ended - run.began
    gaps = _together(outcome.gaps for outcome in ended)
    tokens = sum(outcome.output_tokens for outcome in ended)

    def a_second(count: int) -> float:
        return count / seconds if seconds > 0 else 0.0

    return Summary(
        streams=run.arrivals.streams,
        rate=run.arrivals.rate,
        seconds=seconds,
        requests=len(run.outcomes),
        failed=len(run.outcomes) - len(ended),
        errors=dict(Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
        output_tokens=tokens,
        tokens_told=all(outcome.told for outcome in ended),
        pieces=len(gaps) + sum(outcome.first is not None for outcome in ended),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in ended),
        cached_tokens=sum(outcome.cached_tokens for outcome in ended),
        tokens_per_second=a_second(tokens),
        requests_per_second=a_second(len(ended)),
        good_per_second=a_second(sum(map(objective.met, ended))),
        time_to_first_token=Spread.of([first for each in ended if (first := each.time_to_first_token) is not None]),
        inter_token=Spread.of(gaps),
        time_per_output_token=Spread.of([t for each in ended if (t := each.time_per_output_token) is not None]),
        end_to_end=Spread.of([outcome.end_to_end for outcome in ended]),
        late=None if run.arrivals.rate is None else Spread.of([max(0.0, each.sent - each.due) for each in ended]),
        client_cpu_per_token=client_cpu / tokens if client_cpu is not None and tokens else None,
        server_cpu_per_token=server_cpu / tokens if server_cpu is not None and tokens else None,
        inter_token_curve=_curve(gaps),
    )


def _together(parts: Iterable[Sequence[float]]) -> np.ndarray:
    found = [np.asarray(part, dtype=np.float64) for part in parts]
    return np.concatenate(found) if found else np.empty(0)


def _curve(values: np.ndarray) -> list[float]:
    if not len(values):
        return []
    return [float(f"{each:.4g}") for each in np.quantile(values, np.linspace(0, 1, CURVE_POINTS))]
