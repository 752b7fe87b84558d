"""What one engine step does, so that it lasts about `target` seconds at most. No mlx; one thread.

A step may decode the live rows and prefill one chunk. What each costs is measured at warm-up and corrected by
every step; what fits together into the target is done together (compare Sarathi-Serve, OSDI 2024). When even
the smallest chunk does not fit beside decode, steps decode and prefill in turn, so that each stays within the
target and neither starves the other.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST_CHUNK = 4
"""Tokens below which a chunk costs hardly less than this many."""

FRESH = 32
"""Chunks after which the time of one of another size is forgotten: the context has grown since."""

HEADROOM = 0.8
"""Share of the target that is planned for; the rest absorbs what a measurement cannot know."""

ROOM_TO_GROW = 0.7
"""Share of the target that rows may take together when one joins: their contexts, and so their steps, still grow."""

LEAST_WORTH = 1.5
"""Where even the smallest chunk takes longer than the target, the largest that takes at most this many times as
long: on a GPU the fixed cost of a chunk may be tens of milliseconds, and the prompt would never get on."""

UP, DOWN = 0.5, 0.2
"""Shares of an error that are learnt: what took longer is believed sooner than what took less."""

OUTLIER = 2.0
"""A step that took more than this many times its plan counts as this many times, so that a hiccup is not a lesson."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds. Decode of r rows after a context of c: `decode_base` + r x (`decode_row` + c x `decode_context`).

    Prefill of t positions after c: `prefill_base` + t x (`prefill_token` + c x `prefill_context`).
    """

    decode_base: float = 0.0
    decode_row: float = 0.0
    decode_context: float = 0.0
    prefill_base: float = 0.0
    prefill_token: float = 1e-4
    prefill_context: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step finds: live rows with their longest context, and the cohort in prefill, if any.

    `computing`: the live rows' next token is being computed already, and the device is not free before.
    """

    rows: int = 0
    context: int = 0
    computing: bool = False
    cohort: int = 0
    cohort_context: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do: compute the live rows' next token or not, and positions to prefill (0: none).

    `launch`: start with the token after that at the end of the step; not when steps decode and prefill in turn.
    """

    decode: bool
    chunk: int = 0
    launch: bool = True


class Estimate:
    """Seconds as a fixed part and one that grows with the work, each scaled by what steps really took.

    A normalised least-mean-squares filter (Widrow and Hoff, 1960): the error goes to each part by its size.
    """

    def __init__(self) -> None:
        self._scales = (1.0, 1.0)

    def of(self, fixed: float, growing: float) -> float:
        return self._scales[0] * fixed + self._scales[1] * growing

    def learn(self, fixed: float, growing: float, seconds: float) -> None:
        """A step that was planned as `of(fixed, growing)` took `seconds`."""
        planned, size = self.of(fixed, growing), fixed * fixed + growing * growing
        if planned <= 0 or seconds <= 0:
            return
        error = min(seconds, OUTLIER * planned) - planned
        gain = error * (UP if error > 0 else DOWN) / size
        # A part that would go below nothing stays; the other one has the rest of the way.
        self._scales = (max(0.0, self._scales[0] + gain * fixed), max(0.0, self._scales[1] + gain * growing))


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
        self._decode, self._prefill = Estimate(), Estimate()
        self._chunks = 0
        self._seen: dict[int, tuple[float, int]] = {}

    def _decode_parts(self, rows: int, context: int) -> tuple[float, float]:
        costs = self.costs
        return costs.decode_base, rows * (costs.decode_row + context * costs.decode_context)

    def _prefill_parts(self, positions: int, context: int) -> tuple[float, float]:
        costs = self.costs
        return costs.prefill_base, positions * (costs.prefill_token + context * costs.prefill_context)

    def decode_seconds(self, rows: int, context: int) -> float:
        """Planned seconds to decode `rows` rows, the longest after `context` tokens."""
        return self._decode.of(*self._decode_parts(rows, context))

    def prefill_seconds(self, positions: int, context: int) -> float:
        """Planned seconds to prefill `positions` after `context` tokens."""
        return self._prefill.of(*self._prefill_parts(positions, context))

    def plan(self, load: Load) -> StepPlan:
        """What the next step does."""
        plan = self._plan(load)
        self._decoded_last = plan.decode
        return plan

    def _plan(self, load: Load) -> StepPlan:
        if not load.cohort:
            return StepPlan(load.rows > 0)
        budget = self.target * HEADROOM
        if not load.rows:
            return StepPlan(decode=False, chunk=self._chunk(budget, load.cohort_context))
        beside = budget - self.decode_seconds(load.rows, load.context)
        chunk = self._chunk(beside, load.cohort_context)
        if self.prefill_seconds(chunk, load.cohort_context) <= beside:
            return StepPlan(decode=True, chunk=chunk)
        if load.computing or not self._decoded_last:
            return StepPlan(decode=True, launch=False)
        return StepPlan(decode=False, chunk=self._chunk(budget, load.cohort_context), launch=False)

    def chunk_fits(self, load: Load, spent: float) -> bool:
        """Whether the smallest chunk still fits into a step that has lasted for `spent` seconds."""
        return spent + self.prefill_seconds(SMALLEST_CHUNK, load.cohort_context) < self.target

    def may_join(self, load: Load, rows: int, context: int) -> bool:
        """Whether `rows` more, the longest after `context` tokens, may decode with the live ones; one alone always may.

        What they add to their contexts afterwards is not foreseen: a step that grows a little longer is better
        than a stream that has to stop.
        """
        rows, context = load.rows + rows, max(load.context, context)
        return rows <= 1 or self.decode_seconds(rows, context) <= self.target * ROOM_TO_GROW

    def room(self, load: Load) -> int:
        """Positions that a new cohort may have to be prefilled in one step beside the live rows."""
        decode = self.decode_seconds(load.rows, load.context) if load.rows else 0.0
        return self._chunk(self.target * HEADROOM - decode, 0)

    def _chunk(self, seconds: float, context: int) -> int:
        """The largest power of two of positions, from the smallest chunk on, that takes at most `seconds`."""
        chunk = min(SMALLEST_CHUNK, self._largest)
        if self._last_seen(chunk) > self.target * HEADROOM:
            return self._worthwhile()
        while chunk * 2 <= self._largest and self.prefill_seconds(chunk * 2, context + chunk) <= seconds:
            chunk *= 2
        return chunk

    def _last_seen(self, chunk: int) -> float:
        """Seconds that a chunk of this size took lately; 0 when that is not known."""
        seconds, number = self._seen.get(chunk, (0.0, 0))
        return seconds if self._chunks - number < FRESH else 0.0

    def _worthwhile(self) -> int:
        """By the times of chunks as they were last seen, not by a model: of what is not known the next is tried."""
        chunk = SMALLEST_CHUNK
        most = LEAST_WORTH * self._last_seen(chunk)
        while chunk * 2 <= self._largest and self._last_seen(chunk) and self._last_seen(chunk * 2) <= most:
            chunk *= 2
        return chunk

    def observe_decode(self, rows: int, context: int, seconds: float) -> None:
        """Learn from what decoding took."""
        self._decode.learn(*self._decode_parts(rows, context), seconds)

    def observe_prefill(self, positions: int, context: int, seconds: float) -> None:
        """Learn from what a chunk took."""
        self._chunks += 1
        self._seen[positions] = seconds, self._chunks
        self._prefill.learn(*self._prefill_parts(positions, context), seconds)
