"""Quantised layers over the rows of a batch as one matrix: the same products, of another shape."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx import nn
from mlx_lm.models import llama

from service.engine.one_matrix import multiply_in_one

WIDTH, VOCABULARY = 64, 128


def model(*, tied: bool) -> Any:
    """A quantised llama of one layer; with `tied` its embedding is its head as well."""
    mx.random.seed(1)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=1,
        intermediate_size=2 * WIDTH,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    made = llama.Model(arguments)
    nn.quantize(made, group_size=32, bits=4)
    mx.eval(made.parameters())
    return made


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [(5, 1), (1, 7), (3, 4)], ids=["decoding", "one prompt", "several prompts"])
def test_all_rows_are_multiplied_as_one_matrix_and_the_logits_are_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], *, tied: bool
) -> None:
    made = model(tied=tied)
    tokens = mx.random.randint(0, VOCABULARY, shape)
    before = made(tokens)
    mx.eval(before)
    parameters = dict(made.parameters())
    multiply_in_one(made)
    shapes: list[tuple[int, ...]] = []
    product = mx.quantized_matmul

    def seen(x: mx.array, *rest: Any, **more: Any) -> mx.array:
        shapes.append(x.shape[:-1])
        return product(x, *rest, **more)

    monkeypatch.setattr(mx, "quantized_matmul", seen)
    after = made(tokens)
    assert mx.allclose(after, before, atol=1e-5)
    assert after.shape == (*shape, VOCABULARY)
    assert shapes == [(1, shape[0] * shape[1])] * 8, "seven of the layer and the head"
    assert dict(made.parameters()).keys() == parameters.keys()


def test_a_single_vector_is_as_before() -> None:
    layer = nn.QuantizedLinear(WIDTH, WIDTH)
    vector = mx.random.normal((WIDTH,))
    before = layer(vector)
    multiply_in_one(nn.Sequential(layer))
    assert mx.array_equal(layer(vector), before)


def test_layers_of_other_kinds_are_left_alone() -> None:
    class Own(nn.QuantizedLinear):  # type: ignore[misc]  # mlx.nn is untyped
        pass

    layers = [Own(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Embedding(4, WIDTH)]
    multiply_in_one(nn.Sequential(*layers))
    assert [type(layer) for layer in layers] == [Own, nn.Linear, nn.Embedding]
