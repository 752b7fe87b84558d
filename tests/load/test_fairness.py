"""The experiment of docs/fairness.md, small: a tiny model, forty requests of a flood, eight polite ones."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from service.settings import Settings
from tests.load.fairness import Experiment, Load, drawing, percentile, ready_engine, table
from tests.serving import BRIEF_CHUNK

pytestmark = pytest.mark.alone

SMALL = Load(flood=40, flood_prompt=24, flood_output=48, polite=8, polite_prompt=24, polite_output=4, interval=0.1)


async def test_under_a_flood_the_polite_wait_far_less_than_first_come_first_served(tiny_long_model_dir: Path) -> None:
    settings = Settings(
        model={"reference": str(tiny_long_model_dir)},
        engine={"max_rows": 4, "max_prefill_chunk": BRIEF_CHUNK, "memory_budget": 1 << 30},
    )
    async with ready_engine(settings) as engine:
        found = await Experiment(engine, SMALL).run()
    print(f"\n{table(found)}")
    fair, first_come = percentile(found["fair"], 0.95), percentile(found["first-come"], 0.95)
    assert fair < first_come / 3
    assert percentile(found["fair"], 0.5) < percentile(found["first-come"], 0.5) / 3


def test_the_drawing_has_a_dot_for_every_request_inside_its_frame() -> None:
    found = {"no flood": [0.02, 0.03], "fair": [0.1, 0.2, 3.0], "first-come": [4.0, 90.0]}
    root = ET.fromstring(drawing(found))
    dots = [float(dot.attrib["cx"]) for dot in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(dots) == 7
    assert min(dots) >= 110
    assert max(dots) <= 610
