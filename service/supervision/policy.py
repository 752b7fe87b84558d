"""What earlier starts say about this one: arithmetic only, any thread.

A start *failed* when it did not become ready, or was for less than `stable_after`, and nobody had asked it to end.
Each failure in a row doubles the wait before the next start. A start *died* when it has no end that anybody saw, or
when it had been ready and ended with a code of its own (a tripped watchdog). Enough of that, or a machine that went
down under a start, and the next one serves in safe mode.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

from service.settings import SupervisedSettings
from service.supervision.starts import StartRecord

RECENT = 3600.0
"""Seconds for which a start is held against the next ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`delay` seconds to wait before loading, why in safe mode, why not to start at all; empty: no. `deaths` are the
    moments (since the epoch) until which starts of the last hour had died."""

    delay: float = 0.0
    safe_mode: str = ""
    give_up: str = ""
    deaths: tuple[float, ...] = ()

    def died_recently(self, now: float) -> int:
        """How many starts before this one died in the hour before `now`."""
        return sum(now - death < RECENT for death in self.deaths)


def judge(starts: Sequence[StartRecord], settings: SupervisedSettings, *, now: float, boot: float) -> Verdict:
    """The verdict over earlier `starts`, oldest first, of which none runs any more. `boot` is when the machine came up.

    Both times are seconds since the epoch.
    """
    seen = _with_ends(starts, now)
    deaths = tuple(over for start, over in seen if died(start) and now - over < RECENT)
    return Verdict(
        delay=backoff(_failures_in_a_row(seen, settings, now), settings.backoff_first, settings.backoff_max),
        safe_mode=_safe_mode(seen, settings, deaths, boot),
        give_up=_give_up(seen, settings, now),
        deaths=deaths,
    )


def backoff(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row: `first` after one, then doubling up to `most`."""
    return min(most, first * 2.0 ** (failures - 1)) if failures > 0 else 0.0


def died(start: StartRecord) -> bool:
    """Whether it went without a word, or gave up while it served."""
    return start.exit_code is None or (start.exit_code != os.EX_OK and start.ready is not None)


Seen = Sequence[tuple[StartRecord, float]]
"""Starts, each with the moment at which it was over at the latest."""


def _with_ends(starts: Sequence[StartRecord], now: float) -> Seen:
    nexts = [*(start.began for start in starts[1:]), now]
    return [(start, after if start.ended is None else start.ended) for start, after in zip(starts, nexts, strict=False)]


def _failed(start: StartRecord, over: float, settings: SupervisedSettings) -> bool:
    unasked = start.exit_code != os.EX_OK
    return unasked and (start.ready is None or over - start.ready < settings.stable_after)


def _failures_in_a_row(seen: Seen, settings: SupervisedSettings, now: float) -> int:
    failed = (_failed(start, over, settings) and now - over < RECENT for start, over in reversed(seen))
    return sum(1 for _ in itertools.takewhile(bool, failed))


def _give_up(seen: Seen, settings: SupervisedSettings, now: float) -> str:
    """Ends that the program itself chose, each before it was ready: another start would end alike."""
    hopeless = list(
        itertools.takewhile(
            lambda each: each[0].exit_code not in (None, os.EX_OK) and each[0].ready is None and now - each[1] < RECENT,
            reversed(seen),
        )
    )
    if len(hopeless) < settings.max_failed_starts:
        return ""
    last = hopeless[0][0]
    return (
        f"{len(hopeless)} starts in a row ended before they were ready; the last one: {last.reason or last.exit_code}"
    )


def _safe_mode(seen: Seen, settings: SupervisedSettings, deaths: Sequence[float], boot: float) -> str:
    """Why the next start serves with less. What was refused before it loaded has proven nothing."""
    last, over = next(((start, over) for start, over in reversed(seen) if not start.refused), (None, 0.0))
    if last is None:
        return ""
    if last.exit_code is None and boot > last.began:
        return "the machine went down while the service ran"
    if len(deaths) >= settings.safe_mode_deaths:
        return f"{len(deaths)} starts died within an hour"
    if last.safe_mode and (last.ready is None or over - last.ready < settings.safe_mode_run):
        return last.safe_mode
    return ""
