"""How logits become a token: samplers shared by equal parameters, and one row's own penalties and biases.

Belongs to the generation thread. The filters and penalties are ours, not mlx-lm's: its filters are compiled
with their parameters as constants, so that every new temperature or top_p costs a compilation (7 s at 32
rows on an H100), and its penalties look at the last twenty tokens of prompt and output, where OpenAI's
count what was generated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

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
        if params.temperature == 0:
            return greedy
        key = SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k if params.top_k < self._vocab_size else 0,
            min_p=params.min_p,
        )
        if params.seed is not None:
            return RandomSampler(replace(key, seed=params.seed))
        sampler = self._shared.pop(key, None) or RandomSampler(key)
        self._shared[key] = sampler
        if len(self._shared) > self._capacity:
            self._shared.popitem(last=False)
        return sampler


def greedy(logprobs: mx.array) -> mx.array:
    """The likeliest token of every row."""
    return mx.argmax(logprobs, axis=-1)


class RandomSampler:
    """Draws from the distribution at a temperature, cut to its likeliest tokens.

    Temperature comes first and the cuts apply to the distribution it gives, as in OpenAI's and vLLM's APIs.
    With a seed the sampler has a random generator of its own: the same seed and logits give the same tokens.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._key = None if params.seed is None else mx.random.key(params.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """One token a row."""
        params = self._params
        logits = logprobs.astype(mx.float32) * (1 / params.temperature)
        if params.top_k > 0:
            logits = _top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = _top_p(logits, params.top_p)
        if params.min_p > 0:
            logits = _min_p(logits, params.min_p)
        if self._key is None:
            return mx.random.categorical(logits)
        self._key, draw = mx.random.split(self._key)
        return mx.random.categorical(logits, key=draw)


def _top_k(logits: mx.array, count: int) -> mx.array:
    """Keep the `count` likeliest tokens (and those that tie with the last of them)."""
    threshold = mx.sort(logits, axis=-1)[..., -count, None]
    return mx.where(logits < threshold, -mx.inf, logits)


def _top_p(logits: mx.array, mass: float) -> mx.array:
    """Keep the smallest set of likeliest tokens that together have at least `mass` (arXiv:1904.09751)."""
    ascending = mx.sort(logits, axis=-1)
    cumulated = mx.cumsum(mx.softmax(ascending, axis=-1), axis=-1)
    # The likeliest token always stays, whatever rounding makes of the sums.
    dropped = mx.minimum((cumulated <= 1 - mass).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    threshold = mx.take_along_axis(ascending, dropped, axis=-1)
    return mx.where(logits < threshold, -mx.inf, logits)


def _min_p(logits: mx.array, share: float) -> mx.array:
    """Keep tokens at least `share` times as likely as the likeliest (arXiv:2407.01082)."""
    probabilities = mx.softmax(logits, axis=-1)
    return mx.where(probabilities < share * probabilities.max(axis=-1, keepdims=True), -mx.inf, logits)


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
