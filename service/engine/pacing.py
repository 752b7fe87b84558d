"""What one engine step does, so that it lasts about `target` seconds at most. No mlx; one thread.

A step may decode the live rows, prefill one chunk, and let prefilled rows join the batch. What each costs
is measured at warm-up and corrected by every step; what fits together into the target is done together
(compare Sarathi-Serve, OSDI 2024). When even the smallest chunk does not fit beside decode, steps decode
and prefill in turn, so that each stays within the target and neither starves the other.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_CHUNK = 16
"""Tokens below which a chunk costs hardly less than this many."""

HEADROOM = 0.8
"""Share of the target that is planned for; the rest absorbs what a measurement cannot know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds. Decode of r rows after a context of c: `decode_base` + r x (`decode_row` + c x `decode_context`).

    Prefill of t positions after c: `prefill_base` + t x (`prefill_token` + c x `prefill_context`). A join
    is a forward pass of one position a row, and a copy of the whole batch: positions x `join_position`.
    """

    decode_base: float = 0.0
    decode_row: float = 0.0
    decode_context: float = 0.0
    prefill_base: float = 0.0
    prefill_token: float = 1e-4
    prefill_context: float = 0.0
    join_position: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step finds: live rows with their longest context, and the cohort in prefill, if any.

    `joining` is how many rows of the cohort have only their last prompt token left (all or none).
    """

    rows: int = 0
    context: int = 0
    cohort: int = 0
    cohort_context: int = 0
    joining: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do: decode or not, positions to prefill (0: none), join or not."""

    decode: bool
    chunk: int = 0
    join: bool = False


class Pacer:
    """Plans steps from `StepCosts`, corrected by what the last steps really took."""

    def __init__(self, *, target: float, largest: int, costs: StepCosts | None = None) -> None:
        self.target = target
        self._largest = largest
        self._decoded_last = False
        self.calibrate(costs or StepCosts())

    def calibrate(self, costs: StepCosts) -> None:
        """Start over from measured costs."""
        self.costs = costs
        self._decode_factor = self._prefill_factor = self._join_factor = 1.0

    def decode_seconds(self, rows: int, context: int) -> float:
        """Planned seconds to decode `rows` rows, the longest after `context` tokens."""
        costs = self.costs
        return self._decode_factor * (costs.decode_base + rows * (costs.decode_row + context * costs.decode_context))

    def prefill_seconds(self, positions: int, context: int) -> float:
        """Planned seconds to prefill `positions` after `context` tokens."""
        costs = self.costs
        per_position = costs.prefill_token + context * costs.prefill_context
        return self._prefill_factor * (costs.prefill_base + positions * per_position)

    def join_seconds(self, load: Load) -> float:
        """Planned seconds for the cohort to become part of the batch."""
        positions = (load.rows + load.joining) * max(load.context, load.cohort_context)
        return self._join_factor * (self.prefill_seconds(load.joining, 0) + positions * self.costs.join_position)

    def plan(self, load: Load) -> StepPlan:
        """What the next step does."""
        plan = self._plan(load)
        self._decoded_last = plan.decode
        return plan

    def _plan(self, load: Load) -> StepPlan:
        if not load.cohort:
            return StepPlan(load.rows > 0)
        budget = self.target * HEADROOM
        beside = budget - self.decode_seconds(load.rows, load.context) if load.rows else budget
        if load.joining:
            fits = self.join_seconds(load) <= beside
            wanted = StepPlan(load.rows > 0 and fits, join=True)
        else:
            chunk = self._chunk(beside, load.cohort_context)
            fits = self.prefill_seconds(chunk, load.cohort_context) <= beside
            wanted = StepPlan(load.rows > 0 and fits, chunk if fits else self._chunk(budget, load.cohort_context))
        if load.rows and not fits and not self._decoded_last:
            return StepPlan(decode=True)
        return wanted

    def room(self, load: Load) -> int:
        """Positions that a new cohort may have to be prefilled in one step beside the live rows."""
        decode = self.decode_seconds(load.rows, load.context) if load.rows else 0.0
        return self._chunk(self.target * HEADROOM - decode, 0)

    def _chunk(self, seconds: float, context: int) -> int:
        """The largest power of two of positions, from the smallest chunk on, that takes at most `seconds`."""
        chunk = SMALLEST_CHUNK
        while chunk * 2 <= self._largest and self.prefill_seconds(chunk * 2, context + chunk) <= seconds:
            chunk *= 2
        return min(chunk, self._largest)

    def observe_decode(self, rows: int, context: int, seconds: float) -> None:
        """Learn from what decoding took."""
        self._decode_factor *= _correction(seconds, self.decode_seconds(rows, context))

    def observe_prefill(self, positions: int, context: int, seconds: float) -> None:
        """Learn from what a chunk took."""
        self._prefill_factor *= _correction(seconds, self.prefill_seconds(positions, context))

    def observe_join(self, load: Load, seconds: float) -> None:
        """Learn from what a join took."""
        self._join_factor *= _correction(seconds, self.join_seconds(load))


def _correction(real: float, planned: float) -> float:
    """Factor for the estimate: the whole way up (at most x4), a fifth of the way down (at most to a half)."""
    if planned <= 0 or real <= 0:
        return 1.0
    ratio = max(0.5, min(4.0, real / planned))
    return ratio if ratio > 1 else 1 - (1 - ratio) / 5
