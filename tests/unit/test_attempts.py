"""How a load is tried: once in a shell; under a supervisor with pauses, until patience is over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from service.errors import ModelTooLarge, ModelUnavailable, NotEnoughMemory
from service.supervision.attempts import ONCE, Attempts


class Stopped(Exception):
    """The service stops."""


@dataclass
class World:
    """A clock that only pauses move, and a load that fails as it is told."""

    failures: Iterator[Exception | None] = field(default_factory=lambda: iter([]))
    seconds: float = 0.0
    pauses: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    loads: int = 0
    stop_after: int = 1000

    def load(self) -> str:
        self.loads += 1
        if (failure := next(self.failures, None)) is not None:
            raise failure
        return "a model"

    def pause(self, seconds: float) -> None:
        if len(self.pauses) == self.stop_after:
            raise Stopped
        self.pauses.append(seconds)
        self.seconds += seconds

    def run(self, attempts: Callable[..., Attempts] = Attempts, **how: object) -> str:
        found = attempts(clock=lambda: self.seconds, now=lambda: 1_700_000_000 + self.seconds, **how)
        return found.run(self.load, tell=self.told.append, pause=self.pause)


def missing(times: int) -> Iterator[Exception | None]:
    return iter([ModelUnavailable("no such folder")] * times)


def test_in_a_shell_it_is_tried_once() -> None:
    world = World(missing(1))
    with pytest.raises(ModelUnavailable):
        ONCE.run(world.load, tell=world.told.append, pause=world.pause)
    assert (world.loads, world.pauses, world.told) == (1, [], [])


def test_what_is_missing_is_tried_again_with_doubling_pauses_and_a_fresh_load_each_time() -> None:
    world = World(missing(7))
    assert world.run(patience=600.0) == "a model"
    assert world.loads == 8
    assert world.pauses == [1, 2, 4, 8, 16, 30, 30]
    assert world.told[0] == "no such folder; next try at 22:13:21Z"


def test_when_patience_is_over_the_last_reason_comes_out() -> None:
    world = World(missing(1000))
    with pytest.raises(ModelUnavailable, match="no such folder"):
        world.run(patience=600.0)
    assert 600 <= world.seconds < 600 + 30


def test_a_model_that_can_never_fit_is_not_loaded_again() -> None:
    world = World(iter([ModelTooLarge("too large")]))
    with pytest.raises(ModelTooLarge):
        world.run(patience=600.0)
    assert world.loads == 1


def test_without_patience_memory_is_not_waited_for_either() -> None:
    world = World(iter([NotEnoughMemory("too little")]))
    with pytest.raises(NotEnoughMemory):
        world.run(patience=0.0)


def test_nothing_is_loaded_while_a_need_is_not_had() -> None:
    answers = itertools.chain(["the port is taken"] * 2, itertools.repeat(""))
    world = World()
    assert world.run(patience=600.0, needs=(lambda: "", lambda: next(answers))) == "a model"
    assert (world.loads, len(world.told)) == (1, 2)
    assert world.told[0].startswith("the port is taken; next try at ")


def test_after_failed_starts_it_waits_before_anything_else() -> None:
    world = World()
    assert world.run(delay=8.0, because="the last starts failed") == "a model"
    assert world.told == ["the last starts failed; loading begins at 22:13:28Z"]
    assert world.pauses == [8.0]


@pytest.mark.parametrize("delay", [0.0, 5.0])
def test_a_stop_while_it_waits_ends_it_without_a_load(delay: float) -> None:
    world = World(missing(1000), stop_after=0)
    with pytest.raises(Stopped):
        world.run(delay=delay, because="x", patience=600.0)
    assert world.loads == (0 if delay else 1)


def test_a_fault_is_not_taken_for_something_that_passes() -> None:
    world = World(iter([RuntimeError("a bug")]))
    with pytest.raises(RuntimeError):
        world.run(patience=600.0)
    assert world.loads == 1
