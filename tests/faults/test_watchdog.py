"""A backend that hangs, keeps the interpreter lock, livelocks, leaks, aborts, raises or dies, and an event loop that
stands still, while the engine is idle, in prefill, in decode, and draining: real processes, and what clients get.

`python -m tests.load.fault_table` writes what was seen into docs/reliability.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fault_cells import FAULTS, LOOP_TIMEOUT, PHASES, STALL_TIMEOUT, Outcome, run_cells

pytestmark = pytest.mark.alone

EVERY = [(fault, phase) for fault in FAULTS for phase in PHASES]
SOME = [
    *(("hang", "decode"), ("hang", "draining"), ("hold", "prefill"), ("livelock", "decode"), ("leak", "decode")),
    *(("abort", "decode"), ("raise", "prefill"), ("fail", "idle"), ("die", "draining"), ("loop", "decode")),
]

GONE = ("hold", "abort", "loop")
"""Nobody can be told any more."""

RUNNING = {"leak": "generation_failed", "raise": "generation_failed", "fail": "generation_failed"}
"""What the client gets whose request runs, where it is not `engine_failed`."""

FIRST_EVENT = {
    **dict.fromkeys(("hang", "livelock", "loop"), "watchdog_tripped"),
    **dict.fromkeys(("raise", "fail"), "step_failed"),
    "hold": "Timeout (0:0",
    "leak": "memory_overgrown",
    "abort": "Fatal Python error: Aborted",
    "die": "engine_failed",
}
COUNTED = {
    **dict.fromkeys(("hang", "livelock"), "mlxd_watchdog_trips_total{engine}"),
    **dict.fromkeys(("raise", "fail"), "mlxd_internal_errors_total{worker_step}"),
    "leak": "mlxd_internal_errors_total{memory}",
    "die": "mlxd_request_failure_total{engine_failed}",
}
CODES = {"hold": 1, "abort": -signal.SIGABRT, "raise": os.EX_OK}

SLACK = 2.0
"""Seconds for a machine that is busy with other cells."""

WITHIN = {"hang": STALL_TIMEOUT, "livelock": STALL_TIMEOUT, "loop": LOOP_TIMEOUT, "hold": LOOP_TIMEOUT}
"""Seconds to detection; everything else is seen in the step in which it happens."""


def expected_running(fault: str, phase: str) -> str:
    if phase == "idle":
        return ""
    code = "cut" if fault in GONE else RUNNING.get(fault, "engine_failed")
    status = {"engine_failed": "503 ", "generation_failed": "500 "}.get(code, "")
    return f"{status}{code}" if phase == "prefill" else code


def expected_waiting(fault: str, phase: str) -> str:
    if phase == "idle":
        return ""
    if phase == "draining":
        return "503 draining"
    if fault in GONE:
        return "cut"
    return "200" if fault == "raise" else "503 engine_failed"


def wrong(found: Outcome) -> Iterator[str]:
    """What of a cell is not as it should be."""
    fault, phase = found.fault, found.phase
    idle_livelock = (fault, phase) == ("livelock", "idle")  # the canary counts its steps
    pairs = {
        "running": (found.running, expected_running(fault, phase)),
        "waiting": (found.waiting, expected_waiting(fault, phase)),
        "code": (found.code, CODES.get(fault, os.EX_SOFTWARE)),
        "event": (found.events[0], "step_failed" if idle_livelock else FIRST_EVENT[fault]),
    }
    for what, (got, wanted) in pairs.items():
        if got != wanted:
            yield f"{found.cell}: {what}: {got!r} and not {wanted!r}"
    series = "mlxd_internal_errors_total{worker_step}" if idle_livelock else COUNTED.get(fault, "")
    if series and phase != "idle" and series not in found.counted:
        yield f"{found.cell}: {series} is not in {found.counted}"
    limit = WITHIN.get(fault, 0.0)
    seen = found.ended if found.detected is None else found.detected
    if not limit * 0.5 - 0.1 <= seen <= limit + SLACK and not idle_livelock:
        yield f"{found.cell}: seen after {seen} s"
    if found.ended - seen > 2 * SLACK and fault != "raise":
        yield f"{found.cell}: ended {found.ended - seen:.1f} s after it was seen"


@pytest.mark.timeout(900)
def test_every_fault_in_every_phase_is_seen_told_and_ended(
    tmp_path: Path, count: Callable[[str, int, int], int]
) -> None:
    cells = (SOME + [cell for cell in EVERY if cell not in SOME])[: count("cells of the fault matrix", len(SOME), 36)]
    found = run_cells(cells, tmp_path, at_once=5)
    for one in found:
        print(f"{one.cell}: {one.running} / {one.waiting}; exit {one.code}, seen {one.detected}, ended {one.ended}")
    assert [(one.fault, one.phase) for one in found] == cells
    failures = [line for one in found for line in wrong(one)]
    assert not failures, "\n".join(failures)
    stacks = {one.fault: one.log for one in found if one.fault in ("hang", "hold")}
    assert '"thread_stack"' in stacks["hang"]
    assert all("in strike" in log for log in stacks.values()), "the stack says where it hangs"
