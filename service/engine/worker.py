"""The generation thread: admit, step, deliver.

The thread owns the backend. The event loop reaches it through calls that take the lock for bookkeeping only and never
wait for the backend. What steps produced goes back in one call of `deliver` (Engine's hops onto the loop).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from service.engine.admission import Admission
from service.engine.backend import Backend, MemoryUse, ModelInfo, StepResult
from service.engine.canary import Canary
from service.engine.foresight import Foresight
from service.engine.generation import Delta, FinishReason, Generation
from service.engine.jobs import Job, Orders, Plan
from service.engine.lineup import Lineup
from service.engine.outbox import Deliver, Outbox, When
from service.engine.progress import Phase, Progress
from service.engine.telemetry import Telemetry
from service.engine.tokenizer import TextStream
from service.errors import DeadlineExceeded, GenerationFailed, ServiceError
from service.settings import EngineSettings

SETTLING = 0.1
"""Seconds without work after which memory is counted once more: the last rows' next token was being computed."""


class Worker:
    """Serves a loaded backend until told to stop, and after `canary_interval` seconds without work (0: never) makes a
    token for itself. `run` belongs to the generation thread."""

    def __init__(
        self,
        backend: Backend,
        info: ModelInfo,
        settings: EngineSettings,
        *,
        clock: Callable[[], float],
        deliver: Deliver,
        telemetry: Telemetry,
        progress: Progress,
        canary_interval: float = 0.0,
    ) -> None:
        self._backend = backend
        self._info = info
        self._clock = clock
        self._telemetry = telemetry
        self._log = structlog.get_logger("engine")
        self._wake = threading.Condition()
        rows = settings.max_rows if info.batchable else 1
        self._admission = Admission(max_queue=settings.max_queue, max_rows=rows, memory=info.memory)
        self._lineup = Lineup(settings.max_prefill_rows)
        self._foresight = Foresight(self._admission, self._lineup, self._in_batch, self._wake)
        self._jobs: dict[int, Job] = {}
        self._uids: dict[Generation, int] = {}
        self._next_uid = 0
        self._orders = Orders()
        self._over: ServiceError | None = None
        self._outbox = Outbox(settings.delivery_interval, lock=self._wake, clock=clock, deliver=deliver)
        backend.do_meanwhile(partial(self._outbox.hand_over, When.DURING))
        self._progress = progress
        self._canary = Canary(backend, info, telemetry=telemetry, progress=progress)
        self._canary_interval = canary_interval or None
        self.last_step = clock()
        self.memory = MemoryUse()
        telemetry.capacity(rows=rows, queue=settings.max_queue)

    # -- from the event loop ------------------------------------------------------------------------------

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue all or none, and only what is expected to begin before its deadline. Raises as `Foresight.wait`."""
        numbered = dict(enumerate(map(self._job, generations), self._next_uid))
        tickets = [job.ticket(uid) for uid, job in numbered.items()]
        expected = self._foresight.wait(tickets, now := self._clock())
        with self._wake:
            if self._over is not None:  # the generation thread ends, and the loop does not know yet
                raise self._over
            self._admission.offer(tickets)
            self._next_uid += len(numbered)
            self._jobs.update(numbered)
            for uid, job in numbered.items():
                job.submitted(now, expected)
                self._uids[job.generation] = uid
            self._progress.queued()
            if self._lineup.due(self.waiting):
                self._wake.notify()

    def hold(self, held: bool) -> None:
        """Whether newcomers wait for others who are on their way, unless they are a cohort already."""
        with self._wake:
            self._lineup.held = held
            if not held:
                self._wake.notify()

    def patience(self, prompt: int) -> float:
        """Seconds for which it is worth it to hold a prompt of so many tokens for others."""
        return self._backend.patience(self._foresight.rates.to_compute(prompt))

    def _in_batch(self) -> list[Job]:
        return [self._jobs[uid] for uid in self._admission.running_uids()]

    def _job(self, generation: Generation) -> Job:
        text = TextStream(self._info.tokenizer, generation.request.stop, trim_space=generation.request.trim_space)
        return Job(generation, text, self._clock, self._wake, self._telemetry)

    def cancel(self, generation: Generation) -> None:
        """The reader has gone: out at once when it waits, else at the next step boundary."""
        with self._wake:
            if (uid := self._uids.get(generation)) is None:
                return
            if self._admission.withdraw(uid):
                self._end(uid, "cancelled", None)
            else:
                self._jobs[uid].cancelled = True
                self._orders.cancelled.append(uid)
                self._wake.notify()

    def refuse_waiting(self, error: ServiceError) -> None:
        """Empty the queue and tell everybody in it `error`."""
        with self._wake:
            for uid in self._admission.withdraw_all():
                self._end(uid, error.code, Delta(error=error))
        self._outbox.hand_over()

    def abort_running(self, error: ServiceError) -> None:
        """End every running row with `error` at the next step boundary."""
        with self._wake:
            self._orders.abort = error
            self._wake.notify()

    def stop(self) -> None:
        """Leave `run` at the next step boundary."""
        with self._wake:
            self._orders.stop = True
            self._wake.notify()

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def running(self) -> int:
        return self._admission.running

    def books(self) -> tuple[int, int]:
        """(rows that are not given back, bytes that the running ones are promised)."""
        with self._wake:
            return len(self._jobs), self._admission.reserved_bytes

    def idle(self) -> bool:
        """Whether nothing waits, runs or is remembered. Raises AssertionError when the books disagree."""
        with self._wake:
            self._admission.check_integrity()
            return not (self._jobs or self._uids or self.waiting or self.running)

    # -- the generation thread ----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped. Raises CanaryFailed when the engine is beyond repair."""
        while self._turn():
            pass

    def fail_all(self, error: ServiceError) -> None:
        """Tell everybody, waiting or running, that nothing will come; the last thing that is done."""
        with self._wake:
            self._over = error
            for uid in list(self._jobs):
                self._admission.withdraw(uid)
                self._end(uid, error.code, Delta(error=error))
        self._outbox.hand_over()

    def _turn(self) -> bool:
        """One pass of admit, step, deliver. False when told to stop."""
        with self._wake:
            canary = self._rest()
            self._progress.enter(Phase.PLANNING)
            if self._orders.stop:
                return False
            plan = self._plan(canary=canary)
            wanted = bool(self._jobs)
        self._outbox.hand_over(When.BEFORE if wanted and not plan.insert else When.NOW)
        self._progress.enter(Phase.STEPPING)
        result = self._step(plan)
        self._progress.enter(Phase.DELIVERING)
        with self._wake:
            stopped, self.last_step = self._collect(result), self._clock()
            self._progress.stepped(fruitful=result.fruitful, wanted=wanted)
            steady = len(result.tokens) == self._admission.running and not result.copies  # so will be the next step
            self._outbox.stepped(result.decode_seconds if steady else None, overlaps=result.overlaps)
        self._outbox.hand_over(When.AFTER)
        self._backend.remove(stopped, keep_prefix=True)
        self.memory = self._backend.memory()
        if self._canary.overgrown(self.memory):
            self._recover()
            self.memory = self._backend.memory()
        return True

    def _rest(self) -> bool:
        """Wait for something to do; True when nothing came for so long that the canary is due."""
        for patience in (SETTLING, self._canary_interval):
            while not (self._orders or self.running or self._lineup.due(self.waiting) or self._backend.busy):
                self._progress.rest()
                if not self._wake.wait(patience):
                    break
            else:
                return False
            self.memory = self._backend.memory()
        return not (self._orders or self._jobs)

    def _plan(self, *, canary: bool) -> Plan:
        """Carry out cancels, aborts and deadlines in the books, admit who fits; the backend follows."""
        orders, self._orders = self._orders, Orders()
        plan = Plan(canary=canary)
        self._admission.held_bytes = self.memory.batch
        for uid in orders.cancelled:
            if uid in self._jobs:
                plan.remove.append(uid)
                self._end(uid, "cancelled", None)
        if orders.abort is not None:
            for uid in self._admission.running_uids():
                plan.remove.append(uid)
                self._end(uid, orders.abort.code, Delta(error=orders.abort))
        for uid in self._admission.expired(self._clock()):
            late = DeadlineExceeded(self._jobs[uid].phase)
            plan.remove.append(uid)
            self._end(uid, late.code, Delta(error=late))
        room = self._lineup.room(self._in_batch(), self.waiting, busy=self._backend.busy)
        plan.insert = [self._jobs[ticket.uid].row(ticket.uid) for ticket in self._admission.admit(room)]
        self._lineup.handed_over(len(plan.insert))
        plan.room = self._info.memory.budget - self._admission.reserved_bytes if plan.insert else 0
        return plan

    def _step(self, plan: Plan) -> StepResult:
        """Let the backend follow the plan and take one step; a step that is lost yields nothing."""
        try:
            plan.carry_out(self._backend)
            if plan.canary:
                self._canary.sing()
            began = self._clock()
            result = self._backend.step()
        except Exception as error:  # noqa: BLE001  the worker step: whatever mlx raises fails these rows only
            self._log.error("step_failed", exc_info=error)
            self._telemetry.internal_error("worker_step")
            self._recover()
            return StepResult()
        seconds = self._clock() - began
        self._foresight.learn(result, seconds)
        self._telemetry.stepped(seconds, result.decode_rows)
        return result

    def _recover(self) -> None:
        """After a lost step: fail its rows, rebuild, and let the engine's own canary decide."""
        failed = GenerationFailed("The generation failed.")
        with self._wake:
            for uid in self._admission.running_uids():
                self._end(uid, failed.code, Delta(error=failed))
        self._outbox.hand_over()
        self._canary.judge()

    def _collect(self, result: StepResult) -> list[int]:
        """Turn a step's tokens into deltas; returns the rows that a stop string ended."""
        stopped = []
        counted, now = 0, self._clock()
        for token in result.tokens:
            if (job := self._jobs.get(token.uid)) and not job.cancelled:
                counted += 1
                self._admission.served(token.uid, job.cost())
                text, reason = job.advance(token, now)
                if reason is not None:
                    self._end(token.uid, reason, Delta(text, reason, job.meter.usage()))
                    if token.finish_reason is None:
                        stopped.append(token.uid)
                elif text:
                    self._outbox.post(job.generation, Delta(text), urgent=job.begins_to_speak())
        self._telemetry.decoded(counted)
        for uid, error in result.failed:
            if job := self._jobs.get(uid):
                self._log.error("row_failed", request_id=job.request.request_id, exc_info=error)
                self._telemetry.internal_error("row")
                failed = GenerationFailed("The generation failed.")
                self._end(uid, failed.code, Delta(error=failed))
        return stopped

    def _end(self, uid: int, reason: FinishReason | str, last: Delta | None) -> None:
        """Give a row's place back, once, and post its last delta (none when its reader has gone)."""
        job = self._jobs.pop(uid)
        del self._uids[job.generation]
        self._admission.release(uid)
        usage = job.end()
        self._telemetry.ended(reason)
        if job.meter.prefill_at is not None:
            self._foresight.rates.ended(usage, job.request.max_tokens)
        if last is not None:
            self._outbox.post(job.generation, last, urgent=True)
