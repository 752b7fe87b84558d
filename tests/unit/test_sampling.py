"""Sampling: each row as it would be drawn alone, seeded when asked, and OpenAI's arithmetic."""

from __future__ import annotations

from random import Random
from shutil import which

import mlx.core as mx
import numpy as np
import pytest

from service.engine.generation import SamplingParams
from service.engine.sampling import (
    RowSampling,
    Sampling,
    _among_likeliest,
    _from,
    _hits,
    _less_by_count,
    _less_if_there,
    adjusts,
)

VOCAB = 8


def logits(*values: float) -> mx.array:
    return mx.array([list(values) + [0.0] * (VOCAB - len(values))])


def draw(params: SamplingParams, row: mx.array) -> list[int]:
    """A token for each row of logits, all of them with `params`."""
    rows = [RowSampling(params) for _ in range(row.shape[0])]
    found: list[int] = Sampling(rows, row.shape[-1])(mx.zeros(row.shape[0], dtype=mx.uint32), row).tolist()
    return found


def after(params: SamplingParams, tokens: list[int], row: mx.array, prompt: tuple[int, ...] = (1,)) -> np.ndarray:
    """The logits that a row sees once `tokens` were generated, less what makes them log-probabilities."""
    sampling = Sampling([RowSampling(params, prompt)], VOCAB)
    assert sampling._adjust is not None
    out = row
    for token in (prompt[-1], *tokens):
        out = sampling._adjust._adjusted(mx.array([token]), row)
        sampling._adjust.advance()
    found: np.ndarray = np.array(out)[0]
    return found


MIXED = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, seed=2, top_p=0.8),
    SamplingParams(temperature=0.9, seed=3, top_k=5),
    SamplingParams(temperature=0.9, seed=3, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(temperature=1.0, seed=4, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=5, logit_bias=((3, 2.0), (7, -4.0))),
)


def test_rows_that_all_differ_are_drawn_as_each_would_be_alone_also_when_rows_join_and_leave() -> None:
    prompts = [(index, index + 1, index + 2) for index in range(len(MIXED))]
    steps = [mx.random.normal((len(MIXED), 50), key=mx.random.key(step)) * 2 for step in range(12)]

    def run(groups: list[list[int]]) -> dict[int, list[int]]:
        """The rows' tokens over all steps; `groups` says who is drawn together in each."""
        rows = [RowSampling(params, prompt) for params, prompt in zip(MIXED, prompts, strict=True)]
        drawn: dict[int, list[int]] = {index: [] for index in range(len(rows))}
        sampling, members = None, None
        for step, group in zip(steps, groups, strict=True):
            if group != members:
                if sampling is not None:
                    sampling.release()
                sampling, members = Sampling([rows[index] for index in group], 50), group
            assert sampling is not None
            inputs = mx.array([(drawn[index] or prompts[index])[-1] for index in group])
            for index, token in zip(group, sampling(inputs, step[mx.array(group)]).tolist(), strict=True):
                drawn[index].append(token)
        return drawn

    everybody = list(range(len(MIXED)))
    together = run([everybody] * 12)
    assert len({tuple(tokens) for tokens in together.values()}) == len(MIXED)
    for index in everybody:
        assert run([[index]] * 12)[index] == together[index]
    changing = [everybody] * 3 + [[6, 1, 4]] * 3 + [[4, 6, 1, 5]] * 3 + [[1]] * 3
    for index, tokens in run(changing).items():
        if index == 1:  # there all the time; the others' steps are other logits
            assert tokens == together[index]
        assert tokens[:3] == together[index][:3]


def test_penalties_survive_a_change_of_the_batch() -> None:
    rows = [RowSampling(SamplingParams(temperature=0, frequency_penalty=1.0)) for _ in range(2)]
    even = mx.array([[3.5, 3.0, 0.0]] * 2)
    drawn = [[0], [0]]
    for members in ([0, 1], [0, 1], [0], [0], [0, 1]):
        sampling = Sampling([rows[index] for index in members], 3)
        inputs = mx.array([drawn[index][-1] for index in members])
        for index, token in zip(members, sampling(inputs, even[: len(members)]).tolist(), strict=True):
            drawn[index].append(token)
        sampling.release()
    assert drawn == [[0, 0, 1, 0, 1, 0], [0, 0, 1, 0]]


def test_without_a_seed_two_rows_draw_apart() -> None:
    flat = mx.zeros((64, 1000))
    assert len(set(draw(SamplingParams(temperature=1.0), flat))) > 40
    assert len(set(draw(SamplingParams(temperature=1.0, seed=4), flat))) == 1


def test_neighbouring_seeds_and_steps_share_no_draw() -> None:
    rows = [RowSampling(SamplingParams(temperature=1.0, seed=seed)) for seed in range(20)]
    sampling = Sampling(rows, 1_000_000)
    seen = [token for _ in range(5) for token in sampling(mx.zeros(20), mx.zeros((20, 1_000_000))).tolist()]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("seed", [None, 5, -1, 2**63 - 1])
@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0.0}, {"temperature": 1e-4}]
)
def test_narrow_parameters_are_greedy(narrow: dict[str, float], seed: int | None) -> None:
    params = SamplingParams(**{"temperature": 1.0, "seed": seed, **narrow})  # type: ignore[arg-type]
    row = logits(1, 5, 2)
    assert draw(params, row) == [1]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_top_k_as_wide_as_the_vocabulary_is_off(seed: int | None) -> None:
    for width in (VOCAB, VOCAB + 1):
        drawn = draw(SamplingParams(temperature=1.0, top_k=width, seed=seed), mx.zeros((200, VOCAB)))
        assert len(set(drawn)) == (VOCAB if seed is None else 1)


def test_sampling_follows_the_distribution() -> None:
    sampling = Sampling([RowSampling(SamplingParams(temperature=1.0, seed=11))], VOCAB)
    row = mx.log(mx.array([[0.5, 0.3, 0.2] + [1e-9] * 5]))
    drawn = np.bincount([sampling(mx.zeros(1), row).item() for _ in range(2000)], minlength=VOCAB) / 2000
    assert np.allclose(drawn[:3], [0.5, 0.3, 0.2], atol=0.05)


def test_every_token_has_its_share_of_a_large_vocabulary() -> None:
    """Chi squared over 500 tokens of unlike shares: 0.999 of right samplers stay below the bound."""
    shares = np.linspace(1, 3, 500) / 1000
    row = mx.broadcast_to(mx.log(mx.array(shares)), (20_000, 500))
    rows = [RowSampling(SamplingParams(temperature=1.0, seed=seed)) for seed in range(20_000)]
    drawn = np.bincount(Sampling(rows, 500)(mx.zeros(20_000), row).tolist(), minlength=500)
    assert ((drawn - shares * 20_000) ** 2 / (shares * 20_000)).sum() < 602


class Scripted(Random):
    """Draws always this share of what can be drawn."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def getrandbits(self, k: int, /) -> int:
        return min(int(self._share * (1 << k)), (1 << k) - 1)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 17), (0.49, 17), (0.51, 49_999), (1.0, 49_999)])
def test_a_draw_at_the_edges_of_the_sum_is_of_what_was_kept(share: float, expected: int) -> None:
    """Of 60,000 tokens two are kept, of equal shares; sums of the others' zeros come before, between and after."""
    logits = mx.random.normal((1, 60_000), key=mx.random.key(1))
    logits[0, 17] = logits[0, 49_999] = 9.0
    row = RowSampling(SamplingParams(temperature=1.0, top_k=2), random=Scripted(share))
    assert Sampling([row], 60_000)(mx.zeros(1), logits).tolist() == [expected]


def test_one_share_of_any_sum_is_still_a_draw() -> None:
    """The largest draw, of float32 sums of every size: the product stays below, so that some token is beyond it."""
    largest = RowSampling(SamplingParams(), random=Scripted(1.0)).draw
    sums = np.exp2(np.random.default_rng(1).uniform(-1, 1, 100_000)).astype(np.float32)
    assert largest < 1
    assert (np.float32(largest) * sums < sums).all()


def test_a_draw_that_was_not_used_up_is_drawn_again() -> None:
    row, flat = RowSampling(SamplingParams(temperature=1.0, seed=3)), mx.zeros((1, 100_000))
    sampling = Sampling([row], 100_000)
    assert sampling._random is not None
    first = sampling._random(flat).item()
    assert sampling(mx.zeros(1), flat).item() == first
    assert sampling(mx.zeros(1), flat).item() != first


def test_what_a_gpu_runs_fused_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions compiled as on a GPU, for the CPU; which needs a compiler."""
    if which("g++") is None:
        pytest.skip("mlx compiles for a CPU with g++")
    shape, key = (4, 1000), mx.random.key
    shares, logits = mx.softmax(mx.random.normal(shape, key=key(1)), axis=-1), mx.random.normal(shape, key=key(2))
    column, counts = mx.random.uniform(shape=(4, 1), key=key(3)), mx.random.randint(0, 3, shape, key=key(4))
    ascending, total = mx.sort(shares, axis=-1), mx.cumsum(shares, axis=-1)
    cases = (
        (_less_if_there, (logits, counts, counts > 1, column + 1)),
        (_less_by_count, (logits, counts, column, column * 2)),
        (_among_likeliest, (ascending, mx.cumsum(ascending, axis=-1), column, ascending[:, -1:])),
        (_from, (column / 500, shares)),
        (_hits, (shares, total, total[:, -1:], column)),
    )
    plain = [function(*arrays) for function, arrays in cases]
    assert [np.unique(found).size > 1 for found in plain] == [True] * len(cases)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for (function, arrays), expected in zip(cases, plain, strict=True):
        assert np.allclose(function(*arrays), expected, rtol=1e-6, atol=0)


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


def test_parameters_that_change_no_logits_cost_nothing() -> None:
    assert not adjusts(SamplingParams(temperature=0.3, top_p=0.5, seed=1))
    for changing in ({"presence_penalty": 0.1}, {"frequency_penalty": 0.1}, {"repetition_penalty": 1.1}):
        assert adjusts(SamplingParams(**changing))  # type: ignore[arg-type]
    assert adjusts(SamplingParams(logit_bias=((0, 1.0),)))


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
    row = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * 4] * 400))
    rows = [
        RowSampling(SamplingParams(temperature=1.0, seed=None if seed is None else seed + index, **cut))  # type: ignore[arg-type]
        for index in range(400)
    ]
    assert set(Sampling(rows, VOCAB)(mx.zeros(400), row).tolist()) == kept


def test_temperature_comes_before_the_cut() -> None:
    """At a low temperature the first token alone has the mass; at a high one it does not."""
    row = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05] + [1e-9] * 4] * 400))
    assert set(draw(SamplingParams(temperature=0.2, top_p=0.8), row)) == {0}
    assert set(draw(SamplingParams(temperature=1.5, top_p=0.8), row)) >= {0, 1, 2}
