"""Attention of several prompts together, without cuDNN. Belongs to the generation thread.

Prompts that are prefilled together have a mask, and with one cuDNN makes a plan for each number of rows, width, context
and capacity of the keys: 55 to 75 ms on an H100, up to a second where it compiles a kernel. Of cohorts whose prompts
are cached hardly two are alike, and what is left of them takes 10 to 50 ms. So their attention is made of mlx's plain
operations, as mlx does it where it has no kernel; one prompt alone, which has no mask, stays with cuDNN.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

NAME = "scaled_dot_product_attention"
"""By which mlx-lm's models import it from `base`."""

_fused = base.scaled_dot_product_attention


def _assert_api() -> None:
    """Fail at import when mlx-lm's function no longer takes what this file's takes."""
    expected = list(inspect.signature(attention).parameters)
    if (found := list(inspect.signature(_fused).parameters)) != expected:
        raise ImportError(f"mlx-lm changed: {NAME} takes {found}, expected {expected}")


def attend_without_plans(model: Any) -> None:
    """Give the modules that a model's layers are written in `attention`, where they have mlx-lm's: for good, and for
    all models of the same kind."""
    for name in {type(module).__module__ for module in model.modules()}:
        if getattr(sys.modules[name], NAME, None) is _fused:
            setattr(sys.modules[name], NAME, attention)


def attention(  # noqa: PLR0917 -- mlx-lm's signature
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """As mlx-lm's function; of several rows of several positions with a boolean mask, in plain operations.

    `queries` are (rows, heads, positions, width), `keys` and `values` (rows, key heads, reach, width), where several
    heads may share one of the keys'; `mask` is (rows or 1, 1, positions, reach), True where a position is seen.
    """
    if not isinstance(mask, mx.array) or mask.dtype != mx.bool_ or sinks is not None or hasattr(cache, "bits"):
        return _fused(queries, keys, values, cache, scale, mask, sinks)
    rows, heads, positions, width = queries.shape
    if rows == 1 or positions == 1:
        return _fused(queries, keys, values, cache, scale, mask, sinks)
    shared, reach = keys.shape[1:3]
    # Heads that share keys are one matrix: a product for each of them would read the keys as often.
    grouped = (queries * scale).reshape(rows, shared, -1, width)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, shared, heads // shared, positions, reach)
    scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
    shares = mx.softmax(scores, axis=-1, precise=True).reshape(rows, shared, -1, reach)
    return (shares @ values).reshape(rows, heads, positions, -1)


_assert_api()
