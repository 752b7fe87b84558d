"""What steps and rows of late were like: how long a prompt token and a decode step take, how much rows use.

`Rates` learns from every step and every row that ended; `Pace` is what it knows at one moment. Arithmetic only. All
times are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.engine.backend import StepResult
from service.engine.generation import Usage

KEEP = 0.98
"""What is left of an observation's weight after the next one: about the last fifty count."""

FAMILIAR = 4.0
"""A prompt counts up to this many times the longest that was read lately: what tiny prompts cost is mostly overhead,
and says little about a long one."""

LEAST_SPREAD = 1e-3
"""Variance of the number of rows below which nothing is said of what one more costs."""


@dataclass(slots=True)
class Ratio:
    """`over` / `under` of the last observations, None before there are any."""

    over: float = 0.0
    under: float = 0.0

    def add(self, over: float, under: float) -> None:
        self.over = KEEP * self.over + over
        self.under = KEEP * self.under + under

    @property
    def value(self) -> float | None:
        return self.over / self.under if self.under else None


@dataclass(slots=True)
class DecodeCost:
    """Seconds of a decode step as a line over its rows: least squares, the last observations first.

    Between flat and proportional: beyond the rows that were seen, a slope of noise must not be believed.
    """

    count: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        self.count = KEEP * self.count + 1
        self.rows = KEEP * self.rows + rows
        self.seconds = KEEP * self.seconds + seconds
        self.squares = KEEP * self.squares + rows * rows
        self.products = KEEP * self.products + rows * seconds

    def line(self) -> tuple[float, float] | None:
        """(base, of one row), neither negative; None before there is an observation."""
        if not self.count:
            return None
        rows, seconds = self.rows / self.count, self.seconds / self.count
        spread = self.squares / self.count - rows * rows
        slope = (self.products / self.count - rows * seconds) / spread if spread > LEAST_SPREAD else 0.0
        slope = min(max(0.0, slope), seconds / rows)
        return seconds - slope * rows, slope


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What work costs at the moment.

    `prefill`: seconds of one prompt token. `chunk`: prompt tokens between two decode steps. `computed`: share of a
    prompt that the prefix cache does not have. `longest`: most tokens of a prompt that are taken into account.
    `used`: share of `max_tokens` that rows use.
    """

    prefill: float
    decode_base: float
    decode_row: float
    chunk: float
    computed: float
    longest: float
    used: float

    def decode(self, rows: int) -> float:
        """Seconds of a decode step."""
        return self.decode_base + self.decode_row * rows

    def reading(self, rows: int) -> float:
        """Seconds of one prompt token while so many rows decode beside it."""
        return self.prefill + (self.decode(rows) / self.chunk if rows else 0.0)

    def to_read(self, prompt: int) -> float:
        """Tokens of a prompt that are expected to be computed."""
        return min(prompt * self.computed, self.longest)

    def alone(self, prompt: int) -> float:
        """Seconds until the first token of a request that nobody else delays."""
        return self.to_read(prompt) * self.prefill + self.decode(1)


class Rates:
    """Learns the pace. Not thread-safe: the worker calls it under its lock."""

    def __init__(self) -> None:
        self._prefill = Ratio()
        self._chunk = Ratio()
        self._computed = Ratio()
        self._used = Ratio()
        self._decode = DecodeCost()
        self._longest = 0.0
        self._decoded = False

    def step(self, result: StepResult, seconds: float) -> None:
        """A step took `seconds`, which its own timings divide between prefill and decode.

        Time of neither is newcomers': copies that let rows join, the first steps of a prompt. It is nobody's where
        there is no newcomer: the rest of a step, in which only the next tokens are launched.
        """
        share = 0.0 if result.overlaps and not result.copies + result.prefill_tokens else 1.0
        if result.decode_rows:
            timed = result.prefill_seconds + result.decode_seconds
            share = result.prefill_seconds / timed if timed else 0.0
            self._decode.add(result.decode_rows, seconds * (1 - share))
        if share:
            self._prefill.add(seconds * share, result.prefill_tokens)
        if result.prefill_tokens and (self._decoded or result.decode_rows):
            self._chunk.add(result.prefill_tokens, 1)
        self._decoded = result.decode_rows > 0

    def ended(self, usage: Usage, max_tokens: int) -> None:
        """A row whose prefill had begun has ended."""
        computed = usage.prompt_tokens - usage.cached_tokens
        self._computed.add(computed, usage.prompt_tokens)
        self._longest = max(computed, KEEP * self._longest)
        self._used.add(usage.completion_tokens, max_tokens)

    def to_compute(self, prompt: int) -> int:
        """Tokens of such a prompt that the prefix cache is not expected to have. Any thread."""
        computed = self._computed.value
        return prompt if computed is None else round(prompt * computed)

    def pace(self) -> Pace | None:
        """What is known now; None until a prompt was read, a token decoded, and a row has ended."""
        prefill, used, computed = self._prefill.value, self._used.value, self._computed.value
        line = self._decode.line()
        if not prefill or used is None or computed is None or line is None:
            return None
        return Pace(
            prefill=prefill,
            decode_base=line[0],
            decode_row=line[1],
            chunk=self._chunk.value or math.inf,
            computed=computed,
            longest=FAMILIAR * self._longest,
            used=used,
        )
