"""What earlier starts say about the next one: as a table, and as properties over any history."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, strategies as st

from service.settings import SupervisedSettings
from service.supervision.policy import RECENT, Verdict, backoff, judge
from service.supervision.starts import StartRecord

RULES = SupervisedSettings()
NOW = 1_700_100_000.0
BOOT = NOW - 100_000


def start(ago: float, **more: Any) -> StartRecord:
    """One that began `ago` seconds before NOW; `ready` and `ended` are seconds after it began."""
    began = NOW - ago
    moments = {name: began + more.pop(name) for name in ("ready", "ended") if name in more}
    return StartRecord(began=began, pid=7, **moments, **more)


def before_ready(ago: float) -> StartRecord:
    """Killed or aborted while it loaded."""
    return start(ago)


def in_service(ago: float, **more: Any) -> StartRecord:
    """Killed or aborted while it served."""
    return start(ago, ready=5, **more)


def by_watchdog(ago: float) -> StartRecord:
    return start(ago, ready=5, ended=400, exit_code=os.EX_SOFTWARE)


def broken(ago: float) -> StartRecord:
    """It ended itself before it was ready."""
    return start(ago, ended=1, exit_code=os.EX_SOFTWARE, reason="no start-up today")


def stopped(ago: float, ran: float = 1000) -> StartRecord:
    return start(ago, ready=5, ended=5 + ran, exit_code=0)


def refused(ago: float) -> StartRecord:
    return start(ago, ended=0.1, exit_code=0, reason="configuration: server.port: wrong")


@dataclass(frozen=True)
class Case:
    says: str
    starts: list[StartRecord]
    delay: float = 0.0
    safe: str = ""
    gives_up: bool = False
    boot: float = BOOT


CASES = [
    Case("the first start ever", []),
    Case("the last one was stopped", [stopped(2000)]),
    Case("one died while it loaded", [before_ready(40)], delay=1),
    Case("one died soon after it was ready", [in_service(40)], delay=1),
    Case("three in a row failed, each soon", [before_ready(n) for n in (120, 80, 40)], delay=4, safe="3 starts"),
    Case("nine failed: the wait has its most", [broken(40 * n) for n in range(10, 1, -1)], delay=256),
    Case("it was ready for long before it died", [before_ready(900), in_service(800)]),
    Case("failures long ago do not count", [before_ready(RECENT + 400), stopped(RECENT + 300, 5)]),
    Case("nor does one that was followed by a clean stop", [before_ready(300), stopped(200, 60)]),
    Case("who asked it to end while it loaded has mended it", [before_ready(300), refused(200)]),
    Case("a stop soon after it was ready is no failure", [stopped(20, 5)]),
    Case("three died in service within an hour", [in_service(n) for n in (3000, 2000, 1000)], safe="3 starts died"),
    Case("two died in service within an hour", [in_service(2000), in_service(1000)]),
    Case("three died, one of them over an hour ago", [in_service(n) for n in (9000, 5000, 1000)]),
    Case("the watchdog ended it three times", [by_watchdog(n) for n in (3000, 2000, 1000)], safe="3 starts died"),
    Case("ends of its own before it was ready are no deaths", [broken(n) for n in (120, 80, 40)], delay=4),
    Case("the machine went down under it", [in_service(500)], safe="the machine went down", boot=NOW - 60),
    Case("the machine was restarted after it had ended", [stopped(2000)], boot=NOW - 60),
    Case("it died, and later the machine was restarted", [in_service(500), stopped(400, 100)], boot=NOW - 60),
    Case("refused starts since the machine went down", [in_service(500), refused(30)], safe="machine", boot=NOW - 60),
    Case("the last safe run was short", [start(9000, ready=5, ended=1800, exit_code=0, safe_mode="why")], safe="why"),
    Case("the last safe run was long", [start(9000, ready=5, ended=3700, exit_code=0, safe_mode="why")]),
    Case("a safe run that died late", [start(9000, ready=5, safe_mode="why")]),
    Case("ten could not start", [broken(40 * n) for n in range(11, 1, -1)], delay=300, gives_up=True),
    Case("one of ten was killed", [*(broken(40 * n) for n in range(11, 2, -1)), before_ready(80)], delay=300),
    Case("one of ten had served", [*(broken(40 * n) for n in range(11, 3, -1)), stopped(120, 5), broken(80)], delay=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.says)
def test_the_verdict_over_a_history(case: Case) -> None:
    verdict = judge(case.starts, RULES, now=NOW, boot=case.boot)
    assert verdict.delay == case.delay
    assert case.safe in verdict.safe_mode
    assert bool(verdict.safe_mode) is bool(case.safe)
    assert bool(verdict.give_up) is case.gives_up


def test_giving_up_says_how_often_and_why() -> None:
    verdict = judge([broken(40 * n) for n in range(10, 0, -1)], RULES, now=NOW, boot=BOOT)
    assert verdict.give_up == "10 starts in a row ended before they were ready; the last one: no start-up today"


def test_deaths_are_recent_for_an_hour() -> None:
    verdict = Verdict(deaths=(NOW - 3000, NOW - 1000))
    assert [verdict.died_recently(NOW + later) for later in (0, 601, 2601)] == [2, 1, 0]


endings = st.fixed_dictionaries(
    {},
    optional={
        "ready": st.floats(0, 500),
        "ended": st.floats(500, 5000),
        "exit_code": st.sampled_from([None, 0, 1, 70, 78, 143]),
        "safe_mode": st.sampled_from(["", "why"]),
    },
)
histories = st.lists(st.tuples(st.floats(0, 4000), endings), max_size=32)


def history(steps: list[tuple[float, dict[str, Any]]]) -> list[StartRecord]:
    ago = sum(gap for gap, _ in steps)
    found = []
    for gap, ending in steps:
        found.append(start(ago, **ending))
        ago -= gap
    return found


@given(histories, st.floats(NOW - 20_000, NOW))
def test_the_wait_is_bounded_whatever_was(steps: list[tuple[float, dict[str, Any]]], boot: float) -> None:
    verdict = judge(history(steps), RULES, now=NOW, boot=boot)
    assert 0 <= verdict.delay <= RULES.backoff_max
    assert len(verdict.deaths) <= len(steps)


@given(histories, st.floats(0, 59))
def test_one_more_early_death_never_shortens_the_wait(steps: list[tuple[float, dict[str, Any]]], ago: float) -> None:
    """The history is a minute older where one more has failed since."""
    earlier = [each.model_copy(update={"began": each.began - 60}) for each in history(steps)]
    earlier = [each for each in earlier if NOW - each.began < RECENT / 2]
    before = judge(earlier, RULES, now=NOW - 60, boot=BOOT).delay
    assert judge([*earlier, before_ready(ago)], RULES, now=NOW, boot=BOOT).delay >= max(before, RULES.backoff_first)


@given(histories, st.floats(60, 100_000), st.sampled_from([None, 0, 70]))
def test_a_good_run_resets_the_wait_however_it_ended(
    steps: list[tuple[float, dict[str, Any]]], ran: float, code: int | None
) -> None:
    good = start(ran + 5, ready=5, **({} if code is None else {"ended": ran + 5, "exit_code": code}))
    assert judge([*history(steps), good], RULES, now=NOW, boot=BOOT).delay == 0


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(100, 3600))
def test_the_wait_doubles_up_to_its_most(failures: int, first: float, most: float) -> None:
    here, there = backoff(failures, first, most), backoff(failures + 1, first, most)
    assert here <= there <= most
    assert there in {first, 2 * here, most}
