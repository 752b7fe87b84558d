"""The worker driven by hand, over a backend whose steps take scripted time: no thread, no waiting, no chance.

Prompts are read one after the other, a chunk a step, beside one token of every row that decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.engine.backend import Row, StepResult
from service.engine.generation import Delta, Generation, GenerationRequest
from service.engine.outbox import Delivery
from service.engine.progress import Progress
from service.engine.telemetry import Telemetry
from service.engine.worker import Worker
from service.observability.metrics import Metrics
from service.settings import EngineSettings
from tests.fakes import FakeBackend


class Clock:
    """Monotonic seconds that move when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class TimedBackend(FakeBackend):
    """Costs are in seconds; `noise` multiplies those of each step. `cached` is what the prefix cache has of a row.

    No prompt is begun while `most_rows` decode, as where more would make a step too long.
    """

    clock: Clock = field(default_factory=Clock)
    prefill_token: float = 0.001
    decode_base: float = 0.010
    decode_row: float = 0.001
    chunk: int = 64
    chunk_alone: int = 512
    most_rows: int = 1000
    context_length: int = 100_000
    cached: Callable[[Row], int] = lambda _row: 0
    noise: Callable[[], float] = lambda: 1.0
    overlapping: bool = False
    """Whether steps are waited for, so that something can be done meanwhile."""

    def do_meanwhile(self, work: Callable[[], object]) -> None:
        self.meanwhile = work

    def insert(self, row: Row) -> None:
        super().insert(row)
        self.rows[row.uid].prefill = len(row.prompt)

    def step(self) -> StepResult:
        self.steps += 1
        result, noise = StepResult(), self.noise()
        live = [(uid, row) for uid, row in self.rows.items() if row.prefill == 0]
        reading = next((row for row in self.rows.values() if row.prefill), None)
        if len(live) >= self.most_rows:
            reading = None
        if reading is not None:
            if reading.prefill == len(reading.row.prompt):
                cached = self.cached(reading.row)
                reading.row.on_prefill(cached)
                reading.prefill -= cached
            result.prefill_tokens = min(reading.prefill, self.chunk if live else self.chunk_alone)
            result.prefill_seconds = result.prefill_tokens * self.prefill_token * noise
            reading.prefill -= result.prefill_tokens
        if live:
            if self.overlapping:
                self.meanwhile()
            result.overlaps = self.overlapping and reading is None
            result.decode_rows = len(live)
            result.decode_seconds = (self.decode_base + len(live) * self.decode_row) * noise
        for uid, row in live:
            result.tokens.append(self._token(uid, row))
        self.clock.now += result.prefill_seconds + result.decode_seconds
        return result


class ByHand:
    """A worker whose turns a test takes. `said` holds what each generation was sent, `served` tokens by principal."""

    def __init__(self, backend: TimedBackend, **options: Any) -> None:
        self.backend = backend
        self.clock = backend.clock
        self.said: dict[Generation, list[Delta]] = {}
        self.metrics = Metrics()
        self.progress = Progress(backend.clock)
        self.worker = Worker(
            backend,
            backend.load(),
            EngineSettings(**options),
            clock=backend.clock,
            deliver=self._deliver,
            telemetry=Telemetry(self.metrics),
            progress=self.progress,
        )

    def _deliver(self, batch: Sequence[Delivery], heard: Callable[[], object]) -> None:
        heard()
        for generation, delta in batch:
            self.said.setdefault(generation, []).append(delta)
            generation.put(delta)

    def submit(self, principal: str = "p", *, prompt: int = 4, max_tokens: int = 4, **more: Any) -> Generation:
        """One request of a single row; `timeout` is in seconds from now."""
        return self.submit_rows(1, principal, prompt=prompt, max_tokens=max_tokens, **more)[0]

    def submit_rows(
        self, rows: int, principal: str = "p", *, prompt: int = 4, max_tokens: int = 4, **more: Any
    ) -> list[Generation]:
        timeout = more.pop("timeout", None)
        request = GenerationRequest(
            request_id=more.pop("request_id", principal),
            prompt=(5,) * prompt,
            max_tokens=max_tokens,
            principal=principal,
            deadline=None if timeout is None else self.clock.now + timeout,
            **more,
        )
        generations = [Generation(request, self.worker.cancel) for _ in range(rows)]
        self.worker.submit(generations)
        return generations

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.worker._turn()

    def turns_until(self, condition: Callable[[], bool], most: int = 1_000_000) -> int:
        """Take turns until the condition holds; how many that took."""
        for turns in range(most):
            if condition():
                return turns
            self.turn()
        raise AssertionError("it never came to that")

    def finish(self) -> None:
        """Until nobody waits or runs."""
        self.turns_until(lambda: not self.worker._jobs)
        assert self.worker.idle()

    def served(self, generations: Sequence[Generation]) -> int:
        """Tokens that these were given so far, of prompt and output."""
        return sum(generation.meter.tokens for generation in generations)
