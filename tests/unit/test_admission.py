"""Admission: a bounded queue, fair between principals, within memory; checked as a state machine."""

from __future__ import annotations

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from service.engine.admission import SPARE_COUNTERS, Admission, Queues, Ticket
from service.engine.memory import KV_STEP, LayerGroup, MemoryModel
from service.errors import InvalidRequest, QueueFull

MAX_ROWS = 4
MAX_QUEUE = 6
ROOMY = MemoryModel(budget=1 << 40, layers=(LayerGroup(1),))


def ticket(
    uid: int,
    *,
    principal: str = "p",
    prompt: int = 1,
    length: int = 10,
    deadline: float | None = None,
    weight: float = 1.0,
) -> Ticket:
    return Ticket(uid=uid, principal=principal, prompt_tokens=prompt, length=length, deadline=deadline, weight=weight)


def admission(*, max_queue: int = MAX_QUEUE, max_rows: int = MAX_ROWS, memory: MemoryModel = ROOMY) -> Admission:
    return Admission(max_queue=max_queue, max_rows=max_rows, memory=memory)


def test_a_full_batch_starts_even_without_a_queue() -> None:
    a = admission(max_queue=0)
    a.offer([ticket(uid) for uid in range(MAX_ROWS)])
    assert [t.uid for t in a.admit()] == list(range(MAX_ROWS))
    with pytest.raises(QueueFull):
        a.offer([ticket(99)])


def test_an_offer_is_taken_whole_or_not_at_all() -> None:
    a = admission(max_queue=1, max_rows=1)
    with pytest.raises(QueueFull) as refused:
        a.offer([ticket(uid) for uid in range(3)])
    assert a.waiting == 0
    assert refused.value.retry_after is not None


def test_what_can_never_fit_is_the_clients_error() -> None:
    tight = MemoryModel(budget=2 * (KV_STEP + 100), layers=(LayerGroup(1),))
    a = admission(memory=tight)
    with pytest.raises(InvalidRequest, match="memory"):
        a.offer([ticket(1, length=101)])
    a.offer([ticket(2, length=100)])
    assert [t.uid for t in a.admit()] == [2]


def test_what_does_not_fit_now_waits_and_is_not_overtaken() -> None:
    memory = MemoryModel(budget=4 * (KV_STEP + 100), layers=(LayerGroup(1),))
    a = admission(memory=memory)
    a.offer([ticket(1, length=100), ticket(2, length=300), ticket(3, length=10)])
    assert [t.uid for t in a.admit()] == [1]
    assert a.release(1)
    assert [t.uid for t in a.admit()] == [2]
    assert a.release(2)
    assert [t.uid for t in a.admit()] == [3]


def test_a_flood_does_not_delay_a_single_request_beyond_the_running_batch() -> None:
    a = admission(max_queue=300, max_rows=2)
    a.offer([ticket(uid, principal="flood", prompt=50) for uid in range(200)])
    assert [t.uid for t in a.admit()] == [0, 1]
    for _ in range(30):
        a.served(0, 1)
    a.offer([ticket(1000, principal="polite", prompt=50)])
    a.release(0)
    assert [t.uid for t in a.admit()] == [1000]


def test_idle_time_earns_no_credit() -> None:
    a = admission(max_queue=100, max_rows=1)
    a.offer([ticket(uid, principal="a", prompt=1000) for uid in range(3)])
    a.admit()
    a.offer([ticket(uid, principal="b", prompt=400) for uid in range(10, 16)])
    order = []
    running = 0
    for _ in range(6):
        a.release(running)
        (next_one,) = a.admit()
        running = next_one.uid
        order.append(next_one.principal)
    # b starts level with a's 1000 tokens; from zero it would have been let in first, and three times.
    assert order == ["a", "b", "b", "b", "a", "b"]


def test_a_weight_divides_what_is_charged_and_what_was_too_much_comes_back() -> None:
    a = admission(max_queue=100, max_rows=1)
    a.offer([ticket(0, principal="quarter", prompt=100, weight=0.25), ticket(1, principal="whole", prompt=100)])
    assert [t.uid for t in a.admit()] == [0]
    a.served(0, 5)
    assert a.queues().served == {"quarter": 420.0, "whole": 0.0}
    a.served(0, -100)
    assert a.queues().served["quarter"] == 20.0
    a.served(1, 7)
    assert a.queues().served["whole"] == 0.0, "only what runs is charged"


def test_the_queues_are_shown_as_an_offer_would_leave_them_and_are_not_changed_by_it() -> None:
    a = admission(max_rows=1)
    a.offer([ticket(1, principal="a", prompt=30), ticket(2, principal="a")])
    a.admit()
    offered = [ticket(8, principal="b"), ticket(9, principal="a")]
    shown = a.queues(offered)
    shown.waiting["a"].clear()
    assert a.waiting == 1
    a.offer(offered)
    assert a.queues() == Queues({"a": [ticket(2, principal="a"), offered[1]], "b": [offered[0]]}, shown.served)
    assert shown.served == {"a": 30.0, "b": 30.0}


def test_places_are_fewer_while_memory_keeps_somebody_waiting() -> None:
    memory = MemoryModel(budget=4 * (KV_STEP + 100), layers=(LayerGroup(1),))
    a = admission(memory=memory)
    assert a.places == MAX_ROWS
    a.offer([ticket(1, length=100), ticket(2, length=300)])
    a.admit()
    assert a.places == 1
    a.release(1)
    a.admit()
    assert a.places == MAX_ROWS


@pytest.mark.parametrize(("rows", "never"), [(2, False), (3, True)])
def test_a_full_queue_says_so_when_no_retry_can_help(rows: int, never: bool) -> None:
    a = admission(max_queue=1, max_rows=1)
    a.offer([ticket(0)])
    with pytest.raises(QueueFull) as refused:
        a.offer([ticket(uid) for uid in range(1, rows + 1)])
    assert (refused.value.should_retry is False) == never
    assert QueueFull("another").should_retry is None


def test_deadlines_take_the_waiting_out_and_name_the_running() -> None:
    a = admission(max_rows=1)
    a.offer([ticket(1, deadline=5.0), ticket(2, deadline=3.0), ticket(3, deadline=9.0)])
    assert [t.uid for t in a.admit()] == [1]
    assert a.expired(2.9) == []
    assert a.expired(5.0) == [2, 1]
    assert a.expired(5.0) == []
    assert a.waiting == 1
    assert a.running == 1


def test_counters_of_departed_principals_do_not_pile_up() -> None:
    a = admission(max_queue=10, max_rows=2)
    a.offer([ticket(0, principal="stays", prompt=10_000)])
    a.admit()
    for uid in range(1, 3 * SPARE_COUNTERS):
        a.offer([ticket(uid, principal=f"p{uid}")])
        a.admit()
        a.release(uid)
    assert len(a._served) <= 2 * SPARE_COUNTERS
    a.release(0)
    a.check_integrity()


class AdmissionMachine(RuleBasedStateMachine):
    """Random life of a queue against a plain model of it."""

    tickets: Bundle[int] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.memory = MemoryModel(budget=8 * (KV_STEP + 50), layers=(LayerGroup(1),))
        self.admission = admission(memory=self.memory)
        self.now = 0.0
        self.uid = 0
        self.waiting: dict[int, Ticket] = {}
        self.running: dict[int, Ticket] = {}

    @rule(
        target=tickets,
        principal=st.sampled_from("abc"),
        length=st.integers(1, 1600),
        weight=st.sampled_from([0.01, 0.5, 1.0, 100.0]),
        deadline=st.none() | st.floats(0, 50),
    )
    def offer(self, principal: str, length: int, weight: float, deadline: float | None) -> int:
        self.uid += 1
        offered = ticket(
            self.uid,
            principal=principal,
            prompt=max(1, length // 2),
            length=length,
            weight=weight,
            deadline=None if deadline is None else self.now + deadline,
        )
        try:
            self.admission.offer([offered])
        except QueueFull:
            assert len(self.waiting) >= MAX_QUEUE + MAX_ROWS - len(self.running)
        except InvalidRequest:
            assert not self.memory.fits([length])
        else:
            self.waiting[self.uid] = offered
        return self.uid

    @rule()
    def admit(self) -> None:
        for admitted in self.admission.admit():
            assert all(
                earlier not in self.waiting or self.waiting[earlier].principal != admitted.principal
                for earlier in range(admitted.uid)
            ), "overtaken within a principal"
            self.running[admitted.uid] = self.waiting.pop(admitted.uid)

    @rule()
    @precondition(lambda self: self.waiting and not self.running)
    def progress(self) -> None:
        """An engine with nothing running always takes somebody."""
        before = len(self.waiting)
        self.admit()
        assert len(self.waiting) < before

    @rule(uid=tickets, tokens=st.integers(1, 500))
    def served(self, uid: int, tokens: int) -> None:
        self.admission.served(uid, tokens)

    @rule(uid=consumes(tickets))
    def withdraw(self, uid: int) -> None:
        assert self.admission.withdraw(uid) == (self.waiting.pop(uid, None) is not None)

    @rule(uid=tickets)
    def release(self, uid: int) -> None:
        assert self.admission.release(uid) == (self.running.pop(uid, None) is not None)

    @rule(seconds=st.floats(0, 20))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        for uid in self.admission.expired(self.now):
            expired = self.waiting.pop(uid, None) or self.running.get(uid)
            assert expired is not None
            assert expired.deadline is not None
            assert expired.deadline <= self.now

    @rule()
    def withdraw_all(self) -> None:
        assert sorted(self.admission.withdraw_all()) == sorted(self.waiting)
        self.waiting.clear()

    @invariant()
    def books_agree(self) -> None:
        self.admission.check_integrity()
        shown = self.admission.queues()
        assert {t.uid for queue in shown.waiting.values() for t in queue} == self.waiting.keys()
        assert self.admission.waiting == len(self.waiting)
        assert self.admission.running == len(self.running)
        assert sorted(self.admission.running_uids()) == sorted(self.running)


AdmissionMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAdmissionMachine = AdmissionMachine.TestCase
