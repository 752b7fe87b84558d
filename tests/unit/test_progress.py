"""Busy or stuck: what counts as progress, by itself and on the worker."""

import pytest

from service.engine.backend import StepResult
from service.engine.progress import Phase, Progress
from service.errors import Draining
from tests.timed import ByHand, Clock, TimedBackend


class Barren(TimedBackend):
    """Takes a second for each step; while `barren` nothing comes of it, though rows are there."""

    barren = False

    def step(self) -> StepResult:
        self.clock.now += 1.0
        return StepResult() if self.barren else super().step()


def test_there_is_no_age_without_work() -> None:
    clock = Clock()
    progress = Progress(clock)
    clock.now += 1000
    assert (progress.age, progress.phase) == (None, Phase.IDLE)
    progress.queued()
    clock.now += 5
    assert (progress.age, progress.phase) == (5, Phase.QUEUED)
    progress.rest()
    assert progress.age is None


def test_only_progress_makes_it_young_again_not_another_phase_or_more_work() -> None:
    clock = Clock()
    progress = Progress(clock)
    progress.enter(Phase.PLANNING)
    clock.now += 3
    progress.enter(Phase.STEPPING)
    progress.queued()
    assert (progress.age, progress.phase) == (3, Phase.STEPPING)
    progress.made()
    assert progress.age == 0


def test_a_report_counts_while_it_starts_and_a_late_one_does_not() -> None:
    clock = Clock()
    progress = Progress(clock)
    for phase in (Phase.LOADING, Phase.WARMING):
        progress.enter(phase)
        clock.now += 60
        progress.reported()
        assert progress.age == 0
    progress.enter(Phase.STEPPING)
    clock.now += 60
    progress.reported()
    assert progress.age == 60


@pytest.mark.parametrize(
    "result",
    [StepResult(tokens=[None]), StepResult(failed=[None]), StepResult(prefill_tokens=1), StepResult(copies=1)],  # type: ignore[list-item]
)
def test_a_step_is_fruitful_by_a_token_a_failure_a_piece_of_prompt_or_a_copy(result: StepResult) -> None:
    assert result.fruitful
    assert not StepResult(decode_rows=3, decode_seconds=1.0).fruitful


def test_a_livelock_ages_although_steps_end() -> None:
    driven = ByHand(backend := Barren())
    driven.submit(prompt=4, max_tokens=100)
    driven.turn(3)
    assert driven.progress.age == 0
    backend.barren = True
    for turns in range(1, 30):
        driven.turn()
        assert driven.progress.age == pytest.approx(turns)
        assert driven.worker.last_step == driven.clock.now, "steps alone say nothing"
    backend.barren = False
    driven.turn()
    assert driven.progress.age == 0


def test_clients_that_give_up_one_after_the_other_do_not_hide_a_livelock() -> None:
    driven = ByHand(backend := Barren())
    backend.barren = True
    for _ in range(5):
        generation = driven.submit()
        driven.turn(4)
        generation.close()
        driven.turn()  # takes the row out, and has none in its step
        driven.progress.rest()  # as the thread does before it waits
        driven.clock.now += 1000
    driven.submit()
    assert driven.progress.age == pytest.approx(20)


def test_steps_without_rows_are_neither_progress_nor_a_livelock() -> None:
    driven = ByHand(Barren())
    for _ in range(50):
        driven.submit().close()  # gone before it ran
        driven.worker.abort_running(Draining("bye"))
        driven.turn()
        driven.progress.rest()
    driven.submit()
    assert driven.progress.age == 0


def test_an_idle_worker_has_no_age_and_one_with_a_queue_has() -> None:
    driven = ByHand(Barren())
    driven.submit(prompt=4, max_tokens=2)
    assert driven.progress.phase is Phase.QUEUED
    driven.finish()
    driven.worker.stop()
    assert not driven.worker._turn()
