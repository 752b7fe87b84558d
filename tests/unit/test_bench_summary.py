"""From outcomes to figures, to files and to pictures."""

from __future__ import annotations

import json
import random
import statistics
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.bench.ceiling import BACKEND, BATCH, Lap, standings
from service.bench.client import Outcome, Target
from service.bench.load import Arrivals, Run
from service.bench.plots import draw
from service.bench.report import SCHEMA, NotAReport, Setup, as_json, parse
from service.bench.summary import CURVE_POINTS, Objective, Spread, Summary, summarise
from service.bench.workload import Lengths, Mix, Workload


def outcome(first: float | None = 1.0, gaps: tuple[float, ...] = (0.5, 0.5), **more: Any) -> Outcome:
    """Due at 10, sent at 10. Without a first token there is nothing."""
    if first is None:
        return Outcome(**{"due": 10.0, "sent": 10.0, "ended": 11.0, "told": True, **more})
    values = {"due": 10.0, "sent": 10.0, "ended": 10 + first + sum(gaps), "output_tokens": len(gaps) + 1, "told": True}
    return Outcome(**{**values, "first": 10 + first, "gaps": array("d", gaps), **more})


def run(*outcomes: Outcome, seconds: float = 10.0, **arrivals: Any) -> Run:
    return Run(arrivals=Arrivals(**(arrivals or {"streams": 2})), began=0, ended=seconds, outcomes=list(outcomes))


@pytest.mark.parametrize("count", [2, 3, 10, 101, 5000])
def test_percentiles_are_those_of_numpy_and_of_the_standard_library(count: int) -> None:
    rng = random.Random(count)
    values = [rng.lognormvariate(0, 2) for _ in range(count)]
    spread = Spread.of(values)
    assert spread is not None
    assert [spread.p50, spread.p90, spread.p99] == pytest.approx(list(np.percentile(values, [50, 90, 99])))
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert [spread.p50, spread.p90, spread.p99] == pytest.approx([cuts[49], cuts[89], cuts[98]])
    assert (spread.count, spread.most) == (count, max(values))
    assert spread.mean == pytest.approx(statistics.fmean(values))


def test_a_spread_of_nothing_is_none_and_of_one_value_is_that_value() -> None:
    assert Spread.of([]) is None
    assert Spread.of([3.0]) == Spread(count=1, mean=3, p50=3, p90=3, p99=3, most=3)


def test_the_figures_of_a_load_are_sums_and_spreads_of_what_ended_well() -> None:
    found = summarise(
        run(
            outcome(1.0, (0.1, 0.3), prompt_tokens=7, cached_tokens=3),
            outcome(3.0, (0.5,), output_tokens=5, prompt_tokens=9),
            outcome(100.0, (99.0,), error="cut", prompt_tokens=1000),
            outcome(error="429 rate_limit_requests", first=None),
            outcome(error="429 rate_limit_requests", first=None),
        ),
        client_cpu=0.08,
        server_cpu=0.8,
    )
    assert (found.requests, found.failed) == (5, 3)
    assert found.errors == {"cut": 1, "429 rate_limit_requests": 2}
    assert (found.output_tokens, found.pieces, found.tokens_told) == (8, 5, True)
    assert (found.prompt_tokens, found.cached_tokens) == (16, 3)
    assert (found.tokens_per_second, found.requests_per_second) == (0.8, 0.2)
    assert found.time_to_first_token is not None
    assert (found.time_to_first_token.p50, found.time_to_first_token.most) == (2.0, 3.0)
    assert found.inter_token is not None
    assert (found.inter_token.count, found.inter_token.p50) == (3, 0.3)
    assert found.time_per_output_token is not None
    assert found.time_per_output_token.mean == pytest.approx((0.4 / 2 + 0.5 / 4) / 2)
    assert found.client_cpu_per_token == pytest.approx(0.01)
    assert found.server_cpu_per_token == pytest.approx(0.1)
    assert found.late is None


def test_a_load_in_which_all_failed_has_no_latencies() -> None:
    found = summarise(run(outcome(error="connect", first=None)), client_cpu=1.0)
    assert (found.time_to_first_token, found.inter_token, found.client_cpu_per_token) == (None, None, None)
    assert (found.tokens_per_second, found.inter_token_curve) == (0, [])


def test_an_open_loop_tells_how_late_the_client_was() -> None:
    found = summarise(run(outcome(sent=10.25), outcome(sent=9.9999), rate=3.0))
    assert found.late is not None
    assert (found.late.most, found.late.p50) == (0.25, 0.125)
    assert (found.streams, found.rate) == (None, 3.0)


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        (Objective(), True),
        (Objective(first_token=1.0, gap=0.5), True),
        (Objective(first_token=0.99), False),
        (Objective(gap=0.49), False),
    ],
)
def test_a_good_request_keeps_to_every_bound(objective: Objective, good: bool) -> None:
    assert objective.met(outcome(1.0, (0.5, 0.5))) is good
    assert not objective.met(outcome(1.0, (0.5, 0.5), error="cut"))


def test_one_long_gap_among_two_hundred_is_forgiven_and_five_are_not() -> None:
    objective = Objective(gap=0.1)
    assert objective.met(outcome(gaps=(0.01,) * 199 + (5.0,)))
    assert not objective.met(outcome(gaps=(0.01,) * 195 + (5.0,) * 5))


def test_a_request_without_a_token_has_no_first_one_in_time() -> None:
    silent = outcome(first=None)
    assert not Objective(first_token=60).met(silent)
    assert Objective(gap=60).met(silent)
    assert summarise(run(silent, outcome())).good_per_second == 0.2


def test_the_curve_of_gaps_is_the_inverse_of_their_distribution() -> None:
    gaps = tuple(number / 1000 for number in range(1, 1002))
    curve = summarise(run(outcome(gaps=gaps))).inter_token_curve
    assert len(curve) == CURVE_POINTS
    assert (curve[0], curve[100], curve[-1]) == (0.001, 0.501, 1.001)


# Files and pictures ------------------------------------------------------------------------------------------

SETUP = Setup(
    name="mine",
    target=Target(url="http://127.0.0.1:1", key="mlxd_secret"),
    workload=Workload(prompt=Lengths(2, 9), mix=Mix.MIXED, extra={"ignore_eos": True}),
    objective=Objective(first_token=1.0),
)


def loads(scale: float = 1.0) -> list[Summary]:
    return [
        summarise(run(*[outcome(scale * streams, (0.1 * scale, 0.2)) for _ in range(streams)], streams=streams))
        for streams in (1, 8, 32)
    ]


def test_a_file_of_results_says_what_was_asked_and_found_and_shows_no_key() -> None:
    text = json.dumps(as_json(SETUP, loads(), made_at="2026-01-01T00:00:00+00:00"))
    value = json.loads(text)
    assert "mlxd_secret" not in text
    assert value["schema"] == SCHEMA
    assert value["workload"] == {
        "prompt": "2:9", "unit": "words", "output_tokens": "128", "shared_prefix": 0, "turns": 1,
        "sampling": "mixed", "seed": 0, "extra": {"ignore_eos": True},
    }  # fmt: skip
    assert [load["streams"] for load in value["loads"]] == [1, 8, 32]
    assert value["loads"][1]["time_to_first_token"]["p50"] == 8
    report = parse(text)
    assert (report.name, len(report.loads)) == ("mine", 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "mlxd-bench/2"}', "null"])
def test_a_file_that_is_none_of_ours_is_refused(text: str) -> None:
    with pytest.raises(NotAReport):
        parse(text)


def test_pictures_are_drawn_of_several_servers_also_where_nothing_went_well(tmp_path: Path) -> None:
    failed = summarise(run(outcome(error="connect", first=None)))
    reports = [
        parse(json.dumps({**as_json(SETUP, found, made_at=""), "name": name}))
        for name, found in (("mine", loads()), ("theirs", loads(3.0)), ("down", [failed]))
    ]
    paths = draw(reports, tmp_path / "new")
    assert [path.name for path in paths] == ["latency.png", "goodput.png", "inter_token.png"]
    for path in paths:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG\r\n\x1a\n")
        assert min(struct.unpack(">II", head[16:24])) > 400


def test_a_standing_is_the_median_of_laps_beside_mlx_lms_own() -> None:
    def lap(contender: str, tokens: int, seconds: float) -> Lap:
        return Lap(contender=contender, streams=8, tokens=tokens, seconds=seconds, cpu=seconds / 2)

    laps = [lap(BATCH, 100, s) for s in (1.0, 2.0, 50.0)] + [lap(BACKEND, 100, s) for s in (1.0, 2.5, 9.0)]
    raw, ours = standings(laps)
    assert (raw.tokens_per_second, raw.ratio, raw.tokens, raw.laps) == (50, 1, 300, 3)
    assert (ours.tokens_per_second, ours.ratio) == (40, 0.8)
    assert ours.cpu_per_token == pytest.approx(0.0125)
