"""How logits become tokens: one pass over all rows of a batch, whatever each row asks for.

Belongs to the generation thread. Temperature, cuts, penalties, biases and draws are arrays with one entry a row, so
that rows that all differ cost what equal ones do; a call for each row made a step of 32 rows 1.6 times as long on an
H100. The filters and penalties are ours, not mlx-lm's: its filters are compiled with their parameters as constants, so
that every new temperature or top_p costs a compilation (7 s at 32 rows on an H100), and its penalties look at the last
twenty tokens of prompt and output, where OpenAI's count what was generated.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import wraps
from random import Random
from typing import Any

import mlx.core as mx

from service.engine.generation import SamplingParams

SEED_BITS = 64

DRAW_BITS = 23
"""Of a number in [0, 1): so few that its float32 product with any sum stays below the sum."""


class RowSampling:
    """What one row asks for, and what of it lives on while the row moves between batches.

    Draws come from `random`, by default one of its own: with a seed the same logits give the same tokens, whatever
    runs beside the row. Penalties count what was generated, the repetition penalty the prompt too.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = (), random: Random | None = None) -> None:
        self.params = params
        self.adjusted = adjusts(params)
        self._random = random or (_seeded(params.seed) if params.temperature else None)
        self._prompt = prompt if params.repetition_penalty != 1 else ()
        self.generated = False
        """Whether a token was drawn: the first input is the last token of the prompt."""
        self._counts: mx.array | None = None
        self.draw = 0.0
        """A number in [0, 1): the same until the row has drawn. A greedy row has 0."""
        self.drawn()

    def drawn(self) -> None:
        """The row's draw is used up."""
        if self._random is not None:
            self.draw = self._random.getrandbits(DRAW_BITS) / (1 << DRAW_BITS)

    def counts(self, vocab_size: int) -> mx.array:
        """(vocabulary,): how often each token was generated."""
        return mx.zeros(vocab_size) if self._counts is None else self._counts

    def prompted(self, vocab_size: int) -> mx.array:
        """(vocabulary,) booleans: the tokens of the prompt, where they count."""
        found = mx.zeros(vocab_size, dtype=mx.bool_)
        if self._prompt:
            found[mx.array(self._prompt)] = True
        return found

    def take_back(self, counts: mx.array | None) -> None:
        """Keep what a batch has made of the row's state."""
        self._counts, self.generated = counts, True


def _seeded(seed: int | None) -> Random:
    """A generator of a row's own. To ask the system for a seed takes time, and greedy rows need none."""
    return Random(secrets.randbits(SEED_BITS) if seed is None else seed & (1 << SEED_BITS) - 1)  # noqa: S311 -- no secret


def adjusts(params: SamplingParams) -> bool:
    """Whether these parameters change logits before anything is drawn."""
    plain = params.repetition_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0
    return bool(params.logit_bias) or not plain


def _fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """On a GPU one kernel instead of one for each operation: to launch one takes an H100's host some 20 us.

    Compiled once for all parameters and shapes (five seconds each there, and kept in mlx's cache). A CPU has none to
    launch, and would need a compiler.
    """
    compiled = mx.compile(function)

    @wraps(function)
    def run(*arrays: mx.array) -> mx.array:
        found: mx.array = (function if mx.default_device() == mx.Device(mx.cpu) else compiled)(*arrays)
        return found

    return run


@_fused
def _less_if_there(logits: mx.array, counts: mx.array, prompted: mx.array, penalty: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    penalised = mx.where(logits < 0, logits * penalty, logits / penalty)
    return mx.where(prompted | (counts > 0), penalised, logits)


@_fused
def _less_by_count(logits: mx.array, counts: mx.array, frequency: mx.array, presence: mx.array) -> mx.array:
    return logits.astype(mx.float32) - counts * frequency - (counts > 0) * presence


@_fused
def _among_likeliest(ascending: mx.array, cumulated: mx.array, tail: mx.array, most: mx.array) -> mx.array:
    """Shares above the `tail` of the mass, `most` for the others: the likeliest token always stays."""
    return mx.where(cumulated > tail, ascending, most)


@_fused
def _from(bound: mx.array, shares: mx.array) -> mx.array:
    return mx.where(shares < bound, 0.0, shares)


@_fused
def _hits(shares: mx.array, reached: mx.array, total: mx.array, draw: mx.array) -> mx.array:
    """2 for the tokens at which the running sum is beyond the draw, and what each has for the others."""
    return mx.where((shares > 0) & (reached > draw * total), 2.0, shares)  # a parallel sum may step at a share of 0


class Sampling:
    """Draws for rows that stay the same from call to call. `release` gives their states back before they change."""

    def __init__(self, rows: Sequence[RowSampling], vocab_size: int) -> None:
        self._rows = rows
        self._adjust = _Adjustments(rows, vocab_size) if any(row.adjusted for row in rows) else None
        self._random = _Draws(rows, vocab_size) if any(row.params.temperature for row in rows) else None

    def __call__(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """Token ids (rows,), from `logits` (rows, vocabulary) after the tokens `inputs` (rows,)."""
        logprobs = _normalised(logits) if self._adjust is None else self._adjust(inputs, logits)
        drawn = mx.argmax(logprobs, axis=-1) if self._random is None else self._random(logprobs.astype(mx.float32))
        for part in (self._adjust, self._random):  # nothing has moved on when any of it raised
            if part is not None:
                part.advance()
        return drawn

    def release(self) -> None:
        """Let the rows have their states; nothing may be drawn here afterwards."""
        adjusted = {} if self._adjust is None else self._adjust.counts_by_row()
        for index, row in enumerate(self._rows):
            row.take_back(adjusted.get(index))


class _Adjustments:
    """Penalties and biases of the rows that have any; the others' logits are not touched."""

    def __init__(self, rows: Sequence[RowSampling], vocab_size: int) -> None:
        self._which = [index for index, row in enumerate(rows) if row.adjusted]
        self._all = len(self._which) == len(rows)
        mine = [rows[index] for index in self._which]
        self._at = mx.array(self._which)
        self._index = mx.arange(len(mine), dtype=mx.uint32)  # as the inputs, or both were cast at each step
        self._counts = self._next_counts = mx.stack([row.counts(vocab_size) for row in mine])
        self._drawn, self._ones = mx.array([float(row.generated) for row in mine]), mx.ones(len(mine))
        prompts = any(row.params.repetition_penalty != 1 for row in mine)
        self._prompted = mx.stack([row.prompted(vocab_size) for row in mine]) if prompts else None
        self._penalty = _column([row.params.repetition_penalty for row in mine])
        self._presence = _column([row.params.presence_penalty for row in mine])
        self._frequency = _column([row.params.frequency_penalty for row in mine])
        self._counted = any(row.params.presence_penalty or row.params.frequency_penalty for row in mine)
        bias = [(index, *each) for index, row in enumerate(mine) for each in row.params.logit_bias]
        self._bias = [mx.array(list(column)) for column in zip(*bias, strict=True)]

    def __call__(self, inputs: mx.array, logits: mx.array) -> mx.array:
        """Log-probabilities, and for the adjusted rows their logits: drawing needs no sum of one."""
        if self._all:
            return self._adjusted(inputs, logits)
        logprobs = _normalised(logits).astype(mx.float32)
        logprobs[self._at] = self._adjusted(inputs[self._at], logits[self._at])
        return logprobs

    def _adjusted(self, inputs: mx.array, logits: mx.array) -> mx.array:
        self._next_counts = counts = self._counts.at[self._index, inputs].add(self._drawn)
        if self._prompted is not None:
            logits = _less_if_there(logits, counts, self._prompted, self._penalty)
        if self._counted:
            logits = _less_by_count(logits, counts, self._frequency, self._presence)
        if self._bias:
            rows, ids, values = self._bias
            logits = logits.astype(mx.float32).at[rows, ids].add(values)
        return logits.astype(mx.float32)

    def advance(self) -> None:
        """The inputs of the last call are counted from now on."""
        self._counts, self._drawn = self._next_counts, self._ones

    def counts_by_row(self) -> dict[int, mx.array]:
        return {row: self._counts[index] for index, row in enumerate(self._which)}


class _Draws:
    """Draws from each row's distribution at its temperature, cut to its likeliest tokens.

    Temperature comes first and the cuts apply to the distribution it gives, as in OpenAI's and vLLM's APIs: the
    `top_k` likeliest, of these the smallest set with `top_p` of the mass (arXiv:1904.09751), of these the ones at least
    `min_p` times as likely as the likeliest (arXiv:2407.01082). A temperature of 0 takes the likeliest token.
    """

    def __init__(self, rows: Sequence[RowSampling], vocab_size: int) -> None:
        params = [row.params for row in rows]
        self._rows = rows
        greedy = [each.temperature == 0 for each in params]
        self._greedy = mx.array(greedy) if any(greedy) else None
        self._scale = _column([1 / each.temperature if each.temperature else 1.0 for each in params])
        widths = [each.top_k if 0 < each.top_k < vocab_size else vocab_size for each in params]
        self._above = _column([vocab_size - width for width in widths]) if min(widths) < vocab_size else None
        masses = [min(each.top_p, 1.0) for each in params]
        self._tail = _column([1 - mass for mass in masses]) if min(masses) < 1 else None
        shares = [each.min_p for each in params]
        self._share = _column(shares) if any(shares) else None

    def __call__(self, logprobs: mx.array) -> mx.array:
        """One token a row, from float32 log-probabilities (rows, vocabulary)."""
        shares = self._cut(mx.softmax(logprobs * self._scale, axis=-1))
        reached = mx.cumsum(shares, axis=-1)
        # The first of the hits; were there none, for what rounding makes of the sums, the likeliest token.
        drawn = mx.argmax(_hits(shares, reached, reached[:, -1:], _column([row.draw for row in self._rows])), axis=-1)
        return drawn if self._greedy is None else mx.where(self._greedy, mx.argmax(logprobs, axis=-1), drawn)

    def advance(self) -> None:
        """The draws of the last call are used up."""
        for row in self._rows:
            row.drawn()

    def _cut(self, shares: mx.array) -> mx.array:
        bound = None
        if self._above is not None or self._tail is not None:
            bound = self._likeliest(mx.sort(shares, axis=-1))
        if self._share is not None:
            least = shares.max(axis=-1, keepdims=True) * self._share
            bound = least if bound is None else mx.maximum(bound, least)
        return shares if bound is None else _from(bound, shares)

    def _likeliest(self, ascending: mx.array) -> mx.array:
        """(rows, 1): the least share that `top_k` and `top_p` keep; what ties with it stays too."""
        tail = self._tail
        if self._above is not None:
            least = mx.take_along_axis(ascending, self._above, axis=-1)
            if tail is None:
                return least
            ascending = _from(least, ascending)
            tail = tail * ascending.sum(axis=-1, keepdims=True)
        kept = _among_likeliest(ascending, mx.cumsum(ascending, axis=-1), tail, ascending[:, -1:])
        return kept.min(axis=-1, keepdims=True)


def _normalised(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _column(values: Sequence[Any]) -> mx.array:
    """(rows, 1)."""
    return mx.array(values)[:, None]
