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
from dataclasses import dataclass
from pathlib import Path

from service.app import App, build
from service.engine.backend import Row, StepResult
from service.engine.canary import CANARY_UID
from service.observability.logging import configure, flush, log_uncaught
from service.serve import leave_now, run
from service.settings import Settings
from tests.fakes import FakeBackend

PACE = 0.005
"""Seconds of a step, so that a stream lasts."""

LONG = 20
"""Tokens from which on a prompt takes long to read, where the fault strikes in prefill."""

COUNTED = ("mlxd_watchdog_trips_total", "mlxd_internal_errors_total", "mlxd_request_failure_total")

LEAK = 1 << 28
"""Bytes by which live arrays grow with each step; the fake model's budget is four times as much."""


@dataclass
class FaultyBackend(FakeBackend):
    """`fault` and `phase` are the words of the matrix; `tell` runs a call on the event loop."""

    state_dir: Path = Path()
    fault: str = ""
    phase: str = ""
    tell: Callable[[Callable[[], None]], object] = lambda _: None
    struck: bool = False

    def insert(self, row: Row) -> None:
        super().insert(row)
        if len(row.prompt) < LONG:
            self.rows[row.uid].prefill = 0
            row.on_prefill(0)

    def step(self) -> StepResult:
        time.sleep(PACE)
        if not self.struck and self.due():
            self.struck = True
            flush()
            (self.state_dir / "struck").write_text(str(time.time()))
        return self.strike() if self.struck else super().step()

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

    def strike(self) -> StepResult:  # noqa: C901 - a case for each fault
        match self.fault:
            case "hang":  # native code that waits without the interpreter lock
                threading.Event().wait()
            case "hold":  # native code that waits with it: no Python runs any more
                while True:
                    ctypes.PyDLL(None).sleep(3600)
            case "livelock":
                return StepResult()
            case "leak":
                self.active += LEAK
            case "abort":  # as Metal does in a completion handler
                os.abort()
            case "raise":
                self.fault = "none"
                raise RuntimeError("scripted")
            case "fail":
                raise RuntimeError("scripted")
            case "die":
                raise SystemExit("scripted")
            case "loop":  # not the engine, but what holds up everybody
                self.fault = "none"
                self.tell(lambda: time.sleep(3600))
        return super().step()


def main(state_dir: str, fault: str, phase: str) -> int:
    configure(level="info", fmt="json")
    log_uncaught()
    settings = Settings.load(
        None, {**json.loads(Path(state_dir, "settings").read_text()), "server.state_dir": Path(state_dir)}
    )
    backend = FaultyBackend(state_dir=Path(state_dir), fault=fault, phase=phase)
    if phase == "prefill":
        backend.prefill_steps = 100_000  # minutes
    made: list[App] = []

    def over_faults(given: Settings) -> App:
        app = build(given, backend)
        backend.tell = app.engine.tell
        made.append(app)
        return app

    code = run(settings, build=over_faults)
    Path(state_dir, "counted").write_text(json.dumps(_counted(made[0])))
    return code


def _counted(app: App) -> dict[str, float]:
    """What the last scrape would have shown of the faults."""
    series = app.engine._telemetry._metrics.registry.collect()
    samples = (sample for family in series for sample in family.samples if sample.value and sample.name in COUNTED)
    return {f"{sample.name}{{{', '.join(sample.labels.values())}}}": sample.value for sample in samples}


if __name__ == "__main__":
    leave_now(main(*sys.argv[1:]))
