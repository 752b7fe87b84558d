"""The whole service over a backend that fails as told: `python -m tests.faulty_service STATE_DIR FAULT PHASE`.

It behaves until the file `strike` is in STATE_DIR, and then fails at the first step that finds the engine in PHASE; the
file `struck` says when. `tests/fault_cells.py` drives it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from service.app import App, build
from service.engine.backend import StepResult
from service.engine.canary import CANARY_UID
from service.observability.logging import configure, flush, log_uncaught
from service.serve import leave_now, run
from service.settings import Settings
from tests.fakes import FakeBackend

PACE = 0.005
"""Seconds of a step, so that a stream lasts."""

LEAK = 1 << 28
"""Bytes by which live arrays grow with each step; the fake model's budget is four times as much."""


@dataclass
class FaultyBackend(FakeBackend):
    """`fault` and `phase` are the words of the matrix; `tell` runs a call on the event loop."""

    state_dir: Path = Path()
    fault: str = ""
    phase: str = ""
    tell: Callable[[Callable[[], None]], object] = lambda _: None
    afflicted: bool = False
    strikes: dict[str, Callable[[], StepResult]] = field(init=False)

    def __post_init__(self) -> None:
        self.strikes = {
            "hang": self.hang,
            "hold": self.hold,
            "livelock": StepResult,
            "leak": self.leak,
            "abort": self.abort,
            "raise": self.fail_once,
            "fail": self.fail,
            "die": self.die,
            "loop": self.block_the_loop,
        }

    def step(self) -> StepResult:
        time.sleep(PACE)
        if not self.afflicted and self.due():
            self.afflicted = True
            flush()
            (self.state_dir / "struck").write_text(str(time.time()))
        return self.strikes[self.fault]() if self.afflicted else super().step()

    def due(self) -> bool:
        if not (self.state_dir / "strike").exists():
            return False
        rows = [row for uid, row in self.rows.items() if uid != CANARY_UID]
        match self.phase:
            case "idle":
                return CANARY_UID in self.rows
            case "prefill":
                return any(0 < row.prefill < self.prefill_steps for row in rows)
            case _:
                return any(row.sampled for row in rows)

    def hang(self) -> StepResult:
        """As native code that waits for a device without the interpreter lock."""
        threading.Event().wait()
        raise AssertionError

    def hold(self) -> StepResult:
        """As native code that waits with the interpreter lock: no Python runs any more."""
        while True:
            ctypes.PyDLL(None).sleep(3600)

    def leak(self) -> StepResult:
        self.active += LEAK
        return super().step()

    def abort(self) -> StepResult:
        """As Metal does in a completion handler."""
        os.abort()

    def fail_once(self) -> StepResult:
        self.fault = "none"
        self.strikes["none"] = super().step
        raise RuntimeError("scripted")

    def fail(self) -> StepResult:
        raise RuntimeError("scripted")

    def die(self) -> StepResult:
        raise SystemExit("scripted")

    def block_the_loop(self) -> StepResult:
        self.fail_once_quietly()
        self.tell(lambda: time.sleep(3600))
        return super().step()

    def fail_once_quietly(self) -> None:
        self.fault = "none"
        self.strikes["none"] = super().step


def main(state_dir: str, fault: str, phase: str) -> int:
    configure(level="info", fmt="json")
    log_uncaught()
    settings = Settings.load(
        None, {**json.loads(Path(state_dir, "settings").read_text()), "server.state_dir": Path(state_dir)}
    )
    backend = FaultyBackend(state_dir=Path(state_dir), fault=fault, phase=phase)
    if phase == "prefill":
        backend.prefill_steps = 100_000
    made: list[App] = []

    def over_faults(given: Settings) -> App:
        app = build(given, backend)
        backend.tell = app.engine.tell
        made.append(app)
        return app

    code = run(settings, build=over_faults)
    series = made[0].engine._telemetry._metrics.registry.collect()
    samples = [sample for family in series for sample in family.samples if sample.value]
    told = ("mlxd_watchdog_trips_total", "mlxd_internal_errors_total", "mlxd_request_failure_total")
    counted = [[sample.name, *sample.labels.values(), sample.value] for sample in samples if sample.name in told]
    Path(state_dir, "counted").write_text(json.dumps(counted))
    return code


if __name__ == "__main__":
    leave_now(main(*sys.argv[1:]))
