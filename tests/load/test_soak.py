"""The soak, for 35 seconds in `make test`, for half an hour in `make soak`; and that it would find what grows."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.load.slopes import slope
from tests.load.soak import BOUNDS, Sample, Soak, report, run, table
from tests.load.soak_plot import drawing


@pytest.mark.timeout(2400)
def test_nothing_grows_with_the_requests(
    tiny_long_model_dir: Path, tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    seconds = count("soak: seconds of mixed traffic", 35, 1800)
    found = run(tmp_path, tiny_long_model_dir, seconds)
    print(f"\n{sum(found.outcomes.values())} requests: {found.outcomes}\n\n{table(found)}")
    assert set(found.outcomes) == {"served", "left", "wrong", "stranger", "look"}
    assert found.problems(coarse=seconds < 600) == []


def made(growth: dict[str, float] | None = None, seed: int = 3) -> Soak:
    """A run of 600 s with 6,000 requests; `growth` is in a request."""
    rng = random.Random(seed)
    samples = [
        Sample(
            float(at),
            at * 10,
            {name: 100 + (growth or {}).get(name, 0) * at * 10 + rng.gauss(0, 0.5) for name in BOUNDS},
        )
        for at in range(600)
    ]
    return Soak(samples, dict.fromkeys(BOUNDS, 0.0), {"served": 6000}, [], {"mlxd_internal_errors_total": 0.0})


def test_noise_is_no_growth() -> None:
    assert made().problems() == []


@pytest.mark.parametrize("name", BOUNDS)
def test_what_grows_with_the_requests_is_found(name: str) -> None:
    [problem] = made({name: 1.5 * BOUNDS[name].most / 1000}).problems()
    assert problem.startswith(f"{name}: +")
    [problem] = made({name: 1.5 * BOUNDS[name].coarse / 1000}).problems(coarse=True)
    assert problem.startswith(f"{name}: +")


def test_what_is_left_at_rest_and_what_must_not_happen_are_found() -> None:
    well = made()
    left = replace(well, resting={**well.resting, "rows held": 1.0})
    assert left.problems() == ["rows held: 1 at rest"]
    assert replace(well, counters={"mlxd_internal_errors_total": 2.0}).problems() == ["mlxd_internal_errors_total: 2"]
    assert replace(well, unexpected=["served: /generate: 500"]).problems() == ["served: /generate: 500"]


def test_the_phase_in_which_the_prefix_cache_fills_is_not_counted() -> None:
    well = made()
    filling = [replace(each, values={**each.values, "prefix cache": min(100.0, each.at / 3)}) for each in well.samples]
    counted = replace(well, samples=filling).counted
    assert 280 <= counted[0].at <= 290
    assert replace(well, samples=filling).problems() == []


def test_a_slope_is_the_one_that_was_put_in_and_its_bound_holds_as_often_as_it_says() -> None:
    xs = [float(10 * at) for at in range(400)]
    held = 0
    for seed in range(200):
        rng = random.Random(seed)
        found = slope(xs, [5 + 0.002 * x + rng.gauss(0, 1) for x in xs])
        assert found.lower < found.per_thousand < found.upper
        held += found.upper >= 2.0
    assert 180 <= held <= 200, "95 % of 200"
    exact = slope(xs, [5 + 0.002 * x for x in xs])
    assert math.isclose(exact.per_thousand, 2.0)
    assert math.isclose(exact.at(1000), 7.0)


def test_too_few_samples_are_no_slope() -> None:
    with pytest.raises(ValueError, match="too few"):
        slope([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="too few"):
        slope([1.0] * 50, [2.0] * 50)


def test_the_drawing_has_a_panel_for_each_thing_inside_its_frame() -> None:
    found = made()
    root = ET.fromstring(drawing(found.samples, found.slopes(), found.counted[0].requests))
    lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 2 * len(BOUNDS)
    points = [tuple(map(float, pair.split(","))) for line in lines for pair in line.attrib["points"].split()]
    assert all(130 <= x <= 690 and 0 <= y <= float(root.attrib["height"]) for x, y in points)


def test_the_report_is_json_and_thinned() -> None:
    told = json.loads(json.dumps(report(made())))
    assert told["requests"] == 6000
    assert len(told["samples"]) == 300
    assert told["problems"] == []
