"""mlx-lm's two batches, adapted: prompts being prefilled, and rows being decoded.

Belongs to the generation thread. Subclasses, not patches: what they rely on is asserted at import, so an
mlx-lm that changed fails closed (`mlx-lm` is pinned exactly).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch, StopSequences

from service.engine.backend import Row
from service.engine.sampling import RowProcessors, Sampler


def _assert_api() -> None:
    """Fail at import when mlx-lm's batch classes no longer look the way this file uses them."""
    expected = {
        PromptProcessingBatch.__init__: ["self", "model", "uids", "caches", "tokens"],
        PromptProcessingBatch.filter: ["self", "keep"],
        GenerationBatch.__init__: ["self", "model", "uids", "inputs", "prompt_cache", "tokens", "samplers"],
        GenerationBatch.extend: ["self", "batch"],
        GenerationBatch.filter: ["self", "keep"],
        GenerationBatch.next: ["self"],
        GenerationBatch._step: ["self"],  # noqa: SLF001  overridden below
    }
    for function, names in expected.items():
        found = list(inspect.signature(function).parameters)[: len(names)]
        if found != names:
            raise ImportError(f"mlx-lm changed: {function.__qualname__} takes {found}, expected {names}")


_assert_api()


@dataclass(slots=True)
class RowState:
    """One row on its way through the batches. `rest` is the part of the prompt not yet prefilled."""

    row: Row
    sampler: Sampler
    processors: RowProcessors | None
    rest: list[int]
    cached: int = 0


class PrefillBatch(PromptProcessingBatch):  # type: ignore[misc]  # mlx_lm is untyped
    """A cohort of prompts on its way into the KV cache: one long prompt over several steps, or several
    short ones that fit into one step together.

    Unlike its base it does not clear mlx's buffer pool after every chunk (80 to 138 ms each on an H100);
    the pool is bounded by `mx.set_cache_limit` instead.
    """

    def __init__(self, model: Any, rows: Sequence[RowState], caches: list[list[Any]], *, merge: bool) -> None:
        heads = [list(state.row.prompt[: state.cached]) for state in rows]
        super().__init__(
            model,
            uids=[state.row.uid for state in rows],
            caches=caches if merge else [],
            tokens=heads,
            samplers=[state.sampler for state in rows],
            logits_processors=[[state.processors] if state.processors else [] for state in rows],
            max_tokens=[state.row.max_tokens for state in rows],
        )
        if not merge:
            (self.prompt_cache,) = caches
        self.rows = list(rows)

    @property
    def context(self) -> int:
        """Tokens that the longest row has in its cache already."""
        return max(len(tokens) for tokens in self.tokens)

    @property
    def longest_rest(self) -> int:
        return max(len(state.rest) for state in self.rows)

    def filter(self, keep: list[int]) -> None:
        """Keep the rows at these indices."""
        super().filter(keep)
        self.rows = [self.rows[index] for index in keep]

    def advance(self, count: int) -> int:
        """Prefill up to `count` tokens of every row, never its last one; returns positions computed."""
        pieces = []
        for state in self.rows:
            taken = min(count, len(state.rest) - 1)
            pieces.append(state.rest[:taken])
            del state.rest[:taken]
        width = max(map(len, pieces))
        if width:
            self._forward(pieces, width)
        return width * len(pieces)

    def _forward(self, pieces: list[list[int]], width: int) -> None:
        lengths = [len(piece) for piece in pieces]
        padding = [width - length for length in lengths]
        for tokens, piece in zip(self.tokens, pieces, strict=True):
            tokens.extend(piece)
        if any(padding):
            for layer in self.prompt_cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        self.model(mx.array([p + [0] * pad for p, pad in zip(pieces, padding, strict=True)]), cache=self.prompt_cache)
        if any(padding):
            for layer in self.prompt_cache:
                layer.finalize()
        mx.eval([layer.state for layer in self.prompt_cache])

    def into_decode(self, eos: StopSequences) -> DecodeBatch:
        """Run every row's last prompt token and hand the rows over; this batch is spent."""
        last = mx.array([state.rest[0] for state in self.rows])
        return DecodeBatch(self, last, eos)


class DecodeBatch(GenerationBatch):  # type: ignore[misc]  # mlx_lm is untyped
    """Rows that produce one token a step.

    Differs from its base in three things: rows with an equal sampler are drawn in one call even when the
    batch is mixed; log-probabilities are not kept per row (nobody asked for them yet); and an exception
    out of one row's processors or sampler fails that row alone (`failed`).
    """

    _next_tokens: mx.array

    def __init__(self, prefill: PrefillBatch, inputs: mx.array, eos: StopSequences) -> None:
        self.failed: dict[int, Exception] = {}
        self.tenants = {state.row.uid: state.row.tenant for state in prefill.rows}
        super().__init__(
            prefill.model,
            prefill.uids,
            inputs,
            prefill.prompt_cache,
            prefill.tokens,
            prefill.samplers,
            prefill.fallback_sampler,
            prefill.logits_processors,
            [eos] * len(prefill.uids),
            prefill.max_tokens,
        )

    def extend(self, batch: DecodeBatch) -> None:
        """Take over another batch's rows; the other is spent."""
        super().extend(batch)
        self.failed.update(batch.failed)
        self.tenants.update(batch.tenants)

    @property
    def context(self) -> int:
        """Tokens that the longest row has in its cache."""
        return max(map(len, self.tokens))

    def states(self) -> list[Any]:
        """The arrays that the next step needs, layer by layer, the sampled tokens last."""
        return [*(layer.state for layer in self.prompt_cache), self._next_tokens]

    def extract_cache(self, idx: int) -> list[Any]:
        """One row's cache; the cache itself where it cannot be batched."""
        return [layer.extract(idx) if hasattr(layer, "extract") else layer for layer in self.prompt_cache]

    def filter(self, keep: list[int]) -> None:
        """Keep the rows at these indices."""
        super().filter(keep)
        kept = set(self.uids)
        self.tenants = {uid: tenant for uid, tenant in self.tenants.items() if uid in kept}

    def _step(self) -> tuple[list[int], list[None]]:
        """Launch the next step, then wait for the one before: Python works while the device computes."""
        inputs = self._current_tokens = self._next_tokens
        logits = self.model(inputs[:, None], cache=self.prompt_cache)[:, -1, :]
        logits = self._process(inputs, logits)
        self._next_tokens = self._sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        self._current_logprobs = [None] * len(self.uids)
        self._next_logprobs = [None] * len(self.uids)
        mx.async_eval(self._next_tokens)
        tokens = inputs.tolist()
        for known, token in zip(self.tokens, tokens, strict=True):
            known.append(token)
        return tokens, self._current_logprobs

    def _process(self, inputs: mx.array, logits: mx.array) -> mx.array:
        if not any(self.logits_processors):
            return logits
        rows = []
        for index, processors in enumerate(self.logits_processors):
            row = logits[index : index + 1]
            for processor in processors:
                row = self._guarded(index, processor, inputs[index : index + 1], row, fallback=row)
            rows.append(row)
        return mx.concatenate(rows, axis=0)

    def _sample(self, logprobs: mx.array) -> mx.array:
        first = self.samplers[0]
        if all(sampler is first for sampler in self.samplers):
            return self._draw(range(len(self.uids)), first, logprobs)
        groups: dict[int, list[int]] = {}
        for index, sampler in enumerate(self.samplers):
            groups.setdefault(id(sampler), []).append(index)
        drawn = [self._draw(rows, self.samplers[rows[0]], logprobs[mx.array(rows)]) for rows in groups.values()]
        order = [index for rows in groups.values() for index in rows]
        position = sorted(range(len(order)), key=order.__getitem__)
        return mx.concatenate(drawn)[mx.array(position)]

    def _draw(self, rows: Sequence[int], sampler: Sampler, logprobs: mx.array) -> mx.array:
        """One call for rows that share a sampler; when it raises, each of them alone."""
        if len(rows) == 1:
            return self._guarded(rows[0], sampler, logprobs, fallback=mx.zeros(1, dtype=mx.uint32))
        drawn = self._guarded(None, sampler, logprobs, fallback=None)
        if drawn is not None:
            return drawn
        return mx.concatenate([self._draw([row], sampler, logprobs[at : at + 1]) for at, row in enumerate(rows)])

    def _guarded(self, index: int | None, function: Any, *arguments: mx.array, fallback: Any) -> Any:
        """Call one row's own code; its exception becomes that row's failure, reported by the next step."""
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001  the one row's processors of the architecture rule; the worker logs it
            if index is not None:
                self.failed.setdefault(self.uids[index], error)
            return fallback
