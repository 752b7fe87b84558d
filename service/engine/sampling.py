"""How logits become a token: samplers shared by equal parameters, and one row's own penalties and biases.

Belongs to the generation thread. The filters are mlx-lm's; the penalties are ours because OpenAI's count
the generated tokens only, where mlx-lm's look at the last twenty of prompt and output.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_sampler

from service.engine.generation import SamplingParams

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities (rows, vocabulary) -> token ids (rows,)."""


class Samplers:
    """Samplers by parameters: equal parameters give the same object, so a batch draws them in one call."""

    def __init__(self, *, vocab_size: int, capacity: int = 256) -> None:
        self._vocab_size = vocab_size
        self._capacity = capacity
        self._shared: OrderedDict[SamplingParams, Sampler] = OrderedDict()

    def get(self, params: SamplingParams) -> Sampler:
        """The sampler of these parameters; with a seed it is the caller's own and holds state."""
        if params.seed is not None and params.temperature > 0:
            return SeededSampler(params, self._vocab_size)
        key = SamplingParams(
            temperature=params.temperature, top_p=params.top_p, top_k=self._top_k(params), min_p=params.min_p
        )
        if key.temperature == 0:
            key = SamplingParams(temperature=0)
        sampler = self._shared.pop(key, None) or make_sampler(
            temp=key.temperature, top_p=key.top_p, min_p=key.min_p, top_k=key.top_k
        )
        self._shared[key] = sampler
        if len(self._shared) > self._capacity:
            self._shared.popitem(last=False)
        return sampler

    def _top_k(self, params: SamplingParams) -> int:
        return params.top_k if params.top_k < self._vocab_size else 0


class SeededSampler:
    """One row's sampler with its own random generator: the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        self._params = replace(params, top_k=params.top_k if params.top_k < vocab_size else 0)
        self._key = mx.random.key((params.seed or 0) & 0xFFFF_FFFF_FFFF_FFFF)

    def __call__(self, logprobs: mx.array) -> mx.array:
        params = self._params
        if params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if params.top_k > 0:
            logprobs = apply_top_k(logprobs, params.top_k)
        self._key, draw = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1 / params.temperature), key=draw)


class RowProcessors:
    """One row's biases and penalties, with the counts they need. Called once per step, in order."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._bias: tuple[mx.array, mx.array] | None = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            self._bias = (mx.array(ids), mx.array(values))
        self._seen = mx.zeros(vocab_size, dtype=mx.bool_)
        self._counts = mx.zeros(vocab_size)
        if params.repetition_penalty != 1:
            self._seen[mx.array(prompt)] = True
        self._generated = False

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether these parameters change logits at all."""
        plain = params.repetition_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0
        return bool(params.logit_bias) or not plain

    def __call__(self, token: mx.array, logits: mx.array) -> mx.array:
        """Logits (1, vocabulary) after `token` (1,), which is the last prompt token at the first call."""
        params = self._params
        if self._generated:
            self._counts = self._counts.at[token].add(1)
            self._seen[token] = True
        self._generated = True
        if params.repetition_penalty != 1:
            penalised = mx.where(logits < 0, logits * params.repetition_penalty, logits / params.repetition_penalty)
            logits = mx.where(self._seen, penalised, logits)
        if params.frequency_penalty or params.presence_penalty:
            logits = logits - self._counts * params.frequency_penalty - (self._counts > 0) * params.presence_penalty
        if self._bias is not None:
            ids, values = self._bias
            logits = logits.at[:, ids].add(values.astype(logits.dtype))
        return logits
