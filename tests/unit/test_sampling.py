"""Samplers and penalties: shared when equal, seeded when asked, and OpenAI's arithmetic."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from service.engine.generation import SamplingParams
from service.engine.sampling import RowProcessors, Samplers

VOCAB = 8


def logits(*values: float) -> mx.array:
    return mx.array([list(values) + [0.0] * (VOCAB - len(values))])


def after(params: SamplingParams, tokens: list[int], row: mx.array, prompt: tuple[int, ...] = (1,)) -> np.ndarray:
    """The logits that a row sees once `tokens` were generated."""
    processors = RowProcessors(params, prompt, VOCAB)
    out = processors(mx.array([prompt[-1]]), row)
    for token in tokens:
        out = processors(mx.array([token]), row)
    found: np.ndarray = np.array(out)[0]
    return found


def test_equal_parameters_share_a_sampler_and_others_do_not() -> None:
    samplers = Samplers(vocab_size=VOCAB)
    warm = SamplingParams(temperature=0.7, top_p=0.9)
    assert samplers.get(warm) is samplers.get(SamplingParams(temperature=0.7, top_p=0.9, presence_penalty=1.0))
    assert samplers.get(warm) is not samplers.get(SamplingParams(temperature=0.8, top_p=0.9))
    assert samplers.get(SamplingParams(temperature=0)) is samplers.get(SamplingParams(temperature=0, seed=3, top_p=0.5))
    seeded = SamplingParams(temperature=0.7, seed=1)
    assert samplers.get(seeded) is not samplers.get(seeded)


def test_the_table_of_samplers_is_bounded() -> None:
    samplers = Samplers(vocab_size=VOCAB, capacity=4)
    first = samplers.get(SamplingParams(temperature=0.5))
    for index in range(10):
        samplers.get(SamplingParams(temperature=1 + index / 100))
    assert samplers.get(SamplingParams(temperature=0.5)) is not first
    assert len(samplers._shared) == 4


@pytest.mark.parametrize("seed", [None, 5, -1, 2**63 - 1])
@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0.0}, {"temperature": 1e-4}]
)
def test_narrow_parameters_are_greedy(narrow: dict[str, float], seed: int | None) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": seed, **narrow})  # type: ignore[arg-type]
    row = logits(1, 5, 2)
    assert Samplers(vocab_size=VOCAB).get(params)(row - mx.logsumexp(row)).tolist() == [1]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_top_k_as_wide_as_the_vocabulary_is_off(seed: int | None) -> None:
    sampler = Samplers(vocab_size=VOCAB).get(SamplingParams(temperature=1.0, top_k=VOCAB, seed=seed))
    assert 0 <= sampler(logits(1, 2, 3)).item() < VOCAB


def test_sampling_follows_the_distribution() -> None:
    sampler = Samplers(vocab_size=VOCAB).get(SamplingParams(temperature=1.0, seed=11))
    row = mx.log(mx.array([[0.5, 0.3, 0.2] + [1e-9] * 5]))
    drawn = np.bincount([sampler(row).item() for _ in range(2000)], minlength=VOCAB) / 2000
    assert np.allclose(drawn[:3], [0.5, 0.3, 0.2], atol=0.05)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    out = after(params, [2, 2, 3], logits(1, 1, 1, 1), prompt=(1, 0))
    assert np.allclose(out[:4], [1, 1, 1 - 1 - 1.0, 1 - 1 - 0.5])


def test_repetition_penalises_prompt_and_output_by_sign() -> None:
    out = after(SamplingParams(repetition_penalty=2.0), [3], logits(4, -4, 4, -4, 4), prompt=(0, 1))
    assert np.allclose(out[:5], [2, -8, 4, -8, 4])


def test_logit_bias_is_added() -> None:
    out = after(SamplingParams(logit_bias=((2, 50.0), (0, -100.0))), [], logits(1, 1, 1))
    assert np.allclose(out[:3], [-99, 1, 51])


def test_parameters_that_change_nothing_need_no_processor() -> None:
    assert not RowProcessors.needed(SamplingParams(temperature=0.3, top_p=0.5, seed=1))
    for changing in ({"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}):
        assert RowProcessors.needed(SamplingParams(**changing))  # type: ignore[arg-type]
    assert RowProcessors.needed(SamplingParams(logit_bias=((0, 1.0),)))


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.79}, {0, 1}),
        ({"top_p": 0.85}, {0, 1, 2}),
        ({"min_p": 0.39}, {0, 1}),
        ({"min_p": 0.7}, {0}),
        ({"top_k": 3, "min_p": 0.5}, {0, 1}),
    ],
)
@pytest.mark.parametrize("seed", [None, 3])
def test_cuts_keep_exactly_the_tokens_they_promise(cut: dict[str, float], kept: set[int], seed: int | None) -> None:
    sampler = Samplers(vocab_size=VOCAB).get(SamplingParams(temperature=1.0, seed=seed, **cut))  # type: ignore[arg-type]
    row = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * 4] * 400))
    assert set(sampler(row).tolist()) == kept


def test_temperature_comes_before_the_cut() -> None:
    """At a low temperature the first token alone has the mass; at a high one it does not."""
    row = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * 4] * 400))
    samplers = Samplers(vocab_size=VOCAB)
    cold = samplers.get(SamplingParams(temperature=0.2, top_p=0.8))
    hot = samplers.get(SamplingParams(temperature=1.5, top_p=0.8))
    assert set(cold(row).tolist()) == {0}
    assert set(hot(row).tolist()) >= {0, 1, 2}
