"""The expected wait: exact where costs are known, calibrated where they are learnt, and what it refuses."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from service.engine.admission import Queues, Ticket
from service.engine.backend import StepResult
from service.engine.expected_wait import Line, Progress, Replay
from service.engine.foresight import Foreseen
from service.engine.generation import Generation, Usage
from service.engine.rates import FAMILIAR, DecodeCost, Pace, Rates
from service.errors import DeadlineExceeded, DeadlineTooShort, DeadlineUnreachable, QueueFull, ServiceError
from tests.fakes import EOS, letters
from tests.timed import ByHand, TimedBackend

PACE = Pace(prefill=0.01, decode_base=0.1, decode_row=0.0, chunk=50.0, computed=1.0, longest=math.inf, used=0.5)


def ticket(uid: int, *, principal: str = "p", prompt: int = 100, output: int = 20, **more: Any) -> Ticket:
    return Ticket(
        uid=uid,
        principal=principal,
        prompt_tokens=prompt,
        length=prompt + output,
        deadline=more.pop("deadline", None),
        **more,
    )


def replay(
    tickets: Sequence[Ticket],
    *,
    places: int = 1,
    running: Sequence[Progress] = (),
    served: dict[str, float] | None = None,
    pace: Pace = PACE,
) -> Replay:
    waiting: dict[str, list[Ticket]] = {}
    for each in tickets:
        waiting.setdefault(each.principal, []).append(each)
    counters = dict.fromkeys([*waiting, *(row.principal for row in running)], 0.0)
    return Replay(Line(places, running, Queues(waiting, {**counters, **(served or {})})), pace)


# -- the replay -----------------------------------------------------------------------------------------------


def test_alone_it_is_the_prompt_and_one_step() -> None:
    assert replay([ticket(1)]).in_time([ticket(1)], 0) == pytest.approx(100 * 0.01 + 0.1)


def test_behind_a_row_that_decodes_it_is_half_of_what_that_one_may_still_say() -> None:
    running = [Progress("q", 1.0, prompt=0, output=20)]
    assert replay([ticket(1)], running=running).in_time([ticket(1)], 0) == pytest.approx(10 * 0.1 + 1.0 + 0.1)


def test_beside_rows_that_decode_a_prompt_takes_a_decode_step_for_each_chunk() -> None:
    running = [Progress("q", 1.0, prompt=0, output=200)]
    found = replay([ticket(1)], running=running, places=2).in_time([ticket(1)], 0)
    assert found == pytest.approx(1.0 + 2 * 0.1 + 0.1)


def test_prompts_are_read_one_after_the_other() -> None:
    running = [Progress("q", 1.0, prompt=30, output=20)]
    found = replay([ticket(1)], running=running, places=2).in_time([ticket(1)], 0)
    assert found == pytest.approx(0.3 + 1.0 + 2 * 0.1 + 0.1)


def test_of_one_request_s_rows_the_last_one_counts() -> None:
    rows = [ticket(1), ticket(2)]
    # The first reads for 1 s and says ten tokens, one of them beside each chunk of no one: then the second.
    assert replay(rows).in_time(rows, 0) == pytest.approx(1.0 + 10 * 0.1 + 1.0 + 0.1)


@pytest.mark.parametrize(
    ("served", "weight", "before"),
    [(0.0, 1.0, 1), (1000.0, 1.0, 0), (108.0, 1.0, 1), (108.0, 0.5, 1), (107.5, 100.0, 2), (-1000.0, 1.0, 3)],
)
def test_the_order_is_the_fair_one(served: float, weight: float, before: int) -> None:
    """How many of a flood's rows come first depends on what both were served, and on the flood's weight."""
    flood = [ticket(uid, principal="flood", weight=weight) for uid in range(3)]
    mine = ticket(9, principal="mine")
    found = replay([*flood, mine], served={"flood": served, "mine": 109.0 if served else 0.0})
    assert found.in_time([mine], 0) == pytest.approx(before * (1.0 + 1.0) + 1.0 + 0.1)


def test_until_there_is_room_rows_must_leave() -> None:
    running = [Progress("q", 1.0, prompt=0, output=20), Progress("q", 1.0, prompt=0, output=40)]
    assert replay([ticket(1)], running=running, places=2).until(lambda r: r.waiting == 0) == pytest.approx(
        10 * 0.1 + 1.2
    )
    assert replay([], running=running, places=2).until(lambda r: r.running == 0) == pytest.approx(20 * 0.1)


def test_a_deadline_before_the_expected_moment_is_refused_with_the_difference() -> None:
    running = [Progress("q", 1.0, prompt=0, output=200)]
    mine = ticket(1, deadline=50 + 4.0)
    with pytest.raises(DeadlineUnreachable) as refused:
        replay([mine], running=running).in_time([mine], 50)
    assert refused.value.retry_after == pytest.approx(100 * 0.1 + 1.0 + 0.1 - 4.0)
    assert refused.value.should_retry is True
    mine = ticket(1, deadline=50 + 11.2)
    assert replay([mine], running=running).in_time([mine], 50) == pytest.approx(11.1)


def test_a_deadline_before_the_end_of_its_own_prompt_can_never_be_met() -> None:
    rows = [ticket(1, prompt=1, deadline=0.9), ticket(2, deadline=0.9)]
    with pytest.raises(DeadlineTooShort) as refused:
        replay(rows, places=8).in_time(rows, 0)
    assert refused.value.should_retry is False
    assert refused.value.status == 400


# -- the rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "rows", "expected"),
    [
        ([(1, 0.1)], 32, 0.1),  # nothing is said of what was not seen: optimistic
        ([(8, 0.1), (8, 0.2)], 8, 0.15),
        ([(1, 0.11), (4, 0.14), (2, 0.12)], 8, 0.18),
        ([(1, 0.1), (2, 0.9)], 100, 50 * 1.0),  # a line through noise would go far beyond proportional
        ([(1, 0.9), (2, 0.1)], 100, 0.5),  # more rows are never quicker
    ],
)
def test_decode_is_a_line_between_flat_and_proportional(
    seen: list[tuple[int, float]], rows: int, expected: float
) -> None:
    cost = DecodeCost()
    for size, seconds in seen:
        cost.add(size, seconds)
    line = cost.line()
    assert line is not None
    base, slope = line
    assert base >= 0
    assert slope >= 0
    assert base + rows * slope == pytest.approx(expected, rel=0.35)


def test_nothing_is_known_before_a_prompt_a_token_and_an_end() -> None:
    rates = Rates()
    assert rates.pace() is None
    rates.step(StepResult(prefill_tokens=10, prefill_seconds=0.5), 1.0)
    assert rates.pace() is None
    rates.step(StepResult(decode_rows=2, decode_seconds=0.1), 0.2)
    assert rates.pace() is None
    rates.ended(Usage(prompt_tokens=10, completion_tokens=5, cached_tokens=4), 20)
    assert rates.pace() == Pace(
        prefill=0.1,
        decode_base=0.2,
        decode_row=0.0,
        chunk=math.inf,
        computed=0.6,
        longest=FAMILIAR * 6,
        used=0.25,
    )


def test_a_step_s_time_is_divided_as_the_backend_timed_it_and_copies_are_the_newcomers() -> None:
    rates = Rates()
    rates.ended(Usage(prompt_tokens=1, completion_tokens=1), 1)
    rates.step(StepResult(prefill_tokens=30, prefill_seconds=0.3, decode_rows=4, decode_seconds=0.1), 0.8)
    rates.step(StepResult(), 0.1)
    pace = rates.pace()
    assert pace is not None
    assert pace.decode(4) == pytest.approx(0.2)
    assert pace.prefill == pytest.approx((0.98 * 0.6 + 0.1) / (0.98 * 30))
    assert pace.chunk == 30
    rates.step(StepResult(overlaps=True), 0.1)  # the next tokens were launched
    assert rates.pace() == pace
    rates.step(StepResult(copies=1, overlaps=True), 0.1)
    assert rates.pace() != pace


def test_of_a_prompt_what_the_prefix_cache_had_of_others_is_not_computed() -> None:
    rates = Rates()
    assert rates.to_compute(1000) == 1000
    rates.ended(Usage(prompt_tokens=100, completion_tokens=1, cached_tokens=90), 1)
    assert rates.to_compute(1000) == 100


def test_where_steps_decode_and_prefill_in_turn_chunks_are_seen_all_the_same() -> None:
    rates = Rates()
    rates.ended(Usage(prompt_tokens=1, completion_tokens=1), 1)
    rates.step(StepResult(prefill_tokens=500, prefill_seconds=0.3), 0.3)  # nothing decoded yet
    for _ in range(3):
        rates.step(StepResult(decode_rows=4, decode_seconds=0.1), 0.1)
        rates.step(StepResult(prefill_tokens=20, prefill_seconds=0.3), 0.3)
    pace = rates.pace()
    assert pace is not None
    assert pace.chunk == pytest.approx(20)
    assert pace.reading(4) == pytest.approx(pace.prefill + 0.1 / 20)


def test_after_tiny_prompts_a_long_one_is_not_judged_by_their_overhead() -> None:
    rates = Rates()
    for _ in range(20):
        rates.step(StepResult(prefill_tokens=4, prefill_seconds=0.02), 0.02)
        rates.step(StepResult(decode_rows=1, decode_seconds=0.01), 0.01)
        rates.ended(Usage(prompt_tokens=4, completion_tokens=4), 4)
    pace = rates.pace()
    assert pace is not None
    assert pace.alone(10_000) < 0.1


def test_steps_without_time_teach_nothing() -> None:
    rates = Rates()
    rates.ended(Usage(prompt_tokens=1, completion_tokens=1), 1)
    rates.step(StepResult(prefill_tokens=5, decode_rows=1), 0.0)
    assert rates.pace() is None


# -- in the worker --------------------------------------------------------------------------------------------


def warm(hand: ByHand, *, used: int = 40) -> None:
    """One request that teaches the rates: it uses all of its `max_tokens`."""
    hand.submit(prompt=200, max_tokens=used)
    hand.finish()


def test_before_anything_is_known_nobody_is_refused() -> None:
    hand = ByHand(TimedBackend(), max_rows=1)
    generations = [hand.submit(timeout=1e-6) for _ in range(50)]
    assert all(generation.meter.expected_at is None for generation in generations)
    hand.finish()


def test_with_constant_costs_the_estimate_is_within_a_step_or_two() -> None:
    hand = ByHand(TimedBackend(), max_rows=2)
    warm(hand)
    generations = [hand.submit(prompt=200, max_tokens=40) for _ in range(10)]
    hand.turn(7)
    generations += [hand.submit("other", prompt=100, max_tokens=40) for _ in range(3)]
    hand.finish()
    for generation in generations:
        expected, real = generation.meter.expected_at, generation.meter.first_token_at
        assert expected is not None
        assert real is not None
        wait = real - generation.meter.submitted_at
        # Those of one come first here although the other's arrival was not foreseen.
        if generation.request.principal == "other":
            assert expected - generation.meter.submitted_at == pytest.approx(wait, rel=0.15, abs=0.05)


def test_what_cannot_begin_in_time_is_refused_at_once_and_fits_when_told() -> None:
    hand = ByHand(TimedBackend(), max_rows=1)
    warm(hand)
    for _ in range(30):
        hand.submit(prompt=200, max_tokens=40)
    waiting = hand.worker.waiting
    with pytest.raises(DeadlineUnreachable) as refused:
        hand.submit(prompt=200, max_tokens=40, timeout=5.0)
    assert hand.worker.waiting == waiting
    told = refused.value.retry_after
    assert told is not None
    assert told > 5
    back = hand.clock.now + told
    hand.turns_until(lambda: hand.clock.now >= back - 0.5)
    with pytest.raises(DeadlineUnreachable):
        hand.submit(prompt=200, max_tokens=40, timeout=5.0)
    hand.turns_until(lambda: hand.clock.now >= back + 0.5)
    again = hand.submit(prompt=200, max_tokens=40, timeout=5.0)
    hand.turns_until(lambda: again.meter.first_token_at is not None)
    hand.finish()


def test_who_has_waited_less_is_let_in_where_another_is_refused() -> None:
    hand = ByHand(TimedBackend(), max_rows=1)
    warm(hand)
    for _ in range(30):
        hand.submit("flood", prompt=200, max_tokens=40)
    hand.turn(20)
    with pytest.raises(DeadlineUnreachable):
        hand.submit("flood", prompt=200, max_tokens=40, timeout=2.0)
    polite = hand.submit("polite", prompt=200, max_tokens=40, timeout=2.0)
    hand.turns_until(lambda: polite.meter.first_token_at is not None)
    hand.finish()


def test_a_prompt_longer_than_the_deadline_is_the_clients_error_on_an_idle_engine_too() -> None:
    hand = ByHand(TimedBackend(), max_rows=4)
    warm(hand)
    with pytest.raises(DeadlineTooShort):
        hand.submit(prompt=600, timeout=0.5)
    hand.submit(prompt=600, timeout=0.8)
    hand.finish()


def test_a_full_queue_says_when_there_will_be_room() -> None:
    hand = ByHand(TimedBackend(), max_rows=2, max_queue=5)
    for _ in range(7):
        hand.submit()
    with pytest.raises(QueueFull) as refused:
        hand.submit()
    assert refused.value.retry_after == 1.0, "nothing is known yet"
    hand.finish()
    warm(hand)
    while hand.worker.waiting < 7:
        hand.submit(prompt=200, max_tokens=100)
    hand.turn(6)
    while hand.worker.waiting < 5:
        hand.submit(prompt=200, max_tokens=100)
    for rows in (1, 3):
        with pytest.raises(QueueFull) as refused:
            hand.submit_rows(rows, "another")
        told = refused.value.retry_after
        began = hand.clock.now
        hand.turns_until(lambda rows=rows: hand.worker.waiting <= 5 - rows)  # type: ignore[misc]
        print(f"room for {rows}: told {told:.2f} s, was {hand.clock.now - began:.2f} s")
        assert told == pytest.approx(hand.clock.now - began, rel=0.3)
        while hand.worker.waiting < 5:
            hand.submit(prompt=200, max_tokens=100)
    with pytest.raises(QueueFull) as refused:
        hand.submit_rows(8)
    assert refused.value.should_retry is False, "more rows than would ever be taken"
    hand.finish()


def test_after_a_lost_step_nobody_runs_and_there_is_still_an_estimate() -> None:
    class Losing(TimedBackend):
        lost = False

        def step(self) -> StepResult:
            if self.lost:
                self.lost = False
                raise RuntimeError("lost")
            return super().step()

    backend = Losing(most_rows=1)
    hand = ByHand(backend, max_rows=8)
    warm(hand)
    for _ in range(4):
        hand.submit(prompt=200, max_tokens=40)
    hand.turns_until(lambda: hand.worker._lineup.stalled)
    backend.lost = True
    hand.turn()
    assert hand.worker.running == 0
    assert hand.submit(prompt=200, max_tokens=40).meter.expected_at is not None
    hand.finish()


# -- calibration ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One request of a mix: seconds that were expected and that it took, and the deadline it would have had."""

    expected: float
    real: float
    deadline: float


def mixed(
    hand: ByHand, rng: random.Random, requests: int, submit: Callable[[dict[str, Any]], None], principals: int = 8
) -> None:
    """Bursts and lulls of short and long requests by principals of three weights."""
    due = hand.clock.now
    for number in range(requests):
        due += rng.expovariate(6.0 if number // 100 % 2 else 1.5)
        while hand.clock.now < due:
            if hand.worker._jobs:
                hand.turn()
            else:
                hand.clock.now = due
        who = min(int(rng.expovariate(0.5)), principals - 1)
        submit(
            {
                "principal": f"p{who}",
                "weight": (1.0, 4.0, 0.5)[who % 3],
                "prompt": min(3000, int(rng.lognormvariate(4.5, 1.2)) + 1),
                "max_tokens": rng.choice([16, 64, 256, 256]),
                "timeout": rng.choice([1.0, 5.0, 20.0, 60.0]),
            }
        )
    hand.finish()


def uncertain(seed: int) -> ByHand:
    """Steps vary by a third; a row ends by itself anywhere between its first token and twice its limit."""
    rng = random.Random(seed)
    ends: dict[int, int] = {}

    def script(row: Any, index: int) -> int:
        last = ends.setdefault(row.uid, rng.randrange(1, 2 * row.max_tokens))
        return EOS if index >= last else letters(row, index)

    backend = TimedBackend(script=script, noise=lambda: rng.uniform(0.7, 1.3), prefill_token=0.0005)
    return ByHand(backend, max_rows=8, max_queue=100_000)


@pytest.mark.parametrize(("principals", "tolerated"), [(1, 0.0), (8, 0.02)])
def test_predicted_against_real_waits_of_a_mix(principals: int, tolerated: float) -> None:
    """Nobody is refused here; what would have been is judged by what then came of it.

    With one principal nobody overtakes, and no decision is wrong by a factor of two. With eight, who comes later and
    was served less goes first, which nobody can foresee.
    """
    seen: list[Seen] = []
    for seed in range(3):
        hand = uncertain(seed)
        made: list[tuple[Generation, float]] = []

        def submit(fields: dict[str, Any], hand: ByHand = hand, made: list[tuple[Generation, float]] = made) -> None:
            timeout = fields.pop("timeout")
            made.append((hand.submit(**fields), timeout))

        mixed(hand, random.Random(seed), 500, submit, principals)
        for generation, timeout in made:
            meter = generation.meter
            if meter.expected_at is not None and meter.first_token_at is not None:
                expected, real = meter.expected_at - meter.submitted_at, meter.first_token_at - meter.submitted_at
                seen.append(Seen(expected, real, timeout))
    ratios = sorted(each.expected / each.real for each in seen)
    p5, p50, p95 = (ratios[int(len(ratios) * share)] for share in (0.05, 0.5, 0.95))
    refused = [each for each in seen if each.expected > each.deadline]
    accepted = [each for each in seen if each.expected <= each.deadline]
    wrong = [each for each in refused if 2 * each.real <= each.deadline]
    late = [each for each in accepted if each.real >= 2 * each.deadline]
    print(
        f"\n{principals} principals, expected / real of {len(seen)} requests: p5 {p5:.2f}, median {p50:.2f}, "
        f"p95 {p95:.2f}; real waits median "
        f"{statistics.median(each.real for each in seen):.2f} s, longest {max(each.real for each in seen):.1f} s; of "
        f"{len(refused)} that would be refused {len(wrong)} would have made it in half of their time; of "
        f"{len(accepted)} accepted {len(late)} would have needed twice theirs"
    )
    assert 0.5 <= p50 <= 2
    assert len(wrong) <= tolerated * len(seen)
    assert len(late) <= tolerated * len(seen)


def test_with_deadlines_in_force_hardly_anybody_times_out_in_the_queue() -> None:
    late, refused, total = 0, 0, 0
    for seed in range(3):
        hand = uncertain(seed)
        made: list[Generation] = []
        errors: list[ServiceError] = []

        def submit(
            fields: dict[str, Any],
            hand: ByHand = hand,
            made: list[Generation] = made,
            errors: list[ServiceError] = errors,
        ) -> None:
            try:
                made.append(hand.submit(**fields))
            except (DeadlineUnreachable, DeadlineTooShort) as error:
                errors.append(error)

        mixed(hand, random.Random(seed), 500, submit)
        ends = [generation.last.error for generation in made if generation.last is not None]
        late += sum(isinstance(end, DeadlineExceeded) and end.phase != "decode" for end in ends)
        refused += len(errors)
        total += len(made) + len(errors)
    print(f"\n{total} requests: {refused} refused at once, {late} accepted and out of time before their first token")
    assert refused > 0
    assert late <= 0.05 * total


def test_the_wait_behind_a_long_queue_takes_two_events_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    hand = ByHand(TimedBackend(), max_rows=32, max_queue=400)
    warm(hand)
    for number in range(32 + 256):
        hand.submit(f"p{number % 20}", prompt=200, max_tokens=40)
    hand.turn(40)
    last = ticket(10**6, principal="p1")
    taken = []
    for _ in range(50):
        hand.worker._foresight._seen.clear()
        began = time.perf_counter()
        hand.worker._foresight.wait([last], hand.clock.now)
        taken.append(time.perf_counter() - began)
    rows = hand.worker.waiting + hand.worker.running
    print(f"\nexpected wait, {hand.worker.waiting} rows waiting: median {statistics.median(taken) * 1e6:.0f} us")
    assert statistics.median(taken) < 0.05, "traced for coverage, and on a busy machine"
    events: list[int] = []
    advance = Replay.advance

    def counted(replay: Replay) -> int:
        events.append(advance(replay))
        return events[-1]

    monkeypatch.setattr(Replay, "advance", counted)
    hand.worker._foresight._seen.clear()
    hand.worker._foresight.wait([last], hand.clock.now)
    assert rows / 2 < len(events) <= 2 * (rows + 1)
    monkeypatch.undo()
    hand.finish()


@pytest.mark.parametrize("principals", [1, 5])
def test_who_joins_a_long_line_is_told_what_was_found_for_those_before(
    monkeypatch: pytest.MonkeyPatch, principals: int
) -> None:
    """A replay for one in thirty, say, and hardly another answer than its own would give."""
    hand = ByHand(TimedBackend(), max_rows=8, max_queue=2000)
    warm(hand)
    for number in range(640):
        hand.submit(f"p{number % principals}", prompt=200, max_tokens=40)
    hand.turn(20)
    foresight, made = hand.worker._foresight, 0
    begin = Replay.__post_init__

    def counted(replay: Replay) -> None:
        nonlocal made
        made += 1
        begin(replay)

    monkeypatch.setattr(Replay, "__post_init__", counted)
    foresight._seen.clear()
    told = []
    for number in range(200):
        principal = f"p{number % principals}"
        told.append(foresight.wait([ticket(10**6, principal=principal, prompt=200, output=40)], hand.clock.now))
        hand.submit(principal, prompt=200, max_tokens=40)
    assert made <= 200 / (640 / principals / 16) + 2 * principals
    ours = foresight.wait([ticket(10**6, principal="p0", prompt=200, output=40)], hand.clock.now)
    foresight._seen.clear()
    own = foresight.wait([ticket(10**6, principal="p0", prompt=200, output=40)], hand.clock.now)
    assert ours == pytest.approx(own, rel=0.08)
    assert own is not None
    assert told[0] is not None
    assert told[0] < own, "the line has grown"
    foresight._seen.clear()
    foresight.wait([ticket(10**6, principal="p0", prompt=1, output=40)], hand.clock.now)
    long = ticket(10**6, principal="p0", prompt=2000, output=40)
    ours = foresight.wait([long], hand.clock.now)
    foresight._seen.clear()
    assert ours == pytest.approx(foresight.wait([long], hand.clock.now), rel=0.08), "its own prompt counts"
    foresight._seen.clear()
    late = ticket(10**6, principal="p0", prompt=200, output=40, deadline=hand.clock.now + own / 2)
    with pytest.raises(DeadlineUnreachable) as refused:
        foresight.wait([late], hand.clock.now)
    assert refused.value.retry_after == pytest.approx(own / 2)
    monkeypatch.undo()
    hand.finish()


def test_what_a_line_said_is_forgotten_when_it_changes_or_after_a_second() -> None:
    seen = Foreseen(at=10.0, seconds=64.0, waiting=640, mine=159)
    assert seen.then(10.5, 640, 159) == 64.0
    assert seen.then(10.5, 650, 169) == pytest.approx(68.0)
    assert seen.then(10.5, 680, 159) == 64.0
    assert seen.then(10.5, 681, 159) is None
    assert seen.then(10.5, 599, 159) is None
    assert seen.then(10.5, 640, 170) is None
    assert seen.then(11.1, 640, 159) is None


def test_a_full_queue_tells_everybody_the_same_for_a_while() -> None:
    hand = ByHand(TimedBackend(), max_rows=2, max_queue=100)
    warm(hand)
    for _ in range(102):
        hand.submit("p", prompt=50, max_tokens=20)
    hand.turn(10)
    found = []
    for _ in range(3):
        with pytest.raises(QueueFull) as full:
            hand.worker._foresight.wait([ticket(10**6)] * 20, hand.clock.now)
        found.append(full.value.retry_after)
    assert found[0] == found[1] == found[2]
    assert found[0] is not None
    hand.worker._foresight._seen.clear()
    with pytest.raises(QueueFull) as full:
        hand.worker._foresight.wait([ticket(10**6)] * 20, hand.clock.now)
    assert full.value.retry_after == found[0]
    hand.finish()
