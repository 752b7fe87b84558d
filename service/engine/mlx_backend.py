"""The real backend: mlx-lm's continuous batching on one thread.

Every method belongs to the generation thread, and so does every array: mlx's streams are thread-local.
`BatchGenerator` is not used: its constructor raises Metal's wired limit (never raising it was the
condition of panic-free runs, ml-explore/mlx #3186), and its step is not bounded in time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import structlog
from mlx_lm.generate import StopSequences
from mlx_lm.models.cache import make_prompt_cache

from service.engine.backend import MemoryUse, ModelInfo, Row, StepResult, Token
from service.engine.batches import DecodeBatch, PrefillBatch, RowState
from service.engine.generation import FinishReason
from service.engine.loading import LoadedModel, load_model, measure_memory
from service.engine.pacing import Load, Pacer
from service.engine.prefix_cache import PrefixCache
from service.engine.sampling import RowProcessors, Samplers
from service.engine.warmup import Warmup
from service.settings import Settings


class MlxBackend:
    """Drives one mlx-lm model. `clock` is a monotonic clock in seconds."""

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[Settings], LoadedModel] = load_model,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings = settings
        self._load = load
        self._clock = clock
        self._log = structlog.get_logger("engine")
        self._waiting: deque[RowState] = deque()
        self._prefill: PrefillBatch | None = None
        self._decode: DecodeBatch | None = None
        self._copying: list[Any] = []
        self._prefixes = PrefixCache(limit=0)
        self.model: Any = None
        self.pacer = Pacer(target=settings.engine.step_target, largest=settings.engine.max_prefill_chunk)

    def load(self) -> ModelInfo:
        """Resolve, download or convert, and load the model; set mlx's limits. Raises ModelUnavailable."""
        engine = self._settings.engine
        mx.set_cache_limit(engine.buffer_cache_limit)
        if engine.wired_limit:
            mx.set_wired_limit(engine.wired_limit)
        loaded = self._load(self._settings)
        self.model = loaded.model
        memory = measure_memory(self._settings, loaded)
        self.info = ModelInfo(
            name=loaded.name,
            context_length=loaded.context_length,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            batchable=all(hasattr(layer, "merge") for layer in self.fresh_cache()),
            memory=memory,
            tokenizer=loaded.tokenizer,
            device=str(mx.default_device()),
        )
        self.eos = StopSequences([(token,) for token in sorted(loaded.eos_token_ids)])
        self.samplers = Samplers(vocab_size=loaded.vocab_size)
        self._prefixes = PrefixCache(limit=int(memory.budget * engine.prefix_cache_fraction))
        self._log.info("model_loaded", model=loaded.name, batchable=self.info.batchable, memory_budget=memory.budget)
        return self.info

    def warm_up(self, progress: Callable[[str, int, int], None]) -> None:
        """Run the shapes of traffic once and learn what a step costs."""
        self.pacer.calibrate(Warmup(self, self._settings.engine, clock=self._clock).run(progress))
        self.rebuild()
        self._log.info("warmed_up", costs=self.pacer.costs)

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
        """A row with its sampler and processors, nothing of it prefilled."""
        needed = RowProcessors.needed(row.sampling)
        return RowState(
            row=row,
            sampler=self.samplers.get(row.sampling),
            processors=RowProcessors(row.sampling, row.prompt, self.info.vocab_size) if needed else None,
            rest=list(row.prompt),
        )

    def make_room(self, nbytes: int) -> None:
        """Shrink the prefix cache to at most `nbytes`."""
        self._prefixes.make_room(nbytes)

    def step(self) -> StepResult:
        """What the pacer planned: decode all live rows, prefill one chunk or let a cohort join, or both."""
        result = StepResult()
        if not self._copied():
            return result
        if self._prefill is None:
            self._prefill = self._next_cohort(result)
        load = self._load_now()
        plan = self.pacer.plan(load)
        if plan.decode and self._decode is not None:
            result.decode_rows = load.rows
            result.decode_seconds = self._timed(lambda batch: self._decode_once(batch, result), self._decode)
            self.pacer.observe_decode(load.rows, load.context, result.decode_seconds)
        if self._prefill is not None and plan.join:
            result.prefill_tokens = load.joining
            result.prefill_seconds = self._timed(self._join, self._prefill)
            self.pacer.observe_join(load, result.prefill_seconds)
        elif self._prefill is not None and plan.chunk:
            self._prefill_once(self._prefill, plan.chunk, result)
        self._drop_failed(result)
        return result

    def _copied(self) -> bool:
        """Carry out the copies that a join asked for, layer by layer; False when a step's time was not enough."""
        began = self._clock()
        while self._copying and self._clock() - began < self.pacer.target / 2:
            mx.eval(self._copying.pop(0))
        return not self._copying

    def _timed(self, work: Callable[[Any], None], batch: Any) -> float:
        began = self._clock()
        work(batch)
        return self._clock() - began

    def _load_now(self) -> Load:
        decode, prefill = self._decode, self._prefill
        return Load(
            rows=len(decode) if decode else 0,
            context=decode.context if decode else 0,
            cohort=len(prefill.rows) if prefill else 0,
            cohort_context=prefill.context if prefill else 0,
            joining=len(prefill.rows) if prefill and prefill.longest_rest == 1 else 0,
        )

    def _decode_once(self, batch: DecodeBatch, result: StepResult) -> None:
        tenants = dict(batch.tenants)
        for response in batch.next():
            reason = FinishReason(response.finish_reason) if response.finish_reason else None
            result.tokens.append(Token(response.uid, response.token, reason))
            if reason is not None:
                self._prefixes.store(tenants[response.uid], response.all_tokens, response.prompt_cache)
        if not len(batch):
            self._decode = None

    def _prefill_once(self, batch: PrefillBatch, chunk: int, result: StepResult) -> None:
        """Advance the cohort by one chunk, and let it join in the same step when there is time left."""
        began = self._clock()
        context = batch.context
        result.prefill_tokens = batch.advance(max(1, chunk // len(batch.rows)))
        result.prefill_seconds = self._clock() - began
        self.pacer.observe_prefill(result.prefill_tokens, context, result.prefill_seconds)
        load = self._load_now()
        spent = result.decode_seconds + result.prefill_seconds
        if load.joining and spent + self.pacer.join_seconds(load) <= self.pacer.target:
            result.prefill_tokens += load.joining
            taken = self._timed(self._join, batch)
            result.prefill_seconds += taken
            self.pacer.observe_join(load, taken)

    def _join(self, batch: PrefillBatch) -> None:
        """Run the cohort's last prompt tokens and make its rows part of the batch."""
        self._prefill = None
        joining = batch.into_decode(self.eos)
        if self._decode is None:
            self._decode = joining
        else:
            self._decode.extend(joining)
            self._copying = self._decode.states()

    def _next_cohort(self, result: StepResult) -> PrefillBatch | None:
        """The next prompt, with those behind it that fit into the same chunk."""
        if not self._waiting:
            return None
        rows: list[RowState] = []
        caches: list[list[Any]] = []
        widest = 0
        most = min(self._settings.engine.max_prefill_rows, self.max_rows)
        room = self.pacer.room(self._load_now())
        while self._waiting and len(rows) < most:
            state = self._waiting[0]
            cache, cached = self._prefixes.lookup(state.row.tenant, state.row.prompt)
            wider = max(widest, len(state.rest) - cached)
            if rows and wider * (len(rows) + 1) > room:
                break
            self._waiting.popleft()
            state.cached = cached
            del state.rest[:cached]
            widest = wider
            rows.append(state)
            caches.append(cache or self.fresh_cache())
            result.started.append((state.row.uid, cached))
        return PrefillBatch(self.model, rows, caches, merge=self.info.batchable)

    def _drop_failed(self, result: StepResult) -> None:
        batch = self._decode
        if batch is None or not batch.failed:
            return
        live = set(batch.uids)
        result.failed += [(uid, error) for uid, error in batch.failed.items() if uid in live]
        self.remove([uid for uid in batch.failed if uid in live])
        batch.failed.clear()

    def remove(self, uids: Iterable[int], *, keep_prefix: bool = False) -> None:
        """Take rows out between steps, from wherever they are."""
        gone = set(uids)
        if not gone:
            return
        self._copying.clear()
        self._waiting = deque(state for state in self._waiting if state.row.uid not in gone)
        if self._prefill is not None and gone.intersection(self._prefill.uids):
            self._prefill.filter([i for i, uid in enumerate(self._prefill.uids) if uid not in gone])
            if not self._prefill.rows:
                self._prefill = None
        if self._decode is not None and gone.intersection(self._decode.uids):
            if keep_prefix:
                self._keep(self._decode, gone)
            self._decode.filter([i for i, uid in enumerate(self._decode.uids) if uid not in gone])
            if not len(self._decode):
                self._decode = None

    def _keep(self, batch: DecodeBatch, uids: set[int]) -> None:
        for index, uid in enumerate(batch.uids):
            if uid in uids:
                self._prefixes.store(batch.tenants[uid], batch.tokens[index], batch.extract_cache(index))

    def rebuild(self) -> None:
        """Forget every row and prefix; the model stays."""
        self._waiting.clear()
        self._prefill = self._decode = None
        self._copying.clear()
        self._prefixes.clear()
        mx.clear_cache()

    def memory(self) -> MemoryUse:
        """mlx's own counters and the prefix cache's."""
        return MemoryUse(
            active=mx.get_active_memory(),
            peak=mx.get_peak_memory(),
            buffer_cache=mx.get_cache_memory(),
            prefix_cache=self._prefixes.nbytes,
            prefix_entries=len(self._prefixes),
        )

    def close(self) -> None:
        """Free rows, prefixes, weights and mlx's buffer pool, and end mlx's streams of this thread.

        A thread that ends with streams of its own left aborts the process at exit (seen with mlx 0.32.4).
        """
        self.model = None
        self.rebuild()
        mx.synchronize()
        mx.clear_streams()
