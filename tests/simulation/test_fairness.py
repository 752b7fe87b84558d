"""Fairness on the real worker: steps are counted, so every figure here is exact."""

from __future__ import annotations

import itertools

import pytest

from service.engine.backend import StepResult
from service.engine.generation import Generation
from tests.timed import ByHand, TimedBackend


def started(generation: Generation) -> bool:
    return generation.meter.prefill_at is not None


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("arrives", [3, 50, 171])
def test_two_hundred_waiting_requests_delay_one_of_another_by_no_more_than_the_batch(rows: int, arrives: int) -> None:
    hand = ByHand(TimedBackend(chunk_alone=64), max_rows=rows)
    flood = [hand.submit("flood", prompt=64, max_tokens=40) for _ in range(200)]
    hand.turn(arrives)
    polite = hand.submit("polite", prompt=64, max_tokens=40)
    batch = [hand.worker._jobs[uid].generation for uid in hand.worker._admission.running_uids()]
    assert len(batch) == rows
    unread = sum(not generation.meter.completion_tokens for generation in batch)
    most = unread + min(40 - generation.meter.completion_tokens for generation in batch)
    taken = hand.turns_until(lambda: started(polite))
    ahead = [generation for generation in flood if started(generation) and not generation.finished]
    assert all(generation in batch for generation in ahead), "nobody who waited before it began before it"
    print(f"{rows} rows, {arrives} steps in: begun {taken} steps later; the batch had {most} left")
    assert taken <= most + 1
    hand.finish()


def test_first_come_within_a_principal() -> None:
    hand = ByHand(TimedBackend(), max_rows=2)
    mine = [hand.submit("a", prompt=4, max_tokens=tokens) for tokens in (9, 1, 5, 2, 7, 1)]
    hand.submit("b", prompt=4, max_tokens=30)
    hand.finish()
    begins = [generation.meter.prefill_at for generation in mine]
    assert begins == sorted(begins, key=lambda at: at or 0)


@pytest.mark.parametrize(("heavy", "light"), [(4.0, 1.0), (1.0, 0.25), (100.0, 25.0)])
@pytest.mark.parametrize("sizes", [((64, 40), (64, 40)), ((200, 5), (8, 90))])
def test_weights_of_four_to_one_are_tokens_of_four_to_one(
    heavy: float, light: float, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """At every step of a saturated engine, within the bound of the paper's theorem 4.8: twice the larger of a prompt
    and what a batch may hold, here as shares of the weights."""
    hand = ByHand(TimedBackend(), max_rows=4, max_queue=5000)
    rows = [
        [hand.submit(name, prompt=prompt, max_tokens=output, weight=weight) for _ in range(500)]
        for name, weight, (prompt, output) in (("heavy", heavy, sizes[0]), ("light", light, sizes[1]))
    ]
    most = max(prompt + output for prompt, output in sizes) * 4
    given = [0, 0]
    for _ in range(3000):
        hand.turn()
        given = [hand.served(generations) for generations in rows]
        assert abs(given[0] / 4 - given[1]) <= 2 * most
    print(f"weights {heavy}:{light}, sizes {sizes}: {given[0]} and {given[1]} tokens, {given[0] / given[1]:.2f} to 1")
    assert any(not generation.meter.tokens for generation in rows[0]), "both had rows waiting all the time"
    assert given[0] / given[1] == pytest.approx(4, rel=0.1)


def test_the_least_weight_beside_the_greatest_is_slow_but_not_starved() -> None:
    hand = ByHand(TimedBackend(), max_rows=1, max_queue=2000)
    least = [hand.submit("least", prompt=4, max_tokens=4, weight=0.01) for _ in range(2)]
    tokens = itertools.count()
    for _ in tokens:
        if least[-1].finished:
            break
        if hand.worker.waiting < 5:
            for _ in range(50):
                hand.submit("greatest", prompt=64, max_tokens=64, weight=100.0)
        hand.turn()
    # Eight tokens at 0.01 weigh as much as 80 000 at 100; a step gives the greatest at least one.
    assert next(tokens) < 80_000


def test_rows_of_one_request_count_one_by_one() -> None:
    hand = ByHand(TimedBackend(), max_rows=4, max_queue=1000)
    many = [row for _ in range(25) for row in hand.submit_rows(8, "many", prompt=16, max_tokens=16)]
    single = [hand.submit("single", prompt=16, max_tokens=16) for _ in range(200)]
    hand.turn(1500)
    given = hand.served(many), hand.served(single)
    assert hand.worker.waiting
    assert given[0] == pytest.approx(given[1], abs=2 * 4 * 32)


def test_the_prefix_cache_s_share_of_a_prompt_is_not_charged() -> None:
    hand = ByHand(TimedBackend(cached=lambda row: 90 if row.tenant == "warm" else 0), max_rows=2, max_queue=1000)
    warm = [hand.submit("warm", prompt=100, max_tokens=10, tenant="warm") for _ in range(300)]
    cold = [hand.submit("cold", prompt=100, max_tokens=10) for _ in range(300)]
    hand.turn(900)
    computed = [
        sum(generation.meter.tokens - generation.meter.cached_tokens for generation in generations)
        for generations in (warm, cold)
    ]
    assert hand.worker.waiting
    assert computed[0] == pytest.approx(computed[1], abs=2 * 2 * 110)
    assert computed[0] > 2500


@pytest.mark.parametrize("most_rows", [1, 4])
def test_who_arrives_is_not_behind_rows_that_the_backend_has_and_may_not_begin(most_rows: int) -> None:
    """Admission has 32 places, but steps of more than `most_rows` rows would be too long."""
    hand = ByHand(TimedBackend(most_rows=most_rows), max_rows=32)
    flood = [hand.submit("flood", prompt=64, max_tokens=40) for _ in range(200)]
    hand.turns_until(lambda: sum(generation.finished for generation in flood) >= 20)
    polite = hand.submit("polite", prompt=64, max_tokens=40)
    begun = sum(started(generation) for generation in flood)
    hand.turns_until(lambda: started(polite))
    before = sum(started(generation) for generation in flood) - begun
    print(f"{most_rows} rows decode together: {before} of the flood began before the polite one")
    assert before <= 2
    hand.finish()


def test_of_prompts_that_the_backend_takes_one_at_a_time_two_stand_there_at_most() -> None:
    hand = ByHand(TimedBackend(), max_rows=32, max_prefill_rows=8)
    generations = [hand.submit("a", prompt=600, max_tokens=400) for _ in range(20)]
    handed = []
    for _ in range(250):
        hand.turn()
        handed.append(len(hand.backend.rows))
    assert [number for number, before in itertools.pairwise([*handed, 0]) if number != before] == [8, *range(9, 21)]
    assert not hand.worker._lineup.stalled
    for generation in generations:
        generation.close()
    hand.turn()


def test_copies_that_the_backend_makes_are_no_reason_to_hand_over_less() -> None:
    class Copying(TimedBackend):
        """Begins with no prompt for the first three steps."""

        def step(self) -> StepResult:
            self.busy = self.steps < 3
            self.most_rows = 0 if self.busy else 1000
            return super().step()

    hand = ByHand(Copying(busy=True), max_rows=32, max_prefill_rows=8)
    for _ in range(20):
        hand.submit("a", prompt=600, max_tokens=4)
    for _ in range(5):
        hand.turn()
        assert not hand.worker._lineup.stalled
    hand.finish()
