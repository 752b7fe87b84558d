"""The real backend: mlx-lm's continuous batching on one thread.

Every method but `patience` belongs to the generation thread, and so does every array: mlx's streams are thread-local.
`BatchGenerator` is not used: its constructor raises Metal's wired limit (never raising it was the condition of
panic-free runs, ml-explore/mlx #3186), and its step is not bounded in time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import mlx.core as mx
import structlog
from mlx_lm.models.cache import make_prompt_cache

from service.engine.backend import MemoryUse, ModelInfo, Row, StepResult, Token, nothing
from service.engine.batches import PrefillBatch, RowState, Shapes, cudnn_plans
from service.engine.cohorts import CohortLimits, Member, copy_prefixes, next_cohort
from service.engine.decode_batch import Chore
from service.engine.decode_groups import DecodeGroups
from service.engine.loading import LoadedModel, Report, load_model, measure_memory, memory_use, unheard
from service.engine.memory_limits import limit_buffers, limit_memory
from service.engine.pacing import Load, Pacer
from service.engine.prefix_cache import PrefixCache
from service.engine.sampling import RowSampling
from service.engine.warmup import Warmup
from service.settings import Settings

DONE: Final = object()


class MlxBackend:
    """Drives one mlx-lm model. `clock` is a monotonic clock in seconds.

    `ahead`: compute a token while the one before it is handed over; by default on a GPU, and where steps are `brief`,
    because a CPU's launch waits for most of the computation (mlx's scheduler takes 10 tasks).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[Settings, Report], LoadedModel] = load_model,
        clock: Callable[[], float] = time.perf_counter,
        ahead: bool | None = None,
    ) -> None:
        self._meanwhile: Callable[[], object] = nothing
        self._ahead = True if ahead is None and mx.default_device() == mx.Device(mx.gpu) else ahead
        self._settings = settings
        self._load = load
        self._clock = clock
        self._log = structlog.get_logger("engine")
        self._waiting: deque[RowState] = deque()
        self._forming: list[Member] = []
        self._prefill: PrefillBatch | None = None
        self._chore: Chore | None = None
        self._gone: set[int] = set()
        self._shapes = Shapes()
        self._since = 0.0
        self._told: float | None = None
        self._prefixes = PrefixCache(limit=0)
        self.model: Any = None
        self.pacer = Pacer(target=settings.engine.step_target, largest=settings.engine.max_prefill_chunk)
        self._decode = DecodeGroups(None, frozenset(), self.pacer)

    def load(self, progress: Report = unheard) -> ModelInfo:
        """Resolve, download or convert, and load the model; set mlx's limits. Raises ModelUnavailable."""
        engine = self._settings.engine
        limit_buffers(engine)
        loaded = self._load(self._settings, progress)
        memory = measure_memory(self._settings, loaded)
        limit_memory(engine, loaded.model, memory.budget)
        self.model = loaded.model
        self.info = loaded.info(memory)
        self._decode = DecodeGroups(self.model, self.info.eos_token_ids, self.pacer, memory)
        self._prefixes = PrefixCache(limit=int(memory.budget * engine.prefix_cache_fraction))
        self._log.info("model_loaded", model=loaded.name, batchable=self.info.batchable, memory_budget=memory.budget)
        return self.info

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Run the shapes of traffic once and learn what a step costs."""
        self.pacer.calibrate(Warmup(self, self._settings.engine, clock=self._clock).run(progress))
        # The first long prompt takes its buffers from what this used. On a CPU it would gain nothing.
        self.rebuild(keep_pool=mx.default_device() == mx.Device(mx.gpu))
        self._log.info("warmed_up", **{name: float(f"{cost:.2g}") for name, cost in asdict(self.pacer.costs).items()})

    @property
    def max_rows(self) -> int:
        """Rows that may decode together: one when the model's caches cannot be merged."""
        return self._settings.engine.max_rows if self.info.batchable else 1

    def fresh_cache(self) -> list[Any]:
        return list(make_prompt_cache(self.model))

    def insert(self, row: Row) -> None:
        """Take a row in; its prefix is looked up when its prefill starts."""
        self._waiting.append(self.row_state(row))

    def row_state(self, row: Row) -> RowState:
        """A row of which nothing is prefilled."""
        return RowState(row=row, sampling=RowSampling(row.sampling, row.prompt), rest=list(row.prompt))

    def make_room(self, nbytes: int) -> None:
        """Shrink the prefix cache to at most `nbytes`."""
        self._prefixes.make_room(nbytes)

    def patience(self, positions: int) -> float:
        return self.pacer.patience(positions)

    def step(self) -> StepResult:
        """What the pacer planned: wait for the live rows' tokens, prefill one chunk, or both; and a chore's layers.
        After the first or last token of any row the rest follows with the next call."""
        result, told, self._told = StepResult(), self._told, None
        began = self._clock() if told is None else told
        if self._prefill is None and self._waiting and not self.busy:  # who leaves may leave a prefix for who comes
            self._next_cohort()
        load = self._load_now()
        ahead = self.pacer.brief(*load.batches) if self._ahead is None else self._ahead
        chore = self._chore or self._next_chore()
        plan = self.pacer.plan(load, copying=chore is not None and chore.beside, told=told is not None)
        if load.rows and plan.decode and (chore is None or chore.beside or self._decode.launched):
            urgent = self._emit(result, load, ahead=ahead and chore is None and not load.cohort)
            if urgent and not self._decode.launched and (ahead or self._prefill is not None or self.busy):
                self._told = began
                self._drop_failed(result)
                return result
        if not self._work_off(began, result):
            return result
        fits = chore is None or self.pacer.chunk_fits(load, self._clock() - began)
        if (prefill := self._prefill) is not None and plan.chunk and fits:
            self._prefill_once(prefill, plan.chunk, result)
            if (load.rows and prefill.late) or not self._work_off(began, result):
                return result
        if ahead and plan.launch and not self._decode.launched:
            self._since = self._clock()
            self._decode.launch()
        self._drop_failed(result)
        result.overlaps = not (self._waiting or self._forming or self._prefill or self._chore)
        return result

    def do_meanwhile(self, work: Callable[[], object]) -> None:
        self._meanwhile = work

    @property
    def busy(self) -> bool:
        """Whether copies are left to make: a step is due although no row may be waiting for it."""
        return self._chore is not None or bool(self._forming) or any(state.leaving for state in self._decode.rows)

    def _next_cohort(self) -> None:
        """Begin with the next prompts, unless the rows that decode leave no time for one more."""
        most = min(self._settings.engine.max_prefill_rows, self.max_rows)
        limits = CohortLimits(most, self.info.memory, self.pacer, self._load_now())
        members = next_cohort(self._waiting, self._prefixes, self._decode, limits)
        if any(member.source for member in members):
            self._forming = members
        else:
            self._begin(members)

    def _begin(self, members: Sequence[Member]) -> None:
        caches = [member.begin() or self.fresh_cache() for member in members]
        self._prefill = PrefillBatch(self.model, [member.state for member in members], caches) if members else None

    def _load_now(self) -> Load:
        prefill, (first, *others) = self._prefill, self._decode.awaited or ((0, 0),)
        return Load(
            rows=first[0],
            context=first[1],
            others=tuple(others),
            computing=self._decode.launched > 0,
            cohort=len(prefill.rows) if prefill and not prefill.ready else 0,
            cohort_context=prefill.context if prefill else 0,
            cohort_left=prefill.left if prefill else None,
        )

    def _emit(self, result: StepResult, load: Load, *, ahead: bool) -> bool:
        """Hand over one token of each row; `ahead`: the next is computed meanwhile. Whether any is a first or last."""
        decode = self._decode
        result.decode_rows = len(decode)
        if not decode.launched:
            self._since = self._clock()
            decode.launch(self._meanwhile)
        if ahead and all(state.sampled for state in decode.rows):  # a first token does not wait for that
            decode.launch(self._meanwhile)
        self._meanwhile()
        emitted = decode.emit()
        result.tokens = [Token(each.state.row.uid, each.token, each.reason) for each in emitted]
        decode.abandon_if_nobodys()
        now = self._clock()
        result.decode_seconds, self._since = now - self._since, now
        self.pacer.observe_decode(result.decode_seconds, *load.batches)
        return any(each.state.sampled == 1 or each.reason for each in emitted)

    def _prefill_once(self, batch: PrefillBatch, chunk: int, result: StepResult) -> None:
        began, context = self._clock(), batch.context
        chunk = min(chunk, self.info.memory.chunk(context + chunk))
        result.prefill_tokens = batch.advance(max(1, chunk // len(batch.rows)))
        result.prefill_seconds = self._clock() - began
        typical = not cudnn_plans() or self._shapes.known((result.prefill_tokens, context, len(batch.rows)))
        self.pacer.observe_prefill(result.prefill_tokens, context, result.prefill_seconds, typical=typical)

    # -- chores: copies, one layer at a time, most of them while rows decode ---------------------------------

    def _work_off(self, began: float, result: StepResult) -> bool:
        """Go on with chores for the rest of the step, one layer at least; True when none is left."""
        until = self.pacer.copies_until(began, self._clock())
        while True:
            if self._chore is None and not self._decode.launched:
                self._chore = self._next_chore()
            if self._chore is None:
                return True
            result.copies += 1
            if next(self._chore.layers, DONE) is DONE:
                self._chore = None
            elif self._clock() >= until:
                return False

    def _next_chore(self) -> Chore | None:
        """What must be copied, if anything. It begins when nothing is launched."""
        prefill = self._prefill
        if self._forming:
            return Chore(self._form())
        if chore := self._decode.chore(self._waiting, prefill, self._keep):
            return chore
        if prefill is not None and prefill.unprepared:
            return Chore(prefill.prepare())
        if prefill is not None and prefill.ready:
            return Chore(self._join(prefill))
        return None

    def _form(self) -> Iterator[None]:
        """Copy what rows that decode have of a cohort's prompts, then begin with it."""
        members, self._forming = self._forming, []
        yield from copy_prefixes(members, self._decode, self._prefixes)
        self._begin([member for member in members if member.state.row.uid not in self._gone])
        self._gone.clear()

    def _join(self, prefill: PrefillBatch) -> Iterator[None]:
        self._prefill = None
        yield from self._decode.join(prefill, len(self._waiting))
        for state in prefill.rows:
            state.leaving = state.row.uid in self._gone
        self._gone.clear()

    def _keep(self, state: RowState, tokens: Sequence[int], layers: list[Any]) -> None:
        self._prefixes.store(state.row.tenant, tokens, layers)

    def _drop_failed(self, result: StepResult) -> None:
        result.failed += (failed := self._decode.take_failed()).items()
        self.remove(failed)

    def remove(self, uids: Iterable[int], *, keep_prefix: bool = False) -> None:
        """Take rows out between steps, from wherever they are; those that decode leave with the next step."""
        if not (gone := set(uids)):
            return
        self._gone |= gone if self._chore is not None else set()
        self._waiting = deque(state for state in self._waiting if state.row.uid not in gone)
        self._forming = [member for member in self._forming if member.state.row.uid not in gone]
        if self._prefill is not None and gone.intersection(self._prefill.uids):
            self._prefill.filter([i for i, uid in enumerate(self._prefill.uids) if uid not in gone])
            if not self._prefill.rows:
                self._prefill = None
        for state in self._decode.rows:
            if state.row.uid in gone and not state.leaving:
                state.leaving, state.keep_prefix = True, keep_prefix
        if self._chore is None and not any(s.keep_prefix or not s.leaving for s in self._decode.rows):
            self._decode.clear()
        else:
            self._decode.abandon_if_nobodys()

    def rebuild(self, *, keep_pool: bool = False) -> None:
        """Forget every row and prefix; the model stays. `keep_pool`: buffers that are free are for whoever is next."""
        self._waiting.clear()
        self._forming.clear()
        self._prefill = self._chore = self._told = None
        self._decode.clear()
        self._gone.clear()
        self._prefixes.clear()
        if not keep_pool:
            mx.clear_cache()

    def memory(self) -> MemoryUse:
        """mlx's own counters and the prefix cache's."""
        return memory_use(self._prefixes, self._decode.nbytes)

    def release_pool(self) -> None:
        mx.clear_cache()

    def close(self) -> None:
        """Free rows, prefixes, weights and mlx's buffer pool, and end mlx's streams of this thread: where it ends with
        some left, the process aborts at exit (seen with mlx 0.32.4)."""
        self.model = None
        self.rebuild()
        self._decode = DecodeGroups(None, frozenset(), self.pacer)
        mx.synchronize()
        mx.clear_streams()
