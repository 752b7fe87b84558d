"""Expected against real waits with real generation: a tiny model, real steps, bursts by three principals."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from service.engine.engine import Engine
from service.engine.generation import Generation, GenerationRequest, SamplingParams
from service.settings import Settings
from tests.load.fairness import percentile, ready_engine
from tests.serving import BRIEF_CHUNK

pytestmark = pytest.mark.alone


async def answered(engine: Engine, rng: random.Random, delay: float) -> Generation:
    """One request after `delay` seconds, read to its end. The model ends some answers early."""
    await asyncio.sleep(delay)
    [generation] = engine.submit(
        [
            GenerationRequest(
                request_id="r",
                prompt=tuple(rng.randrange(3, 259) for _ in range(rng.choice([8, 60, 300]))),
                max_tokens=rng.choice([16, 64]),
                sampling=SamplingParams(seed=rng.randrange(1000)),
                principal=rng.choice("abc"),
            )
        ]
    )
    with generation:
        while not generation.finished:
            await generation.read()
    return generation


async def test_waits_of_real_steps_are_foreseen_within_a_factor_of_two_in_the_median(tiny_long_model_dir: Path) -> None:
    rng = random.Random(11)
    settings = Settings(
        model={"reference": str(tiny_long_model_dir)},
        engine={"max_rows": 4, "max_queue": 1000, "max_prefill_chunk": BRIEF_CHUNK, "memory_budget": 1 << 30},
    )
    async with ready_engine(settings) as engine:
        await asyncio.gather(*(answered(engine, rng, 0.0) for _ in range(20)))
        delays = [burst + rng.random() / 10 for burst in (0.0, 0.7, 1.4) for _ in range(40)]
        found = await asyncio.gather(*(answered(engine, rng, delay) for delay in delays))
    ratios, waits = [], []
    for meter in (generation.meter for generation in found):
        assert meter.expected_at is not None
        assert meter.first_token_at is not None
        waits.append(meter.first_token_at - meter.submitted_at)
        ratios.append((meter.expected_at - meter.submitted_at) / waits[-1])
    ratios.sort()
    p5, p50, p95 = (percentile(ratios, share) for share in (0.05, 0.5, 0.95))
    print(
        f"\nexpected / real of {len(ratios)} requests: p5 {p5:.2f}, median {p50:.2f}, p95 {p95:.2f}; waits up to "
        f"{max(waits):.2f} s"
    )
    assert 0.5 <= p50 <= 2
