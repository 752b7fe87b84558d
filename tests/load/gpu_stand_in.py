"""`mlxd` over a backend whose steps take the time that an H100 was seen to take, on a machine that has none.

For measuring what happens around the engine alone (`docs/performance.md`): `python -m tests.load.gpu_stand_in serve`.
Of each step a part has the interpreter, as building a graph does, and the rest lets go of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from service import app
from service.cli import main
from service.engine.backend import StepResult
from tests.fakes import FakeBackend

DECODE = 0.0022, 0.0054
"""Seconds of a step of up to 32 rows: with the interpreter, and without."""

PREFILL = 0.008, 0.014
"""The same for a cohort, however much it reads."""

COHORT = 8


@dataclass
class StandIn(FakeBackend):
    worth_waiting: float = 0.004
    """What an H100's 7.4 ms, less 35 us for each position, leave where a hundred tokens of a prompt are not cached."""

    told: bool = False
    """Whether a step has just ended with somebody's first or last token, and what is left of it is due."""

    def do_meanwhile(self, work: Callable[[], object]) -> None:
        self._meanwhile = work

    def step(self) -> StepResult:
        result, began = StepResult(overlaps=True), time.perf_counter()
        live = [] if self.told else [(uid, row) for uid, row in self.rows.items() if not row.prefill]
        self.told = False
        cohort = [row for row in self.rows.values() if row.prefill][:COHORT]
        if live:
            _compute(DECODE[0])
            self._meanwhile()
            time.sleep(DECODE[1])
            result.tokens = [self._token(uid, row) for uid, row in live]
            result.decode_rows, result.decode_seconds = len(live), time.perf_counter() - began
            self.told = any(
                token.finish_reason or row.sampled == 1 for token, (_, row) in zip(result.tokens, live, strict=True)
            )
            if self.told:
                result.overlaps = False
                return result
        if cohort:
            began = time.perf_counter()
            for row in cohort:
                row.row.on_prefill(0)
                row.prefill = 0
            _compute(PREFILL[0])
            time.sleep(PREFILL[1])
            result.prefill_tokens = sum(len(row.row.prompt) for row in cohort)
            result.prefill_seconds = time.perf_counter() - began
        return result


def _compute(seconds: float) -> None:
    """Use so much of the processor, whoever has the interpreter meanwhile."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


if __name__ == "__main__":
    app._mlx = lambda settings, start: StandIn()
    main()
