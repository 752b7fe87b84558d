"""Who waits, who runs, who is next. Pure bookkeeping: no mlx, no asyncio, no threads, the clock passed in.

The waiting queue is bounded. Between principals it is fair by tokens served over weight (virtual token counters, as
in "Fairness in Serving Large Language Models", OSDI 2024); within one it is first come, first served. What does not
fit into memory beside the running rows waits, and nobody overtakes it, so it cannot starve.
Not thread-safe: the worker calls it under its lock.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from service.engine.memory import MemoryModel
from service.errors import InvalidRequest, QueueFull

UNKNOWN_WAIT = 1.0
"""Seconds after which to ask a full queue again, for who does not know better."""

SPARE_COUNTERS = 1024
"""Counters of idle principals that are kept before the smaller half is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """One row's claim: `length` is prompt + max_tokens, `deadline` a time of the injected clock or None.

    A principal with twice the `weight` of another gets twice the tokens while both have rows waiting.
    """

    uid: int
    principal: str
    prompt_tokens: int
    length: int
    deadline: float | None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Queues:
    """A copy of who waits and where counters stand: tickets by principal, each in order of arrival."""

    waiting: dict[str, list[Ticket]]
    served: dict[str, float]


class Admission:
    """The waiting queue and the set of running rows.

    `max_rows` bounds the batch, `max_queue` the rows that wait, `memory` what may run together.
    """

    def __init__(self, *, max_queue: int, max_rows: int, memory: MemoryModel) -> None:
        self._max_queue = max_queue
        self._max_rows = max_rows
        self._memory = memory
        self._queues: dict[str, deque[Ticket]] = {}
        self._waiting: dict[int, Ticket] = {}
        self._running: dict[int, Ticket] = {}
        self._rows: Counter[str] = Counter()
        self._served: dict[str, float] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.places = max_rows
        """Rows that may run together as things are: fewer than `max_rows` while memory keeps somebody waiting."""
        self.held_bytes = 0
        """What the batch's buffers take now, spare places included; the worker keeps it up to date."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def waiting_of(self, principal: str) -> int:
        """Rows of one principal that wait."""
        return len(self._queues.get(principal, ()))

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def reserved_bytes(self) -> int:
        """Peak memory that the running rows may need."""
        return self._memory.peak_bytes([ticket.length for ticket in self._running.values()], self.held_bytes)

    def check(self, tickets: Sequence[Ticket]) -> None:
        """Raise QueueFull when there is no room for all tickets, InvalidRequest for what could never run."""
        for ticket in tickets:
            if not self._memory.fits([ticket.length]):
                raise InvalidRequest(
                    f"This request may need {self._memory.peak_bytes([ticket.length])} bytes of memory; the model "
                    f"has {self._memory.budget}. Ask for fewer tokens or send a shorter prompt.",
                    code="exceeds_memory",
                    param="max_tokens",
                )
        if not self.has_room(len(tickets), self.waiting, self.running):
            full = QueueFull("The waiting queue is full.", retry_after=UNKNOWN_WAIT)
            if not self.has_room(len(tickets), 0, 0):
                full.should_retry = False
            raise full

    def has_room(self, tickets: int, waiting: int, running: int) -> bool:
        """Whether so many would be taken beside others that wait and run.

        Rows that can start at once do not queue, so an idle engine takes a full batch even with no queue.
        """
        return waiting + tickets <= self._max_queue + max(0, self._max_rows - running)

    def offer(self, tickets: Sequence[Ticket]) -> None:
        """Queue all tickets or none. Raises what `check` raises."""
        self.check(tickets)
        for ticket in tickets:
            self._enqueue(ticket)

    def queues(self, tickets: Sequence[Ticket] = ()) -> Queues:
        """A copy of the queues as they would be after an offer of `tickets`; of counters, those of the active."""
        waiting = {principal: list(queue) for principal, queue in self._queues.items()}
        served = {principal: self._served[principal] for principal in self._active()}
        for ticket in tickets:
            served.setdefault(ticket.principal, self._entry_level(ticket.principal))
            waiting.setdefault(ticket.principal, []).append(ticket)
        return Queues(waiting, served)

    def _entry_level(self, principal: str) -> float:
        """Idle time earns no credit: who returns starts level with the least served, or where it stood."""
        level = min((self._served[name] for name in self._active()), default=0.0)
        return max(self._served.get(principal, level), level)

    def _enqueue(self, ticket: Ticket) -> None:
        if ticket.principal not in self._queues:
            self._served[ticket.principal] = self._entry_level(ticket.principal)
            self._queues[ticket.principal] = deque()
        self._queues[ticket.principal].append(ticket)
        self._waiting[ticket.uid] = ticket
        if ticket.deadline is not None:
            heapq.heappush(self._deadlines, (ticket.deadline, ticket.uid))

    def _active(self) -> set[str]:
        return self._rows.keys() | self._queues.keys()

    def withdraw(self, uid: int) -> bool:
        """Take a waiting row out; False when it is not waiting."""
        ticket = self._waiting.pop(uid, None)
        if ticket is None:
            return False
        queue = self._queues[ticket.principal]
        queue.remove(ticket)
        if not queue:
            del self._queues[ticket.principal]
        self._prune()
        return True

    def withdraw_all(self) -> list[int]:
        """Empty the queue; returns who waited, in order of arrival."""
        uids = list(self._waiting)
        for uid in uids:
            self.withdraw(uid)
        return uids

    def expired(self, now: float) -> list[int]:
        """Rows whose deadline has passed: waiting ones are taken out, running ones only named (once)."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, uid = heapq.heappop(self._deadlines)
            if self.withdraw(uid) or uid in self._running:
                late.append(uid)
        return late

    def admit(self, most: int | None = None) -> list[Ticket]:
        """Move every row that may start now, `most` at most, from waiting to running, fairly; returns them in order."""
        admitted: list[Ticket] = []
        lengths = [ticket.length for ticket in self._running.values()]
        self.places = self._max_rows
        while self._queues and len(self._running) < self._max_rows and len(admitted) != most:
            principal = min(self._queues, key=self._turn)
            ticket = self._queues[principal][0]
            if not self._memory.fits([*lengths, ticket.length], self.held_bytes):
                self.places = max(1, len(self._running))
                break
            lengths.append(ticket.length)
            self._running[ticket.uid] = ticket
            self._rows[principal] += 1
            self.withdraw(ticket.uid)
            self.served(ticket.uid, ticket.prompt_tokens)
            admitted.append(ticket)
        return admitted

    def _turn(self, principal: str) -> tuple[float, int]:
        """Who is next: the least served, and among equals who has less in the batch."""
        return self._served[principal], self._rows[principal]

    def running_uids(self) -> list[int]:
        """The rows in the batch, in order of admission."""
        return list(self._running)

    def served(self, uid: int, tokens: int) -> None:
        """Charge a running row's principal for tokens; a negative number gives back what was charged too much."""
        ticket = self._running.get(uid)
        if ticket is not None:
            self._served[ticket.principal] += tokens / ticket.weight

    def release(self, uid: int) -> bool:
        """A running row has left the batch; False when it was not running."""
        ticket = self._running.pop(uid, None)
        if ticket is None:
            return False
        self._rows[ticket.principal] -= 1
        if not self._rows[ticket.principal]:
            del self._rows[ticket.principal]
        self._prune()
        return True

    def _prune(self) -> None:
        """Bound the counters: none when idle, else those of the active and of the idle that owe most."""
        if not self._waiting and not self._running:
            self._served.clear()
            self._deadlines.clear()
        elif len(self._served) > SPARE_COUNTERS + len(active := self._active()):
            idle = heapq.nlargest(SPARE_COUNTERS // 2, self._served.keys() - active, key=self._served.__getitem__)
            self._served = {name: self._served[name] for name in (*active, *idle)}

    def check_integrity(self) -> None:
        """Raise AssertionError when the books disagree with each other; for tests and idle moments."""
        queued = [ticket.uid for queue in self._queues.values() for ticket in queue]
        assert sorted(queued) == sorted(self._waiting), "queues and waiting differ"
        assert all(self._queues.values()), "an empty queue was kept"
        assert not self._waiting.keys() & self._running.keys(), "a row both waits and runs"
        assert len(self._running) <= self._max_rows, "too many rows"
        rows = Counter(ticket.principal for ticket in self._running.values())
        assert rows == self._rows, "rows were miscounted"
        assert self._memory.fits([ticket.length for ticket in self._running.values()]), "over the memory budget"
        assert self._served.keys() >= self._active(), "a principal without a counter"
        assert self._waiting or self._running or not self._served, "an idle engine remembers principals"
