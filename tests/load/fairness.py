"""One principal floods, another asks now and then: how long does the polite one wait for its first token?

Three runs in one process, on one engine with real generation: no flood, the flood under fair admission, and the same
flood under plain first-come. `python -m tests.load.fairness` (`make fairness`) runs it on the demo model, prints the
table and draws `docs/fairness.svg`; a small version of it is a test.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.engine.admission import Admission
from service.engine.engine import Engine, EngineState
from service.engine.generation import Generation, GenerationRequest, SamplingParams
from service.engine.mlx_backend import MlxBackend
from service.engine.telemetry import Telemetry
from service.observability.metrics import Metrics
from service.settings import Settings
from tests.load.svg import svg

ROOT = Path(__file__).parent.parent.parent
COLOURS = {"no flood": "#4c8a4c", "fair": "#2f6db0", "first-come": "#b0402f"}


class FirstCome(Admission):
    """Who came first is next, whoever it is."""

    def _turn(self, principal: str) -> tuple[float, int]:
        return self._queues[principal][0].uid, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The flooding principal always has `flood` requests before the engine; the polite one asks every `interval`
    seconds, `polite` times. Prompts and outputs are in tokens."""

    flood: int = 200
    flood_prompt: int = 16
    flood_output: int = 16
    polite: int = 12
    polite_prompt: int = 16
    polite_output: int = 4
    interval: float = 5.0


class Experiment:
    """Runs a load on an engine that is ready. Belongs to the event loop."""

    def __init__(self, engine: Engine, load: Load, *, seed: int = 4) -> None:
        self._engine = engine
        self._load = load
        self._rng = random.Random(seed)
        self._flooding = False
        self._flowing = asyncio.Event()
        """Set when one of the flood's requests has ended: then the batch is full."""
        self._log = structlog.get_logger("fairness")

    async def run(self) -> dict[str, list[float]]:
        """Seconds to first token of each polite request, sorted, by the name of the run."""
        found = {"no flood": await self._polite("no flood")}
        for name, kind in (("fair", Admission), ("first-come", FirstCome)):
            self._admit_by(kind)
            found[name] = await self._flooded(name)
        self._admit_by(Admission)
        return found

    def _admit_by(self, kind: type[Admission]) -> None:
        worker = self._engine._worker
        assert worker is not None
        assert worker.idle()
        worker._admission.__class__ = kind  # the same books, another order

    async def _flooded(self, name: str) -> list[float]:
        self._flooding = True
        self._flowing.clear()
        flood = [asyncio.create_task(self._flood()) for _ in range(self._load.flood)]
        await self._flowing.wait()
        try:
            return await self._polite(name)
        finally:
            self._flooding = False
            for task in flood:
                task.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            while self._engine._live or not (self._engine._worker and self._engine._worker.idle()):
                await asyncio.sleep(0.01)

    async def _flood(self) -> None:
        """One of the flood's requests, again and again."""
        while self._flooding:
            with self._submit("flood", self._load.flood_prompt, self._load.flood_output) as generation:
                while not generation.finished:
                    await generation.read()
            self._flowing.set()

    async def _polite(self, name: str) -> list[float]:
        async def late(number: int) -> float:
            await asyncio.sleep(number * self._load.interval)
            seconds = await self._ask()
            status = self._engine.status()
            self._log.info("first_token", run=name, seconds=seconds, waiting=status.waiting, running=status.running)
            return seconds

        return sorted(await asyncio.gather(*(late(number) for number in range(self._load.polite))))

    async def _ask(self) -> float:
        began = time.perf_counter()
        with self._submit("polite", self._load.polite_prompt, self._load.polite_output) as generation:
            await generation.read()
            first = time.perf_counter() - began
            while not generation.finished:
                await generation.read()
        assert generation.last is not None
        assert generation.last.error is None
        return first

    def _submit(self, principal: str, prompt: int, output: int) -> Generation:
        """Random words that the prefix cache cannot know, continued to the full length: no word ends it."""
        info = self._engine.ready_info()
        [generation] = self._engine.submit(
            [
                GenerationRequest(
                    request_id=principal,
                    prompt=tuple(self._rng.randrange(3, info.vocab_size) for _ in range(prompt)),
                    max_tokens=output,
                    sampling=SamplingParams(
                        temperature=0, logit_bias=tuple((token, -100.0) for token in sorted(info.eos_token_ids))
                    ),
                    principal=principal,
                    tenant=principal,
                )
            ]
        )
        return generation


@asynccontextmanager
async def ready_engine(settings: Settings) -> AsyncIterator[Engine]:
    """An engine with its model loaded and warmed."""
    engine = Engine(MlxBackend(settings), settings.engine, telemetry=Telemetry(Metrics()))
    await engine.start()
    assert await engine.wait(EngineState.READY, EngineState.FAILED) is EngineState.READY, engine.status().detail
    try:
        yield engine
    finally:
        await engine.stop()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of these sorted values that at least this share does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def table(found: Mapping[str, Sequence[float]]) -> str:
    """Markdown; seconds to first token of the polite principal."""
    head = "| run | requests | p50 | p95 | longest |\n| --- | --- | --- | --- | --- |"
    rows = [
        f"| {name} | {len(values)} | {percentile(values, 0.5):.2f} s | {percentile(values, 0.95):.2f} s | "
        f"{values[-1]:.2f} s |"
        for name, values in found.items()
    ]
    return "\n".join([head, *rows])


def drawing(found: Mapping[str, Sequence[float]]) -> str:
    """An SVG: a line for each run, a dot for each request, on a logarithmic axis of seconds."""
    lowest = math.floor(math.log10(min(values[0] for values in found.values())))
    highest = math.ceil(math.log10(max(values[-1] for values in found.values())))

    def x(seconds: float) -> float:
        return 120 + 490 * (math.log10(seconds) - lowest) / (highest - lowest)

    bottom = 40 + 60 * len(found)
    parts = ['<text x="120" y="20">Seconds to first token of the polite principal</text>']
    for power in range(lowest, highest + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" y1="34" x2="{at:.1f}" y2="{bottom}" stroke="#ccc"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**power:g} s</text>')
    for number, (name, values) in enumerate(found.items()):
        y, colour = 70 + 60 * number, COLOURS[name]
        parts.append(f'<text x="100" y="{y + 4}" text-anchor="end">{name}</text>')
        parts.extend(f'<circle cx="{x(v):.1f}" cy="{y}" r="4" fill="{colour}" fill-opacity="0.35"/>' for v in values)
        for label, share, below in (("p50", 0.5, -15), ("p95", 0.95, 23)):
            at = x(percentile(values, share))
            parts.append(f'<line x1="{at:.1f}" y1="{y - 12}" x2="{at:.1f}" y2="{y + 12}" stroke="{colour}"/>')
            parts.append(f'<text x="{at:.1f}" y="{y + below}" font-size="10" text-anchor="middle">{label}</text>')
    return svg(640, bottom + 30, parts)


async def _main(settings: Settings, load: Load) -> dict[str, list[float]]:
    async with ready_engine(settings) as engine:
        return await Experiment(engine, load).run()


def main(arguments: Sequence[str]) -> None:
    """Run it in full and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=32, help="engine.max_rows")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "fairness.svg")
    given = parser.parse_args(arguments)
    values = {"model.reference": given.model, "server.state_dir": ROOT / ".state", "engine.max_rows": given.rows}
    found = asyncio.run(_main(Settings.load(None, values), Load()))
    given.svg.write_text(drawing(found), "utf-8")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
