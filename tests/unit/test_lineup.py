"""How many rows are handed to the backend: about as many as it begins with at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from service.engine.lineup import Lineup


@dataclass
class Standing:
    phase: str = "queue"


@dataclass
class Beginning:
    """A backend that begins with up to `at_a_time` rows in each step, and 32 requests that wait for it."""

    at_a_time: int
    most: int = 8
    waiting: int = 32
    rows: list[Standing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lineup = Lineup(self.most)

    def turn(self, *, busy: bool = False) -> int:
        """Hand over, then step; returns with how many rows the step began."""
        room = self.lineup.room(cast("list[Any]", self.rows), self.waiting, busy=busy)
        handed = min(room, self.waiting)
        self.lineup.handed_over(handed)
        self.waiting -= handed
        for row in self.rows:
            row.phase = "decode" if row.phase == "prefill" else row.phase
        self.rows += [Standing() for _ in range(handed)]
        begun = [row for row in self.rows if row.phase == "queue"][: self.at_a_time]
        for row in begun:
            row.phase = "prefill"
        return len(begun)

    def stalled(self) -> bool:
        return self.lineup.stalled

    @property
    def standing(self) -> int:
        return sum(row.phase == "queue" for row in self.rows)


def test_what_a_cohort_leaves_over_is_joined_by_the_next_rows() -> None:
    """Seven of eight fit into a chunk: the eighth was prefilled alone, and every second cohort was of one row."""
    backend = Beginning(at_a_time=7)
    assert [backend.turn() for _ in range(5)] == [7, 7, 7, 7, 4]


def test_one_at_a_time_is_offered_two() -> None:
    backend = Beginning(at_a_time=1)
    backend.turn()
    while backend.standing > 1:
        backend.turn()
    for _ in range(20):
        assert backend.turn() == 1
        assert backend.standing <= 1


def test_a_single_request_does_not_make_the_next_burst_slow() -> None:
    backend = Beginning(at_a_time=8, waiting=1)
    assert [backend.turn(), backend.turn()] == [1, 0]
    backend.waiting = 32
    assert backend.turn() == 8


def test_who_waits_without_need_gets_no_company_until_it_has_begun() -> None:
    backend = Beginning(at_a_time=1, waiting=2)
    backend.turn()
    backend.at_a_time = 0
    backend.turn()
    assert not backend.stalled()  # a prompt was being prefilled
    backend.waiting = 10
    backend.turn()
    assert backend.stalled()
    assert backend.standing <= 8
    standing = backend.standing
    for _ in range(3):
        backend.turn()
    assert (backend.standing, backend.stalled()) == (standing, True)
    backend.at_a_time = 1
    assert [backend.turn() for _ in range(4)] == [1, 1, 1, 1]
    assert not backend.stalled()
    assert backend.standing <= 1


def test_copies_are_no_reason_to_wait() -> None:
    backend = Beginning(at_a_time=0)
    for _ in range(3):
        backend.turn(busy=True)
    assert not backend.stalled()
    backend.turn()
    assert backend.stalled()


def test_who_is_held_is_not_handed_over_until_there_are_enough_for_a_cohort() -> None:
    backend = Beginning(at_a_time=8, waiting=7)
    backend.lineup.held = True
    assert not backend.lineup.due(7)
    assert backend.turn() == 0
    backend.waiting += 1
    assert backend.lineup.due(8)
    assert backend.turn() == 8
    backend.waiting = 1
    assert backend.turn() == 0
    backend.lineup.held = False
    assert backend.turn() == 1
    assert not backend.lineup.due(0)
