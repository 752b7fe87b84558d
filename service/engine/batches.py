"""mlx-lm's batch of prompts being prefilled, adapted.

Belongs to the generation thread. A subclass, not a patch: what it relies on is asserted at import, so an
mlx-lm that changed fails closed (`mlx-lm` is pinned exactly).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import BatchKVCache, KVCache, trim_prompt_cache

from service.engine.backend import Row
from service.engine.memory import KV_STEP
from service.engine.row_cache import in_turns, resized, rounded, row_bytes
from service.engine.sampling import RowSampling


def _assert_api() -> None:
    """Fail at import when mlx-lm's batch class no longer looks the way this file uses it."""
    expected = {
        PromptProcessingBatch.__init__: ["self", "model", "uids", "caches", "tokens"],
        PromptProcessingBatch.filter: ["self", "keep"],
    }
    for function, names in expected.items():
        found = list(inspect.signature(function).parameters)[: len(names)]
        if found != names:
            raise ImportError(f"mlx-lm changed: {function.__qualname__} takes {found}, expected {names}")


_assert_api()


LEAST_PLANNED = 64
"""Positions of the smallest chunk that cuDNN plans for a single prompt: fewer cost an H100 as much."""


MOST_SHAPES = 10_000


def cudnn_plans() -> bool:
    """Whether attention is cuDNN's, which makes a plan for each shape and stride of keys (50 ms on an H100)."""
    return bool(mx.default_device() == mx.Device(mx.gpu) and mx.cuda.is_available())


def trim_plain(cache: list[Any], tokens: int) -> bool:
    """Forget a prompt's newest `tokens`; False where a layer is not of the kind for which cuDNN plans."""
    plain = all(type(layer) is KVCache for layer in cache)
    if plain:
        trim_prompt_cache(cache, tokens)
    return plain


class Shapes:
    """Of chunks that were prefilled, `MOST_SHAPES` at most: then they are forgotten, and seen anew."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int, int]] = set()

    def known(self, shape: tuple[int, int, int]) -> bool:
        """Whether this one was seen before: the first of each is no lesson where it makes cuDNN plan."""
        if shape in self._seen:
            return True
        if len(self._seen) > MOST_SHAPES:
            self._seen.clear()
        self._seen.add(shape)
        return False


@dataclass(slots=True)
class RowState:
    """One row on its way through the batches. `rest` is the part of the prompt not yet prefilled,
    `sampled` counts the tokens drawn, and who is `leaving` the batch is no longer anybody's."""

    row: Row
    sampling: RowSampling
    rest: list[int]
    cached: int = 0
    sampled: int = 0
    leaving: bool = False
    keep_prefix: bool = True


class _Contiguous:
    """A layer of one prompt's cache, whose keys and values are fetched as copies: their strides are then the same for
    all prompts, whatever room their buffers have, and so is the plan."""

    def __init__(self, layer: KVCache) -> None:
        self._layer = layer

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self._layer.update_and_fetch(keys, values)
        return mx.contiguous(keys), mx.contiguous(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class PrefillBatch(PromptProcessingBatch):  # type: ignore[misc]  # mlx_lm is untyped
    """A cohort of prompts on its way into the KV cache: one long prompt over several steps, or several
    short ones that fit into one step together.

    Unlike its base it does not clear mlx's buffer pool after every chunk (80 to 138 ms each on an H100);
    the pool is bounded by `mx.set_cache_limit` instead.
    """

    def __init__(
        self, model: Any, rows: Sequence[RowState], caches: list[list[Any]], *, planned: bool | None = None
    ) -> None:
        heads = [list(state.row.prompt[: state.cached]) for state in rows]
        super().__init__(
            model,
            uids=[state.row.uid for state in rows],
            caches=[],
            tokens=heads,
            samplers=[None for _ in rows],
            logits_processors=[[] for _ in rows],
            max_tokens=[state.row.max_tokens for state in rows],
        )
        self.rows = list(rows)
        self._planned = cudnn_plans() if planned is None else planned
        if len(rows) == 1:  # its own cache: a batched one brings a mask array, which keeps out the fused attention
            (self.prompt_cache,) = caches
        else:
            self.prompt_cache = _merged(caches, self.longest_rest)
        self._even = self._planned and all(type(layer) is KVCache for layer in self.prompt_cache)
        self.unprepared = any(state.cached for state in rows)
        self._chunks = 0

    @property
    def context(self) -> int:
        """Tokens that the longest row has in its cache already."""
        return max(len(tokens) for tokens in self.tokens)

    @property
    def left(self) -> int:
        """Positions, padding included, that are left to prefill."""
        return len(self.rows) * (self.longest_rest - 1)

    @property
    def longest_rest(self) -> int:
        return max(len(state.rest) for state in self.rows)

    def filter(self, keep: list[int]) -> None:
        """Keep the rows at these indices."""
        super().filter(keep)
        self.rows = [self.rows[index] for index in keep]

    def advance(self, count: int) -> int:
        """Prefill up to `count` tokens of every row, or what such a chunk is padded to; never a row's last one. Returns
        positions computed."""
        count = min(count, self.longest_rest - 1)
        self._chunks += 1
        size = self._planned_size(count) if self._even and count else 0
        if size:  # rather tokens than padding
            count = min(size, self.longest_rest - 1)
        pieces = []
        for state in self.rows:
            taken = min(count, len(state.rest) - 1)
            pieces.append(state.rest[:taken])
            del state.rest[:taken]
        width = max(map(len, pieces))
        if width:
            self.unprepared = self.context == 0 and not self.ready
            self._forward(pieces, width, spare=max(0, size - width))
        return width * len(pieces)

    def _planned_size(self, width: int) -> int:
        """The power of two up to which a chunk of `width` is padded; a smaller one where the buffers end before that.

        For the first chunk of a size after a context cuDNN needs 50 ms on an H100. Of these sizes others have had it.
        """
        smallest = KV_STEP if self.context and self.context % KV_STEP == 0 else LEAST_PLANNED  # as long on an H100
        size = max(smallest, 1 << (width - 1).bit_length())
        if (least := self.context & -self.context) >= LEAST_PLANNED:  # chunks of a size begin at its multiples
            size = min(size, least)
        keys = self.prompt_cache[0].keys
        room = rounded(self.context + self.longest_rest) if keys is None else keys.shape[2]
        return size if self.context + size <= room else 1 << (width.bit_length() - 1)

    def _forward(self, pieces: list[list[int]], width: int, spare: int) -> None:
        """`spare` positions of each row are computed and forgotten."""
        lengths = [len(piece) for piece in pieces]
        padding = [width - length for length in lengths]
        for tokens, piece in zip(self.tokens, pieces, strict=True):
            tokens.extend(piece)
        if any(padding):
            for layer in self.prompt_cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        cache = self.prompt_cache
        if self._planned and len(pieces) == 1:
            cache = [_Contiguous(layer) if type(layer) is KVCache else layer for layer in cache]
        padded = [piece + [0] * (pad + spare) for piece, pad in zip(pieces, padding, strict=True)]
        self.model(mx.array(padded), cache=cache)
        for layer in self.prompt_cache:
            if spare:
                layer.trim(spare)
            if any(padding):
                layer.finalize()
        mx.eval([layer.state for layer in self.prompt_cache])

    @property
    def ready(self) -> bool:
        """Whether every row has only its last prompt token left, which is run with the rows that decode."""
        return self.longest_rest == 1

    @property
    def late(self) -> bool:
        """Whether it is ready after several steps. Then it joins the rows that decode in the step after, so that none
        has more to do than a chunk beside them; who needed one step is not made to wait for another."""
        return self.ready and self._chunks > 1

    def prepare(self) -> Iterator[None]:
        """Layer by layer, compute what is lazy and make room for the whole prompt, so that no chunk has to."""
        self.unprepared = False
        row = row_bytes(self.prompt_cache, len(self.rows))
        for group in in_turns(self._prepared(rounded(self.context + self.longest_rest)), row):
            mx.eval([layer.state for layer in group])
            yield

    def _prepared(self, positions: int) -> Iterator[tuple[Any, int]]:
        for layer in self.prompt_cache:
            if type(layer) in (BatchKVCache, KVCache) and layer.keys is not None and layer.keys.shape[2] < positions:
                layer.keys, layer.values = (resized(a, a.shape[0], positions) for a in (layer.keys, layer.values))
            yield layer, layer.nbytes


def _merged(caches: Sequence[list[Any]], more: int) -> list[Any]:
    """Several prompts' caches as one with room for `more` positions."""
    return [
        _stacked(layers, more) if all(type(layer) is KVCache for layer in layers) else layers[0].merge(layers)
        for layers in map(list, zip(*caches, strict=True))
    ]


def _stacked(layers: Sequence[KVCache], more: int) -> BatchKVCache:
    lengths = [layer.offset for layer in layers]
    longest = max(lengths)
    padding, capacity = [longest - length for length in lengths], rounded(longest + more)
    batch = BatchKVCache(padding)
    if longest:
        batch.keys, batch.values = (
            _rows([getattr(layer, name) for layer in layers], lengths, padding, capacity) for name in ("keys", "values")
        )
        batch.offset, batch._idx = batch.offset + longest, longest  # noqa: SLF001 -- as mlx-lm's own `merge`
    return batch


def _rows(arrays: Sequence[Any], lengths: Sequence[int], padding: Sequence[int], capacity: int) -> mx.array:
    """One buffer with the first tokens of each array behind its padding; an empty one is None."""
    like = next(array for array in arrays if array is not None)
    buffer = mx.zeros((len(arrays), like.shape[1], capacity, like.shape[3]), like.dtype)
    for row, (array, length, skip) in enumerate(zip(arrays, lengths, padding, strict=True)):
        if length:
            buffer[row : row + 1, :, skip : skip + length] = array[:, :, :length]
    return buffer
