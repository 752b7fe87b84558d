"""Quantised layers that multiply all rows of a batch as one matrix. Belongs to the generation thread.

mlx's CUDA backend takes an input of (rows, 1, width) for as many products of one row each, every one of which reads all
weights: with mlx 0.32.4 32 rows took an H100 17 ms a step in such products, less than a quarter of that as one of 32.
Its Metal backend, as the source reads, does by itself what is done here.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn


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
