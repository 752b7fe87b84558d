"""The pacer: steps within their target, decode and prefill in turn where they do not fit, costs learnt from steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from service.engine.pacing import HEADROOM, SMALLEST_CHUNK, Load, Pacer, StepCosts, StepPlan

TARGET = 0.25
LARGEST = 2048
COSTS = StepCosts(
    decode_base=0.01,
    decode_row=0.002,
    decode_context=1e-8,
    prefill_base=0.002,
    prefill_token=0.001,
    prefill_context=1e-7,
    join_position=1e-6,
)
JOIN = Load(rows=3, context=700, cohort=2, cohort_context=500, joining=2)

# From costs that are nothing to costs of which the smallest part is longer than the target.
any_costs = st.builds(
    StepCosts,
    decode_base=st.floats(0, 0.3),
    decode_row=st.floats(0, 0.05),
    decode_context=st.floats(0, 1e-6),
    prefill_base=st.floats(0, 0.1),
    prefill_token=st.floats(0, 0.02),
    prefill_context=st.floats(0, 1e-6),
    join_position=st.floats(0, 1e-5),
)


@st.composite
def loads(draw: st.DrawFn, least: int = 0) -> Load:
    """With at least `least` live rows and `least` rows in prefill."""
    rows, cohort = draw(st.integers(least, 64)), draw(st.integers(least, 8))
    return Load(
        rows=rows,
        context=draw(st.integers(1, 100_000)) if rows else 0,
        cohort=cohort,
        cohort_context=draw(st.integers(0, 100_000)) if cohort else 0,
        joining=draw(st.sampled_from([0, cohort])),
    )


def pacer(costs: StepCosts = COSTS, largest: int = LARGEST) -> Pacer:
    return Pacer(target=TARGET, largest=largest, costs=costs)


def parts(p: Pacer, load: Load, plan: StepPlan) -> list[float]:
    """Planned seconds of each thing that the step does."""
    return [
        *([p.decode_seconds(load.rows, load.context)] if plan.decode else []),
        *([p.prefill_seconds(plan.chunk, load.cohort_context)] if plan.chunk else []),
        *([p.join_seconds(load)] if plan.join else []),
    ]


@given(st.lists(loads(), min_size=1, max_size=8), any_costs)
def test_a_step_is_planned_within_its_target_unless_the_least_it_can_do_takes_longer(
    found: list[Load], costs: StepCosts
) -> None:
    p = pacer(costs)
    for load in found:
        plan = p.plan(load)
        seconds = parts(p, load, plan)
        indivisible = len(seconds) == 1 and plan.chunk in (0, SMALLEST_CHUNK)
        assert indivisible or sum(seconds) <= TARGET * HEADROOM * (1 + 1e-9)


@given(st.lists(loads(least=1), min_size=2, max_size=8), any_costs)
def test_neither_the_live_rows_nor_the_cohort_wait_for_more_than_one_step(found: list[Load], costs: StepCosts) -> None:
    p = pacer(costs)
    for plans in pairwise([p.plan(load) for load in found]):
        assert any(plan.decode for plan in plans)
        assert any(plan.chunk or plan.join for plan in plans)


@given(loads(), any_costs)
def test_a_step_does_what_its_load_asks_for_and_nothing_else(load: Load, costs: StepCosts) -> None:
    plan = pacer(costs).plan(load)
    assert load.rows or not plan.decode
    assert plan.decode or plan.chunk or plan.join or not (load.rows or load.cohort)
    assert not plan.join or load.joining
    assert not plan.chunk or (load.cohort and not load.joining)
    assert plan.chunk == 0 or SMALLEST_CHUNK <= plan.chunk <= LARGEST


def test_what_fits_is_done_together() -> None:
    assert pacer().plan(Load(rows=8, context=100, cohort=1)) == StepPlan(decode=True, chunk=128)
    assert pacer().plan(JOIN) == StepPlan(decode=True, join=True)
    assert pacer().plan(Load(rows=8, context=100)) == StepPlan(decode=True)
    assert pacer().plan(Load()) == StepPlan(decode=False)


def test_what_does_not_fit_is_done_in_turn_each_with_the_whole_target() -> None:
    p = pacer()
    load = Load(rows=94, context=100, cohort=1)
    decode, prefill = StepPlan(decode=True), StepPlan(decode=False, chunk=128)
    assert [p.plan(load) for _ in range(4)] == [decode, prefill, decode, prefill]
    joining = Load(rows=94, context=100, cohort=1, cohort_context=100, joining=1)
    assert [p.plan(joining) for _ in range(4)] == [decode, StepPlan(decode=False, join=True)] * 2


def test_after_a_step_that_decoded_it_is_the_cohorts_turn() -> None:
    p = pacer()
    assert p.plan(Load(rows=94, context=100)) == StepPlan(decode=True)
    assert p.plan(Load(rows=94, context=100, cohort=1)) == StepPlan(decode=False, chunk=128)


def test_chunks_shrink_with_rows_and_context_and_have_a_largest() -> None:
    def chunk(p: Pacer, rows: int = 0, context: int = 0) -> int:
        return p.plan(Load(rows=rows, context=1, cohort=1, cohort_context=context)).chunk

    assert chunk(pacer()) == 128
    assert chunk(pacer(), rows=64) < 128
    assert chunk(pacer(), context=50_000) < 128
    assert chunk(pacer(StepCosts(prefill_token=1e-9))) == LARGEST
    assert chunk(pacer(largest=8)) == 8


@given(rows=st.integers(1, 64), context=st.integers(0, 100_000), costs=any_costs)
def test_a_new_cohort_gets_what_fits_beside_the_live_rows(rows: int, context: int, costs: StepCosts) -> None:
    p = pacer(costs)
    room = p.room(Load(rows=rows, context=context))
    seconds = p.decode_seconds(rows, context) + p.prefill_seconds(room, 0)
    assert room == SMALLEST_CHUNK or seconds <= TARGET * HEADROOM * (1 + 1e-9)


Estimate = Callable[[Pacer], float]
Observe = Callable[[Pacer, float], None]
LEARNT: dict[str, tuple[Estimate, Observe]] = {
    "decode": (lambda p: p.decode_seconds(8, 100), lambda p, seconds: p.observe_decode(8, 100, seconds)),
    "prefill": (lambda p: p.prefill_seconds(64, 100), lambda p, seconds: p.observe_prefill(64, 100, seconds)),
    "join": (lambda p: p.join_seconds(JOIN), lambda p, seconds: p.observe_join(JOIN, seconds)),
}
learnt = pytest.mark.parametrize(("estimate", "observe"), LEARNT.values(), ids=LEARNT)


@learnt
@given(ratio=st.floats(1, 100))
def test_what_took_longer_is_believed_at_once_up_to_a_factor(
    estimate: Estimate, observe: Observe, ratio: float
) -> None:
    p = pacer()
    planned = estimate(p)
    observe(p, planned * ratio)
    assert estimate(p) == pytest.approx(planned * min(ratio, 4))


@learnt
@given(ratio=st.floats(1e-3, 1))
def test_what_took_less_is_believed_a_little_at_a_time(estimate: Estimate, observe: Observe, ratio: float) -> None:
    p = pacer()
    planned = estimate(p)
    observe(p, planned * ratio)
    assert planned * 0.9 <= estimate(p) * (1 + 1e-9)
    assert estimate(p) <= planned
    for _ in range(100):
        observe(p, planned * ratio)
    assert estimate(p) == pytest.approx(planned * ratio, rel=1e-3)


@learnt
def test_a_step_of_no_time_teaches_nothing_and_calibration_forgets(estimate: Estimate, observe: Observe) -> None:
    p = pacer()
    planned = estimate(p)
    observe(p, 0.0)
    assert estimate(p) == planned
    observe(p, 3 * planned)
    p.calibrate(COSTS)
    assert estimate(p) == planned


def test_each_kind_of_work_is_learnt_by_itself() -> None:
    for kind, (estimate, observe) in LEARNT.items():
        p = pacer()
        observe(p, 2 * estimate(p))
        changed = {name for name, (other, _) in LEARNT.items() if other(p) != other(pacer())}
        assert changed == ({"prefill", "join"} if kind == "prefill" else {kind})  # a join runs one position a row


def test_a_slow_chunk_shrinks_the_next_one() -> None:
    p = pacer()
    load = Load(cohort=1)
    p.observe_prefill(128, 0, 4 * p.prefill_seconds(128, 0))
    assert p.plan(load).chunk == 32
