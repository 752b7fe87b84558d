"""Attention of several prompts together in plain operations: the same result, and none that cuDNN would plan for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models import base, llama
from mlx_lm.models.cache import make_prompt_cache

from service.engine.attention import NAME, attend_without_plans, attention

ROWS, HEADS, POSITIONS, WIDTH = 3, 4, 5, 16


def arrays(*, shared: int, context: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Queries, keys, values and a mask as of prompts of different length: padded on the left, in larger buffers."""
    mx.random.seed(shared)
    reach = context + POSITIONS
    queries = mx.random.normal((ROWS, POSITIONS, HEADS, WIDTH)).astype(dtype).swapaxes(1, 2)
    keys, values = (mx.random.normal((ROWS, shared, reach + 7, WIDTH)).astype(dtype) for _ in range(2))
    seen = base.create_causal_mask(POSITIONS, offset=context, left_padding=mx.array([0, 2, context]))
    return queries, keys[:, :, :reach], values[:, :, :reach], seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
@pytest.mark.parametrize("context", [0, 9])
@pytest.mark.parametrize("shared", [1, 2, HEADS])
def test_it_is_the_same_as_fused(*, shared: int, context: int, dtype: mx.Dtype, tolerance: float) -> None:
    queries, keys, values, seen = arrays(shared=shared, context=context, dtype=dtype)
    expected = base.scaled_dot_product_attention(
        *(each.astype(mx.float32) for each in (queries, keys, values)), None, scale=0.25, mask=seen
    )
    found = attention(queries, keys, values, None, scale=0.25, mask=seen)
    assert found.dtype == dtype
    assert found.shape == expected.shape == (ROWS, HEADS, POSITIONS, WIDTH)
    assert mx.allclose(found, expected, atol=tolerance)


class Fused:
    """Counts the calls of mlx's own kernel, and how many of them had several positions of several rows."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = self.of_several = 0
        run = mx.fast.scaled_dot_product_attention

        def counted(queries: mx.array, *rest: Any, **more: Any) -> mx.array:
            self.calls += 1
            self.of_several += queries.shape[0] > 1 and queries.shape[2] > 1
            return run(queries, *rest, **more)

        patch.setattr(mx.fast, NAME, counted)


@pytest.mark.parametrize("case", ["alone", "one position", "causal", "additive", "sinks"])
def test_what_has_no_boolean_mask_of_several_rows_and_positions_is_left_to_mlx(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    queries, keys, values, seen = arrays(shared=2, context=4, dtype=mx.float32)
    mask: mx.array | str = seen
    sinks = None
    if case == "alone":
        queries, keys, values, mask = queries[:1], keys[:1], values[:1], seen[:1]
    elif case == "one position":
        queries, mask = queries[:, :, -1:], seen[:, :, -1:]
    elif case == "causal":
        mask = "causal"
    elif case == "additive":
        mask = mx.where(seen, mx.array(0.0), mx.array(-1e9))
    else:
        sinks = mx.zeros((HEADS,))
    fused = Fused(monkeypatch)
    found = attention(queries, keys, values, None, 0.25, mask, sinks)
    assert fused.calls == 1
    assert mx.array_equal(found, base.scaled_dot_product_attention(queries, keys, values, None, 0.25, mask, sinks))


def test_quantised_caches_keep_their_own_attention() -> None:
    queries, keys, values, seen = arrays(shared=2, context=27, dtype=mx.float32)
    wide = [mx.concatenate([each, each], axis=-1) for each in (queries, keys, values)]
    packed = [mx.quantize(each, group_size=32, bits=8) for each in wide[1:]]
    cache = SimpleNamespace(bits=8, group_size=32)
    found = attention(mx.array(wide[0]), packed[0], packed[1], cache, 0.25, seen)  # which scales queries in place
    expected = base.scaled_dot_product_attention(wide[0], packed[0], packed[1], cache, 0.25, seen)
    assert mx.array_equal(found, expected)


def model() -> Any:
    mx.random.seed(2)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **sizes, **heads))


def logits(made: Any, rows: int) -> mx.array:
    """Of the second of two chunks of each row."""
    layers = make_prompt_cache(made)
    cache = [layer.merge([layer] * rows) for layer in layers] if rows > 1 else layers
    tokens = mx.arange(rows * 12).reshape(rows, 12)
    made(tokens[:, :7], cache=cache)
    return made(tokens[:, 7:], cache=cache)


def test_several_prompts_of_a_model_never_meet_the_kernel_that_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    monkeypatch.setattr(llama, NAME, base.scaled_dot_product_attention)  # put back at the end
    fused = Fused(monkeypatch)
    before = logits(made, 3)
    assert fused.of_several == fused.calls == 4
    attend_without_plans(made)
    assert mx.allclose(logits(made, 3), before, atol=1e-4)
    assert fused.calls == 4
    logits(made, 1)
    assert (fused.calls, fused.of_several) == (8, 4)


def test_a_model_with_attention_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ModuleType("own_attention")
    setattr(own, NAME, lambda: None)
    monkeypatch.setitem(sys.modules, own.__name__, own)
    made = nn.Sequential(type("Layer", (nn.Linear,), {"__module__": own.__name__})(4, 4))
    kept = getattr(own, NAME)
    attend_without_plans(made)
    assert getattr(own, NAME) is kept
