"""Warm-up: run the shapes of traffic before traffic does, and learn what a step costs.

Belongs to the generation thread. On a GPU the first use of a kernel compiles it (54 s for the first
prefill, 30 s for the first batch of 8 were seen); on a CPU most shapes cost nothing extra. So the smallest
shape of a family is run twice, and only when its first use was measurably slower is the rest run as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import mlx.core as mx

from service.engine.backend import Row
from service.engine.batches import PrefillBatch, cudnn_plans
from service.engine.decode_batch import SPARE, DecodeBatch
from service.engine.generation import SamplingParams
from service.engine.memory import KV_STEP
from service.engine.pacing import SMALLEST_CHUNK, StepCosts
from service.settings import EngineSettings

if TYPE_CHECKING:
    from service.engine.mlx_backend import MlxBackend

COLDER = 1.5
"""A first use that takes this many times a second one is paid for in advance."""

NOISE = 0.02
"""Seconds by which a first use must be slower, too: less than this nobody notices."""

DECODE_STEPS = 3
SHORT_PROMPT = 4

DEEP, DEEP_ROWS = 2048, 4
"""Context and rows at which its cost is measured: enough that it is no matter of noise. On a CPU 8 rows after 1,024
tokens took 0.129 s and after 2,048 0.268: what was measured at the former promised too much for the latter."""

LEAST_DEEP = 256
"""Tokens of context at least at which its cost for a chunk is measured, for the same reason: of small chunks after few
tokens the difference is noise, and beside other work it once came out 800 times as large."""

HIDDEN = 1.5
"""Times as long as without context that a step takes at least where its cost shows: a GPU attends while Python launches
what comes after, and on an H100 4 rows after 2,048 tokens took no longer than after none."""

DEEP_SHARE = 0.25
"""Share of the memory budget that this may take."""

PLANNED_CONTEXT, LEAST_CHUNK = 16 * 1024, 256
"""Tokens of the prompt for whose chunks cuDNN plans in advance, and the smallest of those: on an H100 120 plans take 6
s, and one that is missing lets all rows wait for 50 ms. So it does for each capacity of one row that decodes alone."""

MOST_REPEATS = 4
"""Repeats after which a shape that still gets faster is left to traffic."""

REHEARSED = 1.1
"""Ratio of two rehearsals below which the first counts as warm; traffic may see 1.2."""

REHEARSAL = 0.4
"""Seconds that the prompt and the output of one rehearsed request may each take, within real sizes."""

REAL_PROMPT, REAL_OUTPUT = 160, 64

LONG_PROMPT, LONG_OUTPUT = 3072, 2
"""Of a prompt that takes more than one chunk, whose cache is made longer in between: on an H100 the first to need the
kernels of that, and those of a step after so many tokens, waited 6 ms for them."""

GREEDY = SamplingParams(temperature=0)
SAMPLED = (
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05),
    SamplingParams(temperature=0.7, seed=1, presence_penalty=0.1, repetition_penalty=1.1, logit_bias=((0, 0.0),)),
)


class Warmup:
    """One warm-up of a freshly loaded backend."""

    def __init__(self, backend: MlxBackend, settings: EngineSettings, *, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._settings = settings
        self._clock = clock

    def run(self, progress: Callable[[str, int, int], None]) -> StepCosts:
        """Run all families, `progress(what, done, total)` before each; returns the measured costs."""
        # A CPU's kernels know no shapes: what is slower once is noise, and repeating it with all rows took minutes.
        cpu = mx.default_device() == mx.Device(mx.cpu)
        sampled = () if cpu else SAMPLED
        stages = ("prefill", "decode", *(f"sampling {number}" for number in range(1, len(sampled) + 1)), "rehearsal")
        progress(stages[0], 0, len(stages))
        costs = self._prefills()
        if cudnn_plans():
            self._plan_chunks(costs)
            self._plan_capacities()
        progress(stages[1], 1, len(stages))
        costs = self._decodes(costs)
        for done, params in enumerate(sampled, 2):
            progress(stages[done], done, len(stages))
            self._decode_sizes([1, self._backend.max_rows], params)
        progress(stages[-1], len(stages) - 1, len(stages))
        self._backend.pacer.calibrate(costs)
        if cpu:
            self._rehearse(min(2, self._backend.max_rows), *self._sizes(costs))
            return costs
        if self._cold_rehearsal(min(2, self._backend.max_rows), costs):
            self._cold_rehearsal(1, costs)  # other kernels: one row's products are with a vector
            self._cold_rehearsal(self._backend.max_rows, costs)
        longest = min(LONG_PROMPT, self._planned_context() - LONG_OUTPUT)
        self._rehearse(1, _within(REHEARSAL / costs.prefill_token, 16, longest), LONG_OUTPUT)
        return costs

    def _prefills(self) -> StepCosts:
        """Warm the chunk sizes that fit into a step, and measure prefill."""
        target = self._settings.step_target
        largest = min(self._settings.max_prefill_chunk, self._backend.info.context_length // 2)
        size, smallest = SMALLEST_CHUNK, self._settled(lambda: self._prefill(SMALLEST_CHUNK))
        seconds = smallest
        while size * 2 <= largest and seconds < target / 2:
            size *= 2
            seconds = self._prefill(size)
            if seconds > target / 2:  # compiled, or really this slow?
                seconds = self._settled(lambda tokens=size: self._prefill(tokens))  # type: ignore[misc]
        self._deep = max(1, min(max(2 * size, LEAST_DEEP), 512, self._backend.info.context_length - size - 2))
        token = max(seconds - smallest, smallest / 100) / max(1, size - SMALLEST_CHUNK)
        later = self._prefill(size, context=self._deep)
        return StepCosts(
            prefill_base=max(0.0, smallest - SMALLEST_CHUNK * token),
            prefill_token=token,
            prefill_context=max(0.0, later - seconds) / size / self._deep,
        )

    def _plan_chunks(self, costs: StepCosts) -> None:
        """Prefill one long prompt in chunks of each size that fits into a step: chunks begin at multiples of theirs."""
        memory = self._backend.info.memory
        size = 1 << self._settings.max_prefill_chunk.bit_length() - 1
        while size >= LEAST_CHUNK:
            length = self._planned_context() // size * size
            brief = costs.prefill_base + size * costs.prefill_token < self._settings.step_target
            if length and brief and size <= memory.chunk(length):
                batch = self._batch(1, length + 1, GREEDY)
                exhaust(batch.prepare())
                while not batch.ready:
                    batch.advance(size)
            size //= 2

    def _plan_capacities(self) -> None:
        """Decode one row alone in buffers of each size; of more rows attention has a mask, and is not cuDNN's."""
        batch = self._decoding(1, GREEDY)
        for capacity in range(2 * KV_STEP, self._planned_context(), KV_STEP):
            if not batch.stretch(capacity - SPARE):
                return
            batch.next()

    def _planned_context(self) -> int:
        """Tokens of the longest prompt that is planned for."""
        memory = self._backend.info.memory
        room = int(memory.budget * DEEP_SHARE) // max(1, sum(group.bytes_per_token for group in memory.layers))
        return min(PLANNED_CONTEXT, self._backend.info.context_length - 1, room)

    def _settled(self, run: Callable[[], float]) -> float:
        """Seconds of a run once it stops getting faster."""
        before, seconds = run(), run()
        for _ in range(MOST_REPEATS):
            if before < COLDER * seconds:
                break
            before, seconds = seconds, run()
        return min(before, seconds)

    def _cold_rehearsal(self, rows: int, costs: StepCosts) -> bool:
        """Serve made-up requests the way real ones are until that stops getting faster; whether it was cold."""
        prompt, output = self._sizes(costs)
        first, second = self._rehearse(rows, prompt, output), self._rehearse(rows, prompt, output)
        cold = first > REHEARSED * second
        for _ in range(MOST_REPEATS):
            if first < REHEARSED * second:
                break
            first, second = second, self._rehearse(rows, prompt, output)
        return cold

    def _sizes(self, costs: StepCosts) -> tuple[int, int]:
        """Tokens of prompt and output of a rehearsed request."""
        prompt = _within(REHEARSAL / costs.prefill_token, 16, min(REAL_PROMPT, self._backend.info.context_length // 4))
        return prompt, _within(REHEARSAL / (costs.decode_base + costs.decode_row), 8, REAL_OUTPUT)

    def _rehearse(self, rows: int, prompt: int, output: int) -> float:
        """Seconds from the first prompt to the last token of `rows` requests, no prefix of them cached."""
        backend = self._backend
        backend.rebuild(keep_pool=True)
        began = self._clock()
        for uid in range(rows):
            # Every second one shorter: a cohort that is padded, and rows that end apart.
            length, most = (prompt, output) if uid % 2 == 0 else (prompt // 2, output // 2)
            backend.insert(Row(uid=uid, prompt=(uid + 1,) * length, max_tokens=most, sampling=GREEDY, tenant=""))
        left = rows
        while left:
            left -= sum(token.finish_reason is not None for token in backend.step().tokens)
        return self._clock() - began

    def _prefill(self, size: int, context: int = 0) -> float:
        """Seconds of one chunk of `size` tokens after `context` others."""
        batch = self._batch(1, size + context + 1, GREEDY)
        while context > 0:
            context -= batch.advance(min(context, max(size, LEAST_DEEP // 2)))
        began = self._clock()
        batch.advance(size)
        return self._clock() - began

    def _decodes(self, costs: StepCosts) -> StepCosts:
        """Warm the batch sizes, and measure decode."""
        most = self._backend.max_rows
        sizes = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
        seconds = self._decode_sizes(sizes, GREEDY)
        one, all_rows = seconds[1], seconds.get(most) or self._decode(most, GREEDY)
        row = max(0.0, all_rows - one) / max(1, most - 1)
        context = self._context_cost(min(most, DEEP_ROWS))
        return replace(costs, decode_base=max(0.0, one - row), decode_row=row, decode_context=context)

    def _context_cost(self, rows: int) -> float:
        """Seconds by which one token of one row's context makes a decode step longer."""
        info = self._backend.info
        token_bytes = max(1, rows * sum(group.bytes_per_token for group in info.memory.layers))
        most = max(self._deep, min(info.context_length // 2, int(info.memory.budget * DEEP_SHARE) // token_bytes))
        length, before = min(DEEP, most), 0
        batch = self._decoding(rows, GREEDY)
        seconds = shallow = self._steps(batch)
        if not batch.stretch(length):
            batch = self._decoding(rows, GREEDY, self._deep)
            return max(0.0, self._steps(batch) - shallow) / (rows * self._deep)
        deep = self._steps(batch)
        while deep < HIDDEN * shallow and 2 * length <= most:
            before, length, seconds = length, 2 * length, deep
            batch.stretch(length)
            deep = self._steps(batch)
        return max(0.0, deep - seconds) / (rows * (length - before))

    def _decode_sizes(self, sizes: Sequence[int], params: SamplingParams) -> dict[int, float]:
        """Seconds of a step by rows: the smallest size, and the others when its first use was colder."""
        smallest, *others = sizes
        began = self._clock()
        self._decode(smallest, params)
        first = self._clock() - began
        seconds = {smallest: self._decode(smallest, params)}
        second = self._clock() - began - first
        if first > COLDER * second and first - second > NOISE:
            for size in others:
                self._decode(size, params)
                seconds[size] = self._decode(size, params)
        return seconds

    def _decode(self, rows: int, params: SamplingParams) -> float:
        """Seconds of one decode step with `rows` rows; a row also leaves and another joins."""
        batch = self._decoding(rows, params)
        taken = self._steps(batch)
        if rows > 1:
            batch.emit()
            batch.rows[0].leaving = True
            exhaust(batch.drop())
            exhaust(batch.join(self._prefilled(1, params, SHORT_PROMPT), rows))
            batch.next()
        return taken

    def _steps(self, batch: DecodeBatch) -> float:
        """Seconds of one step of a batch, first use apart."""
        batch.next()
        began = self._clock()
        for _ in range(DECODE_STEPS):
            batch.next()
        return (self._clock() - began) / DECODE_STEPS

    def _decoding(self, rows: int, params: SamplingParams, length: int = SHORT_PROMPT) -> DecodeBatch:
        batch = DecodeBatch(self._backend.model, frozenset())
        exhaust(batch.join(self._prefilled(rows, params, length), rows))
        return batch

    def _prefilled(self, rows: int, params: SamplingParams, length: int) -> PrefillBatch:
        batch = self._batch(rows, length, params)
        while not batch.ready:
            batch.advance(min(length, 256))
        return batch

    def _batch(self, rows: int, length: int, params: SamplingParams) -> PrefillBatch:
        backend = self._backend
        prompts = [
            Row(uid=uid, prompt=(0,) * length, max_tokens=1 << 30, sampling=params, tenant="") for uid in range(rows)
        ]
        states = [backend.row_state(row) for row in prompts]
        return PrefillBatch(backend.model, states, [backend.fresh_cache() for _ in states])


def exhaust(chore: Iterator[None]) -> None:
    """Carry out a chore as a whole."""
    for _ in chore:
        pass


def _within(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))
