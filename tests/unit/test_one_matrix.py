"""Quantised layers that multiply as one matrix: the rows of a batch, and the layers of one input."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama
from mlx_lm.utils import load_model as load_weights, load_tokenizer

from service.engine import attention
from service.engine.backend import Row
from service.engine.generation import SamplingParams
from service.engine.mlx_backend import MlxBackend
from service.engine.one_matrix import join_products, multiply_in_one
from service.settings import Settings
from tests.tiny import make_tiny_llama

WIDTH, VOCABULARY = 64, 128

BROAD, KEYS = 512, 256
"""Sizes with which the arrays of layers begin at multiples of 256 bytes in those of all."""


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


class Shapes(list[tuple[tuple[int, ...], int]]):
    """Of the products that were made: (shape of the input but for its width, results of each vector), in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product = mx.quantized_matmul

        def seen(x: mx.array, weight: mx.array, *rest: Any, **more: Any) -> mx.array:
            self.append((x.shape[:-1], weight.shape[0]))
            return product(x, weight, *rest, **more)

        monkeypatch.setattr(mx, "quantized_matmul", seen)


def settled() -> int:
    """Bytes of live arrays, once what other tests left is given back; who allocates now gets no larger buffer of it."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


class Attention(nn.Module):  # type: ignore[misc]  # mlx.nn is untyped
    """The layers of one, without what is between them; the keys' and values' are smaller."""

    def __init__(self, *, bias: bool = False, heights: tuple[int, int, int] = (BROAD, KEYS, KEYS), **kind: Any) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")
        for name, height in zip(names, heights, strict=True):
            layer = nn.QuantizedLinear(BROAD, height, bias=bias, **kind)
            if bias:
                layer.bias = mx.random.normal((height,))
            setattr(self, name, layer)
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


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
    shapes = Shapes(monkeypatch)
    after = made(tokens)
    assert mx.allclose(after, before, atol=1e-5)
    assert after.shape == (*shape, VOCABULARY)
    assert [each for each, _ in shapes] == [(1, shape[0] * shape[1])] * 8, "seven of the layer and the head"
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


@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"mode": "mxfp4"}, {"bits": 8}], ids=str)
def test_layers_of_one_input_compute_one_product_of_a_single_vector(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    mx.random.seed(2)
    layers = Attention(**kind)
    one, several = mx.random.normal((1, 1, BROAD)), mx.random.normal((3, 2, BROAD))
    before = [layers(one), layers(several)]
    mx.eval(before)
    multiply_in_one(layers)
    join_products(layers)
    shapes = Shapes(monkeypatch)
    for x, expected in zip((one, several), before, strict=True):
        for got, want in zip(layers(x), expected, strict=True):
            assert got.shape == want.shape
            assert mx.allclose(got, want, atol=1e-5)
    assert shapes == [((1, 1), BROAD + 2 * KEYS), *(((1, 6), height) for height in (BROAD, KEYS, KEYS))]


def test_a_joined_model_takes_the_memory_that_it_took() -> None:
    settled()
    layers = Attention()
    multiply_in_one(layers)
    named = {name: array.shape for name, array in tree_flatten(layers.parameters())}
    before = settled()
    join_products(layers)
    assert settled() == before
    assert {name: array.shape for name, array in tree_flatten(layers.parameters())} == named


def test_each_input_has_its_own_product_and_none_is_kept() -> None:
    layers = Attention()
    multiply_in_one(layers)
    inputs = [mx.random.normal((1, 1, BROAD)) for _ in range(2)]
    wanted = [[layer(x) for layer in (layers.q_proj, layers.k_proj, layers.v_proj)] for x in inputs]
    mx.eval(wanted)
    join_products(layers)
    first, second = inputs
    got = layers.q_proj(first), layers.k_proj(second), layers.q_proj(second), layers.v_proj(first)
    for part, (of, at) in zip(got, ((0, 0), (1, 1), (1, 0), (0, 2)), strict=True):
        assert mx.allclose(part, wanted[of][at], atol=1e-5), "whatever the order in which layers are called"
    layers(first)
    mx.eval(layers(second))
    del got, part, inputs, first, second, wanted
    held = settled()
    layers.q_proj(mx.random.normal((1, 1, BROAD)))  # the others are not asked: the next input takes their place
    mx.eval(layers(mx.random.normal((1, 1, BROAD))))
    assert settled() == held


@pytest.mark.parametrize(("height", "joined"), [(BROAD, "_Part"), (BROAD + 4, "_Linear")])
def test_only_parts_that_begin_where_buffers_do_are_joined(height: int, joined: str) -> None:
    layers = Attention(heights=(height, KEYS, KEYS))
    multiply_in_one(layers)
    join_products(layers)
    assert {type(layers[name]).__name__ for name in ("q_proj", "k_proj", "v_proj")} == {joined}


def test_layers_of_different_kinds_are_not_joined() -> None:
    layers = Attention()
    layers.v_proj = nn.QuantizedLinear(BROAD, KEYS, bias=False, bits=8)
    own = Attention()
    own.k_proj = nn.Linear(BROAD, KEYS)
    for module in (layers, own):
        multiply_in_one(module)
        join_products(module)
        found = [type(each).__name__ for each in module.leaf_modules().values()]
        assert len(found) == 3
        assert "_Part" not in found


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in a folder, its layers large enough to be joined."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"hidden_size": BROAD, "intermediate_size": BROAD, **heads}
    folder = make_tiny_llama(tmp_path_factory.mktemp("models") / "quantised", **sizes)
    made, config = load_weights(folder)
    nn.quantize(made, group_size=64, bits=4)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(made.parameters())))
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    return folder


def test_a_model_loaded_for_cuda_generates_what_mlx_lm_does_alone_and_in_company(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = load_weights(quantised)
    tokenizer = load_tokenizer(quantised, eos_token_ids=[2])
    prompts, lengths = ([7, 8, 9], [30, 31, 32, 33]), (24, 40)
    expected = [
        [reply.token for reply in mlx_lm.stream_generate(plain, tokenizer, prompt, max_tokens=length)]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    assert [len(each) for each in expected] == list(lengths), "none ends by itself"
    monkeypatch.setattr(llama, attention.NAME, base.scaled_dot_product_attention)  # put back at the end
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    model = {"reference": str(quantised), "dequantize_on_cpu": False}
    backend = MlxBackend(Settings(model=model, engine={"memory_budget": 1 << 30}))
    backend.load()
    monkeypatch.undo()
    shapes = Shapes(monkeypatch)
    tokens: list[list[int]] = [[], []]

    def step() -> set[tuple[tuple[int, ...], int]]:
        before = len(shapes)
        for token in backend.step().tokens:
            tokens[token.uid].append(token.token)
        return set(shapes[before:])

    greedy = SamplingParams(temperature=0)
    asked = [
        Row(uid=uid, prompt=tuple(prompt), max_tokens=length, sampling=greedy, tenant="t")
        for uid, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    backend.insert(asked[0])
    while len(tokens[0]) < 8:
        step()
    together = (1, 1), BROAD + 2 * KEYS
    assert together in step(), "alone"
    backend.insert(asked[1])
    while not tokens[1]:
        step()
    assert together not in step(), "in company"
    while len(tokens[0]) < lengths[0]:
        step()
    while len(tokens[1]) < lengths[1] - 4:
        step()
    assert together in step(), "alone again"
    while len(tokens[1]) < lengths[1]:
        step()
    assert tokens == expected
    backend.rebuild()
