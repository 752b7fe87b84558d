"""Run the whole fault matrix and write what was seen into docs/reliability.md: `python -m tests.load.fault_table`.

The table stands between two marks there; the rest of the page is left alone.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from tests.conftest import ROOT
from tests.fault_cells import FAULTS, LOOP_TIMEOUT, PHASES, STALL_TIMEOUT, TEXTS, Outcome, run_cells

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fault table: begin -->\n", "<!-- fault table: end -->\n"

FAULT_WORDS = {
    "hang": "hangs in native code, interpreter lock released",
    "hold": "hangs in native code, interpreter lock kept",
    "livelock": "livelocks: steps end, nothing comes of them",
    "leak": "leaks: live arrays grow beyond the budget",
    "abort": "aborts (SIGABRT)",
    "raise": "raises once; the canary then passes",
    "fail": "raises for good, in the canary too",
    "die": "its thread dies (SystemExit)",
    "loop": "the event loop stands still",
}


def rows(found: Sequence[Outcome]) -> Iterator[str]:
    """The table, line by line."""
    yield "| fault | engine | running client | waiting client | log | metrics | exit | seen | ended |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in found:
        fault = FAULT_WORDS[one.fault] if one.phase == PHASES[0] else ""
        seen = one.ended if one.detected is None else one.detected
        cells = (
            *(fault, one.phase, one.running or "none", one.waiting or "none", _events(one), _counted(one)),
            *(one.code, f"{seen:.1f} s", f"{one.ended:.1f} s"),
        )
        yield f"| {' | '.join(map(str, cells))} |"


def _events(one: Outcome) -> str:
    events = [f"`{event}`" for event in one.events if event not in TEXTS]
    events += [f"stacks on standard error: `{event.partition(' (')[0]}`" for event in one.events if event in TEXTS]
    if one.watch:
        events[0] += f" ({one.watch})"
    return ", ".join(events)


def _counted(one: Outcome) -> str:
    """Without the requests that were refused, or failed by the row's own fault: they are in the columns before."""
    names = [name.removeprefix("mlxd_") for name in one.counted if "{draining}" not in name]
    names = [name for name in names if "{generation_failed}" not in name]
    return ", ".join(f"`{name}`" for name in names) or "none"


def main() -> int:
    """Run, and rewrite the page."""
    every = [(fault, phase) for fault in FAULTS for phase in PHASES]
    with tempfile.TemporaryDirectory() as folder:
        found = run_cells(every, Path(folder), at_once=2)
    where = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    limits = f"`stall_timeout` {STALL_TIMEOUT:g} s, `loop_timeout` {LOOP_TIMEOUT:g} s"
    starts = [one.start for one in found]
    text = "\n".join(rows(found))
    text = f"""
{len(found)} processes, two at a time; {where}; {limits}.

{text}

Back again: after *ended*, what the supervisor waits, and a start. From such a start to ready: {median(starts):.1f} s in
the median, {max(starts):.1f} s at most, on a machine that others used too; a real one loads its model as well.

"""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
