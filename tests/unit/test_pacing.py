"""The pacer: steps within their target, decode and prefill in turn where they do not fit, costs learnt from steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from service.engine.estimate import DOWN, UP
from service.engine.pacing import (
    ALIGNED,
    HEADROOM,
    ROOM_TO_GROW,
    SMALLEST_CHUNK,
    Load,
    Pacer,
    StepCosts,
    StepPlan,
)

TARGET = 0.25
LARGEST = 2048
COSTS = StepCosts(
    decode_base=0.01,
    decode_row=0.002,
    decode_context=1e-8,
    prefill_base=0.002,
    prefill_token=0.001,
    prefill_context=1e-7,
)

# From costs that are nothing to costs of which the smallest part is longer than the target.
any_costs = st.builds(
    StepCosts,
    decode_base=st.floats(0, 0.3),
    decode_row=st.floats(0, 0.05),
    decode_context=st.floats(0, 1e-6),
    prefill_base=st.floats(0, 0.1),
    prefill_token=st.floats(0, 0.02),
    prefill_context=st.floats(0, 1e-6),
)


more = st.lists(st.tuples(st.integers(1, 64), st.integers(1, 100_000)), max_size=3).map(tuple)


@st.composite
def loads(draw: st.DrawFn, least: int = 0) -> Load:
    """With at least `least` live rows and `least` rows in prefill."""
    rows, cohort = draw(st.integers(least, 64)), draw(st.integers(least, 8))
    return Load(
        rows=rows,
        context=draw(st.integers(1, 100_000)) if rows else 0,
        cohort=cohort,
        cohort_context=draw(st.integers(0, 100_000)) if cohort else 0,
        cohort_left=draw(st.none() | st.integers(1, 100_000)) if cohort else None,
        computing=draw(st.booleans()) if rows else False,
        others=draw(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 100_000)), max_size=3).map(tuple))
        if rows
        else (),
    )


def pacer(costs: StepCosts = COSTS, largest: int = LARGEST) -> Pacer:
    return Pacer(target=TARGET, largest=largest, costs=costs)


def observed(p: Pacer, load: Load) -> StepPlan:
    """The plan for this load, and the pacer told that it was done just as planned."""
    plan = p.plan(load)
    if plan.decode:
        p.observe_decode(p.decode_seconds(*load.batches), *load.batches)
    if plan.chunk:
        p.observe_prefill(plan.chunk, load.cohort_context, p.prefill_seconds(plan.chunk, load.cohort_context))
    return plan


def parts(p: Pacer, load: Load, plan: StepPlan) -> list[float]:
    """Planned seconds of each thing that the step does."""
    return [
        *([p.decode_seconds(*load.batches)] if plan.decode else []),
        *([p.prefill_seconds(plan.chunk, load.cohort_context)] if plan.chunk else []),
    ]


@given(st.lists(loads(), min_size=1, max_size=8), any_costs)
def test_a_step_is_planned_within_its_target_unless_the_least_it_can_do_takes_longer(
    found: list[Load], costs: StepCosts
) -> None:
    p = pacer(costs)
    for load in found:
        plan = p.plan(load)
        seconds = parts(p, load, plan)
        least = p.prefill_seconds(SMALLEST_CHUNK, load.cohort_context)
        decode_alone = len(seconds) == 1 and plan.decode
        smallest = len(seconds) == 1 and least > TARGET * HEADROOM and plan.chunk == SMALLEST_CHUNK
        assert decode_alone or smallest or sum(seconds) <= TARGET * HEADROOM * (1 + 1e-9)


@given(loads(least=1), any_costs, st.booleans())
def test_the_rest_of_a_step_whose_tokens_were_told_is_what_the_whole_would_have_done(
    load: Load, costs: StepCosts, copying: bool
) -> None:
    p = pacer(costs)
    assert p.plan(load, copying=copying, told=True) == replace(p.plan(load), decode=False)


@given(loads(), any_costs)
def test_rows_decode_beside_copies_also_where_it_is_a_chunks_turn(load: Load, costs: StepCosts) -> None:
    p = pacer(costs)
    plan = p.plan(load)
    expected = plan if plan.decode or not load.rows else StepPlan(decode=True, launch=False)
    assert p.plan(load, copying=True) == expected


@given(st.lists(loads(least=1), min_size=2, max_size=8), any_costs)
def test_neither_the_live_rows_nor_the_cohort_wait_for_more_than_one_step(found: list[Load], costs: StepCosts) -> None:
    p = pacer(costs)
    plans = [StepPlan(decode=True)]
    for load in found:
        plans.append(observed(p, replace(load, computing=plans[-1].launch)))
    for before, after in pairwise(plans):
        assert before.decode or after.decode
    for before, after in pairwise(plans[1:]):  # the first one may have to wait for a token that was on its way
        assert before.chunk or after.chunk


@given(loads(), any_costs)
def test_a_step_does_what_its_load_asks_for_and_nothing_else(load: Load, costs: StepCosts) -> None:
    plan = pacer(costs).plan(load)
    assert load.rows or not plan.decode
    assert plan.decode or plan.chunk or not (load.rows or load.cohort)
    assert plan.decode or not load.computing
    assert not plan.chunk or load.cohort
    assert 0 <= plan.chunk <= LARGEST


def test_what_fits_is_done_together() -> None:
    assert pacer().plan(Load(rows=8, context=100, cohort=1)) == StepPlan(decode=True, chunk=32)
    assert pacer().plan(Load(rows=8, context=100)) == StepPlan(decode=True)
    assert pacer().plan(Load()) == StepPlan(decode=False)


def test_what_does_not_fit_is_done_in_turn_each_with_the_whole_target() -> None:
    p = pacer()
    load = Load(rows=94, context=100, cohort=1)
    decode, prefill = StepPlan(decode=True, launch=False), StepPlan(decode=False, chunk=64, launch=False)
    assert [observed(p, load) for _ in range(4)] == [prefill, decode, prefill, decode]


def test_a_turn_that_a_chore_took_is_not_lost() -> None:
    """Seen: with a copy due after every short prompt, eight of them were prefilled before rows decoded again."""
    p = pacer()
    load = Load(rows=94, context=100, cohort=1)
    assert observed(p, load).chunk
    assert p.plan(load) == p.plan(load) == StepPlan(decode=True, launch=False)  # not done, so it is still their turn


def test_a_chunk_of_mostly_fixed_cost_is_not_worth_its_place_beside_decode() -> None:
    """As measured on two cores: 4 positions take 77 ms, 32 take 138; beside 7 rows at 118 ms only 4 would fit."""
    costs = StepCosts(decode_base=0.062, decode_row=0.008, prefill_base=0.07, prefill_token=0.0021)
    p = pacer(costs)
    load = Load(rows=7, context=32, cohort=1)
    assert observed(p, load) == StepPlan(decode=False, chunk=32, launch=False)
    assert observed(p, load) == StepPlan(decode=True, launch=False)
    assert p.room(load) == 32
    assert pacer(costs).plan(replace(load, cohort_left=4)) == StepPlan(decode=True, chunk=4)  # all of it, so together
    assert pacer(costs).plan(replace(load, rows=1)) == StepPlan(decode=True, chunk=16)


def test_all_that_is_left_is_one_chunk_where_it_fits() -> None:
    p = pacer()
    assert p.plan(Load(cohort=1)).chunk == 128
    assert p.plan(Load(cohort=1, cohort_left=190)).chunk == 190
    assert p.plan(Load(cohort=1, cohort_left=193)).chunk == 128, "more than a tail"
    assert p.plan(Load(cohort=1, cohort_left=1)).chunk == SMALLEST_CHUNK
    assert p.plan(Load(cohort=1, cohort_context=20_000, cohort_left=190)).chunk == 64 - 20_000 % 64, "too long"


def test_live_rows_wait_for_no_larger_a_chunk_than_the_prompt_needs() -> None:
    """As measured on an H100: 512 positions take 11 ms, 1,024 take 19, 2,048 take 34; 16 rows decode in 14."""
    p = pacer(StepCosts(decode_base=0.006, decode_row=0.0005, prefill_base=0.005, prefill_token=1.42e-5))
    assert p.plan(Load(cohort=1)).chunk == 2048
    assert p.plan(Load(rows=16, context=400, cohort=1)) == StepPlan(decode=True, chunk=1024)
    assert p.room(Load(rows=16, context=400)) == 1024


@given(rows=st.integers(0, 64), context=st.integers(0, 100_000), costs=any_costs)
def test_a_prompts_larger_chunks_share_their_ends(rows: int, context: int, costs: StepCosts) -> None:
    chunk = pacer(costs).plan(Load(rows=rows, context=1, cohort=1, cohort_context=context)).chunk
    assert chunk < ALIGNED or (context + chunk) % ALIGNED == 0
    several = pacer(costs).plan(Load(rows=rows, context=1, cohort=2, cohort_context=context)).chunk
    assert several.bit_count() <= 1, "of several rows: a power of two, whatever their context"


def test_a_chunk_after_a_cached_prefix_ends_where_the_next_ones_will() -> None:
    p = pacer()
    assert p.plan(Load(cohort=1, cohort_context=100)).chunk == 128 - 100
    assert p.plan(Load(cohort=1, cohort_context=128)).chunk == 128


def test_after_a_step_that_decoded_it_is_the_cohorts_turn_once_the_device_is_free() -> None:
    p = pacer()
    assert observed(p, Load(rows=94, context=100)) == StepPlan(decode=True)
    load = Load(rows=94, context=100, cohort=1)
    assert observed(p, replace(load, computing=True)) == StepPlan(decode=True, launch=False)
    assert observed(p, load) == StepPlan(decode=False, chunk=64, launch=False)


def test_chunks_shrink_with_rows_and_context_and_have_a_largest() -> None:
    def chunk(p: Pacer, rows: int = 0, context: int = 0) -> int:
        return p.plan(Load(rows=rows, context=1, cohort=1, cohort_context=context)).chunk

    assert chunk(pacer()) == 128
    assert chunk(pacer(), rows=64) < 128
    assert chunk(pacer(), context=50_000) < 128
    assert chunk(pacer(StepCosts(prefill_token=1e-9))) == LARGEST
    assert chunk(pacer(largest=8)) == 8


@given(rows=st.integers(1, 64), context=st.integers(0, 100_000), costs=any_costs)
def test_a_new_cohort_has_room_for_the_chunk_that_its_first_step_takes(
    rows: int, context: int, costs: StepCosts
) -> None:
    p = pacer(costs)
    room = p.room(Load(rows=rows, context=context))
    assert room == p.plan(Load(rows=rows, context=context, cohort=1)).chunk
    assert room == SMALLEST_CHUNK or p.prefill_seconds(room, 0) <= TARGET * HEADROOM * (1 + 1e-9)


@given(load=loads(), rows=st.integers(1, 8), context=st.integers(1, 100_000), costs=any_costs)
def test_rows_join_while_all_of_them_decode_within_a_step_that_may_still_grow(
    load: Load, rows: int, context: int, costs: StepCosts
) -> None:
    p = pacer(costs)
    home = p.home(load.batches, rows, context)
    batches = dict(enumerate(load.batches))
    live, longest = batches.get(-1 if home is None else home, (0, 0))
    batches[-1 if home is None else home] = live + rows, max(longest, context)
    [*after] = batches.values()
    alone = len(after) == 1 and after[0][0] == 1
    assert p.may_join(load, rows, context) == (alone or p.decode_seconds(*after) <= TARGET * ROOM_TO_GROW)


def test_rows_decode_with_those_of_their_length() -> None:
    """As measured on an H100: 16 rows of 400 tokens take 14 ms, one of 16,000 tokens with them makes that 52."""
    p = pacer(StepCosts(decode_base=0.001, decode_row=0.0006, decode_context=3.8e-7))
    assert p.home((), 1, 16_000) is None
    assert p.home(((16, 400),), 1, 16_000) is None
    assert p.home(((16, 400),), 1, 600) == 0
    assert p.home(((16, 400), (1, 16_000)), 1, 16_000) == 1
    assert p.home(((1, 16_000), (16, 400)), 2, 300) == 1
    assert p.home(((1, 100), (1, 1000), (1, 10_000), (1, 40_000)), 1, 20_000) == 2, "no more than four batches"
    assert p.may_join(Load(rows=16, context=400), 1, 100_000)
    assert not pacer(StepCosts(decode_context=1e-7)).may_join(Load(rows=16, context=400), 1, 1_800_000)


def test_where_a_batch_costs_most_rows_share_one() -> None:
    """As measured on two CPU cores: a pass takes 62 ms, a row 4 more and 1.6 for 100 tokens of context."""
    p = pacer(StepCosts(decode_base=0.062, decode_row=0.004, decode_context=1.6e-5))
    assert p.home(((7, 60),), 1, 900) == 0
    assert p.home(((7, 60),), 1, 2000) is None


def test_a_slow_batch_takes_nobody_in_and_its_last_row_makes_room() -> None:
    slow = pacer(StepCosts(decode_base=0.01, decode_row=0.05))
    assert [slow.may_join(Load(rows=rows, context=9), 1, 9) for rows in range(5)] == [True, True, True, False, False]
    assert pacer(StepCosts(decode_base=9)).may_join(Load(), 1, 9)


def test_beside_a_chore_a_chunk_is_prefilled_when_the_smallest_one_still_fits() -> None:
    load = Load(cohort=1, cohort_context=100)
    smallest = pacer().prefill_seconds(SMALLEST_CHUNK, 100)
    assert pacer().chunk_fits(load, TARGET - smallest - 0.001)
    assert not pacer().chunk_fits(load, TARGET - smallest + 0.001)


Planned = Callable[[Pacer], float]
Observe = Callable[[Pacer, float], None]
LEARNT: dict[str, tuple[Planned, Observe]] = {
    "decode": (lambda p: p.decode_seconds((8, 100)), lambda p, seconds: p.observe_decode(seconds, (8, 100))),
    "prefill": (lambda p: p.prefill_seconds(64, 100), lambda p, seconds: p.observe_prefill(64, 100, seconds)),
}
learnt = pytest.mark.parametrize(("planned", "observe"), LEARNT.values(), ids=LEARNT)


@learnt
@given(ratio=st.floats(0.1, 10))
def test_what_steps_really_take_is_learnt(planned: Planned, observe: Observe, ratio: float) -> None:
    p = pacer()
    real = planned(p) * ratio
    for _ in range(200):
        observe(p, real)
    assert planned(p) == pytest.approx(real, rel=1e-3)


@learnt
def test_what_took_longer_is_believed_sooner_and_a_hiccup_is_no_lesson(planned: Planned, observe: Observe) -> None:
    slower, faster, hiccup = pacer(), pacer(), pacer()
    usual = planned(pacer())
    observe(slower, 1.5 * usual)
    observe(faster, 0.5 * usual)
    observe(hiccup, 100 * usual)
    assert planned(slower) == pytest.approx(usual * (1 + 0.5 * UP))
    assert planned(faster) == pytest.approx(usual * (1 - 0.5 * DOWN))
    assert planned(hiccup) == pytest.approx(usual * (1 + UP))


@learnt
def test_a_step_of_no_time_teaches_nothing_and_calibration_forgets(planned: Planned, observe: Observe) -> None:
    p = pacer()
    usual = planned(p)
    observe(p, 0.0)
    assert planned(p) == usual
    observe(p, 3 * usual)
    p.calibrate(COSTS)
    assert planned(p) == usual


H100 = StepCosts(decode_base=0.00303, decode_row=0.000104, decode_context=1.26e-7, prefill_token=3.5e-5)


def test_what_context_costs_is_not_unlearnt_from_steps_in_which_it_is_hidden() -> None:
    """Seen on an H100: launching takes 7 ms, whatever the rows and their contexts, until attention takes longer."""
    p = pacer(H100)
    for _ in range(300):
        for batch in ((1, 200), (16, 170), (8, 1000), (8, 2000), (32, 250)):
            p.observe_decode(0.007, batch)
    assert p.decode_seconds((16, 170)) == pytest.approx(0.007, rel=0.3)
    assert p.home(((16, 170),), 1, 13_800) is None, "beside it 16 rows would take five times as long"
    assert p.home(((16, 170),), 1, 400) == 0


def test_context_that_costs_less_than_was_measured_is_believed_where_it_has_most_of_the_step() -> None:
    p = pacer(replace(H100, decode_context=100 * H100.decode_context))  # measured beside other work
    assert p.home(((16, 170),), 1, 500) is None
    for _ in range(100):
        p.observe_decode(0.008, (8, 1000))
    assert p.decode_seconds((8, 1000)) == pytest.approx(0.008, rel=0.1)
    assert p.home(((16, 170),), 1, 500) == 0


def test_a_chunk_that_is_not_typical_is_a_turn_and_no_lesson() -> None:
    p = pacer()
    p.observe_prefill(64, 100, 9.0, typical=False)
    assert p.prefill_seconds(64, 100) == pacer().prefill_seconds(64, 100)
    assert p.plan(Load(rows=94, context=100, cohort=1)) == StepPlan(decode=True, launch=False)


def test_each_kind_of_work_is_learnt_by_itself() -> None:
    for kind, (planned, observe) in LEARNT.items():
        p = pacer()
        observe(p, 2 * planned(p))
        assert {name for name, (other, _) in LEARNT.items() if other(p) != other(pacer())} == {kind}


def test_slow_chunks_shrink_the_next_one() -> None:
    p = pacer()
    for _ in range(20):
        p.observe_prefill(128, 0, 0.6)
    assert p.plan(Load(cohort=1)).chunk == 32


def test_where_a_small_chunk_costs_what_a_large_one_does_the_prompt_gets_on() -> None:
    """Seen on a GPU: 80 ms for 16 positions and 100 ms for 512; halving the chunk for ever took 94 s for 16,000."""
    p = Pacer(target=0.05, largest=LARGEST, costs=StepCosts(prefill_base=0.005, prefill_token=4e-5))
    chunks = []
    for _ in range(40):
        plan = p.plan(Load(rows=16, context=1000, cohort=1))
        chunks.append(plan.chunk)
        if plan.decode:
            p.observe_decode(0.001, (16, 1000))
        if plan.chunk:
            p.observe_prefill(plan.chunk, 0, 0.08 + plan.chunk * 4e-5)
    assert max(chunks[-4:]) >= 512


def test_a_step_is_brief_by_what_it_was_seen_to_take() -> None:
    found = pacer(StepCosts(decode_base=0.001, decode_row=0.0001))
    assert found.brief((8, 100))
    assert not found.brief(), "who joins in this step may take long"
    for _ in range(20):
        found.observe_decode(0.1, (8, 100))
    assert not found.brief((8, 100))
    assert not found.brief((8, 100), (1, 4000))


def test_copies_get_an_eighth_of_the_target_beside_rows_that_take_half_of_it() -> None:
    p = pacer()
    assert p.copies_until(10.0, 10.0) == 10.0 + TARGET / 2
    assert p.copies_until(10.0, 10.0 + 0.3 * TARGET) == 10.0 + TARGET / 2
    assert p.copies_until(10.0, 10.0 + 0.6 * TARGET) == pytest.approx(10.0 + 0.725 * TARGET)
    assert p.copies_until(10.0, 10.0 + 0.75 * TARGET) == pytest.approx(10.0 + 0.8 * TARGET)


def test_company_is_worth_waiting_for_where_a_prefill_costs_more_than_its_positions() -> None:
    p = pacer(StepCosts(prefill_base=0.015, prefill_token=1e-5))
    assert p.patience(500) == pytest.approx(0.01)
    assert p.patience(1500) == pytest.approx(0.0)
    assert p.patience(8000) == 0.0
    for _ in range(50):
        p.observe_prefill(64, 0, 0.001)
    assert p.patience(500) == 0.0, "as they are seen to be"
