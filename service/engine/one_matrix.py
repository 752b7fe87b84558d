"""Quantised layers that multiply as one matrix what models multiply in parts. Belongs to the generation thread.

mlx's CUDA backend takes an input of (rows, 1, width) for as many products of one row each, every one of which reads all
weights: with mlx 0.32.4 32 rows took an H100 17 ms a step in such products, less than a quarter of that as one of 32.
Its Metal backend, as the source reads, does by itself what `multiply_in_one` does.

A step of one row has so little to compute that it takes as long as its kernels take to be launched. `join_products`
makes four products of a llama layer's seven then, and the step takes 0.88 of the time (1B parameters, H100). Of several
rows it does not: parts of their product would have to be copied, and 32 rows took 1.03 of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx import nn

SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that mlx-lm's models give the same input, one after the other, and leave it as it is in between."""

ARRAYS = ("weight", "scales", "biases", "bias")

ALIGNMENT = 256
"""Bytes at whose multiples mlx's own buffers begin; kernels read several numbers at a time."""


class _Linear(nn.QuantizedLinear):  # type: ignore[misc]  # mlx.nn is untyped
    def __call__(self, x: mx.array) -> mx.array:
        if not _of_rows(x):
            return super().__call__(x)
        return super().__call__(_flat(x)).reshape(*x.shape[:-1], -1)


class _Embedding(nn.QuantizedEmbedding):  # type: ignore[misc]  # as above
    def as_linear(self, x: mx.array) -> mx.array:
        if not _of_rows(x):
            return super().as_linear(x)
        return super().as_linear(_flat(x)).reshape(*x.shape[:-1], -1)


def multiply_in_one(model: Any) -> None:
    """Change a model's quantised layers in place; what they compute stays the same. A model's own kinds are left."""
    for module in model.modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = _Linear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = _Embedding


def _of_rows(x: mx.array) -> bool:
    """Whether it is (rows, positions, width) of several rows: one alone is a matrix; it is spared operations."""
    return bool(x.ndim == 3 and x.shape[0] > 1)  # noqa: PLR2004 -- those three


def _flat(x: mx.array) -> mx.array:
    return x.reshape(1, -1, x.shape[-1])


class _Product:
    """The weights of layers that have the same input, as one matrix, and its product with the newest input."""

    def __init__(self, layers: Sequence[_Linear]) -> None:
        first, heights = layers[0], [layer.weight.shape[0] for layer in layers]
        self.width = first.scales.shape[1] * first.group_size
        self._ends = [sum(heights[: at + 1]) for at in range(len(heights))]
        self._whole = nn.QuantizedLinear(self.width, 1, False, first.group_size, first.bits, first.mode)
        for name in _arrays(first):
            self._whole[name] = mx.concatenate([layer[name] for layer in layers])
        self._taken = 0
        self._input: mx.array | None = None
        self._parts: list[mx.array] = []

    def views(self) -> Iterator[dict[str, mx.array]]:
        """Each layer's own arrays, which are parts of the whole ones and take no memory."""
        for begin, end in pairwise([0, *self._ends]):
            yield {name: array[begin:end] for name, array in _arrays(self._whole).items()}

    def part(self, at: int, x: mx.array) -> mx.array:
        """Layer `at`'s; the first that is asked for computes all, the last one lets go of them."""
        if x is not self._input:
            self._input, self._taken = x, 0
            self._parts = mx.split(self._whole(x), self._ends[:-1], axis=-1)
        part = self._parts[at]
        self._taken += 1
        if self._taken == len(self._parts):
            self._input, self._parts = None, []
        return part


class _Part(_Linear):
    """One of the layers of a `product`, which is its own where there is more than one vector."""

    product: _Product
    at: int

    def __call__(self, x: mx.array) -> mx.array:
        return self.product.part(self.at, x) if x.size == self.product.width else super().__call__(x)


def join_products(model: Any) -> None:
    """Change layers that stand `SIDE_BY_SIDE` in place, after `multiply_in_one`: of a single vector they compute one
    product. What they compute stays the same, and so does the memory they take."""
    for module in model.modules():
        for names in SIDE_BY_SIDE:
            layers = [module.get(name) for name in names]
            if all(type(layer) is _Linear for layer in layers) and _alike(layers):
                _join(layers)


def _join(layers: Sequence[_Linear]) -> None:
    product = _Product(layers)
    for at, (layer, views) in enumerate(zip(layers, product.views(), strict=True)):
        layer.update(views)
        layer.__class__ = _Part
        layer.product, layer.at = product, at
    mx.eval([layer.parameters() for layer in layers])


def _alike(layers: Sequence[_Linear]) -> bool:
    """Whether they can be one matrix, in whose memory each begins where a buffer of its own might."""
    kinds = [
        (layer.group_size, layer.bits, layer.mode, [(name, a.shape[1:], a.dtype) for name, a in _arrays(layer).items()])
        for layer in layers
    ]
    sizes = [array.nbytes for layer in layers[:-1] for array in _arrays(layer).values()]
    return all(kind == kinds[0] for kind in kinds) and not any(size % ALIGNMENT for size in sizes)


def _arrays(layer: nn.QuantizedLinear) -> dict[str, mx.array]:
    return {name: layer[name] for name in ARRAYS if layer.get(name) is not None}
