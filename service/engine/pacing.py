"""What one engine step does, so that it lasts about `target` seconds at most. No mlx; one thread, but for `patience`.

A step may decode the live rows and prefill one chunk. What each costs is measured at warm-up and corrected by
every step; what fits together into the target is done together (compare Sarathi-Serve, OSDI 2024). When none fits
beside decode, or only one that costs much more a token than one with the target to itself, steps decode and prefill
in turn, so that each stays within the target and neither starves the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from service.engine.estimate import Estimate

SMALLEST_CHUNK = 4
"""Tokens below which a chunk costs hardly less than this many."""

FRESH = 32
"""Chunks after which the time of one of another size is forgotten: the context has grown since."""

HEADROOM = 0.8
"""Share of the target that is planned for; the rest absorbs what a measurement cannot know."""

ROOM_TO_GROW = 0.7
"""Share of the target that rows may take together when one joins: their contexts, and so their steps, still grow."""

WORTH_BESIDE = 0.5
"""Share of the positions a second of a chunk with the whole target that one beside decode must reach: most of a small
chunk's time may be its fixed cost (on two CPU cores 4 positions take 77 ms, and 31 take 140)."""

WORTH_WAITING = 0.6
"""Share of its pace that a prompt gives up, so that the live rows wait for smaller chunks between their tokens."""

WORTH_A_BATCH = 2.0
"""Rows get a batch of their own when a place in any other costs more than this many times as much."""

MOST_BATCHES = 4
"""Of rows of different length: each batch is a forward pass of its own."""

ALIGNED = 64
"""Size from which on a single prompt's chunks end at multiples of their size, so that prompts share cuDNN's plans: it
makes one for each pair of chunk and context (50 ms on an H100, where 512 positions then take 11)."""

TAIL = 1.5
"""A rest of up to this many chunks is one chunk, where that fits."""

LEAST_WORTH = 1.5
"""Where even the smallest chunk takes longer than the target, the largest that takes at most this many times as
long: on a GPU the fixed cost of a chunk may be tens of milliseconds, and the prompt would never get on."""

COPYING = 1 / 8
"""Share of the target that copies get beside rows which take half of it themselves: a layer at a step, with rows whose
steps are long, would make who joins wait for as many steps as there are layers."""

BRIEF = 0.02
"""Share of the target below which nobody minds that a step takes two tokens' time. On two CPU cores, with a model whose
steps take 2 ms, Python's part of the next token then costs no time: 11,900 tokens a second instead of 9,500."""

MOMENT = 1e-9
"""Seconds below which nothing is told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds. A batch of r rows after c tokens decodes in `decode_base` + r x (`decode_row` + c x `decode_context`).

    Prefill of t positions after c: `prefill_base` + t x (`prefill_token` + c x `prefill_context`).
    """

    decode_base: float = 0.0
    decode_row: float = 0.0
    decode_context: float = 0.0
    prefill_base: float = 0.0
    prefill_token: float = 1e-4
    prefill_context: float = 0.0


Sizes = tuple[tuple[int, int], ...]
"""Rows, and tokens of the longest, of each batch that decodes: one forward pass each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a step finds: live rows, and the cohort in prefill, if any.

    `rows` with their longest `context` are the first batch, `others` all further ones.
    `computing`: the live rows' next token is being computed already, and the device is not free before.
    `cohort_left`: positions that the cohort has still to be prefilled, where that is known.
    """

    rows: int = 0
    context: int = 0
    others: Sizes = ()
    computing: bool = False
    cohort: int = 0
    cohort_context: int = 0
    cohort_left: int | None = None

    @property
    def batches(self) -> Sizes:
        return ((self.rows, self.context), *self.others) if self.rows else self.others


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What to do: compute the live rows' next token or not, and positions to prefill (0: none).

    `launch`: start with the token after that at the end of the step; not when steps decode and prefill in turn.
    """

    decode: bool
    chunk: int = 0
    launch: bool = True


class Pacer:
    """Plans steps from `StepCosts`, corrected by what the last steps really took."""

    def __init__(self, *, target: float, largest: int, costs: StepCosts | None = None) -> None:
        self.target = target
        self._largest = largest
        self._rows_next = False
        self.calibrate(costs or StepCosts())

    def calibrate(self, costs: StepCosts) -> None:
        """Start over from measured costs."""
        self.costs = costs
        self._decode, self._prefill = Estimate(3), Estimate(2)
        self._chunks = 0
        self._seen: dict[int, tuple[float, int]] = {}

    def _decode_parts(self, batches: Sizes) -> tuple[float, float, float]:
        """Of the batches, of their rows, and of the rows' contexts."""
        costs, rows = self.costs, sum(rows for rows, _ in batches)
        tokens = sum(rows * context for rows, context in batches)
        return len(batches) * costs.decode_base, rows * costs.decode_row, tokens * costs.decode_context

    def _prefill_parts(self, positions: int, context: int) -> tuple[float, float]:
        costs = self.costs
        return costs.prefill_base, positions * (costs.prefill_token + context * costs.prefill_context)

    def decode_seconds(self, *batches: tuple[int, int]) -> float:
        """Planned seconds of a step of batches of (rows, tokens of the longest)."""
        return self._decode.of(*self._decode_parts(batches))

    def brief(self, *batches: tuple[int, int]) -> bool:
        """Whether a step of these batches is so short that it might as well hold two. Of none it is not known."""
        return bool(batches) and self.decode_seconds(*batches) <= BRIEF * self.target

    def prefill_seconds(self, positions: int, context: int) -> float:
        """Planned seconds to prefill `positions` after `context` tokens."""
        return self._prefill.of(*self._prefill_parts(positions, context))

    def patience(self, positions: int) -> float:
        """Seconds by which the fixed part of a prefill is more than that of so many positions. Any thread."""
        fixed, own = self._prefill.scaled(*self._prefill_parts(positions, 0))
        return max(0.0, fixed - own)

    def plan(self, load: Load, *, copying: bool = False, told: bool = False) -> StepPlan:
        """What the next step does. `copying`: it goes on with copies, beside which rows may decode. `told`: it is the
        rest of one whose tokens were told already."""
        plan = self._plan(load)
        if told:
            return replace(plan, decode=False)
        if copying and load.rows and not plan.decode:  # a turn for copies: rows need not wait for it
            return StepPlan(decode=True, launch=False)
        return plan

    def _plan(self, load: Load) -> StepPlan:
        if not load.cohort:
            return StepPlan(load.rows > 0)
        beside, chunk = self._share(load)
        if beside or not load.rows:
            return StepPlan(decode=beside, chunk=chunk)
        if load.computing or self._rows_next:
            return StepPlan(decode=True, launch=False)
        return StepPlan(decode=False, chunk=chunk, launch=False)

    def _share(self, load: Load) -> tuple[bool, int]:
        """Whether a chunk is prefilled in the same step in which rows decode, and how large a one."""
        budget = self.target * HEADROOM
        decode = self.decode_seconds(*load.batches)
        alone = self._chunk(budget, load, decode)
        if not load.rows:
            return False, alone
        rest = budget - decode
        chunk = self._chunk(rest, load, decode)
        seconds, of_alone = (self.prefill_seconds(each, load.cohort_context) for each in (chunk, alone))
        worth = chunk * of_alone >= WORTH_BESIDE * alone * seconds
        return (True, chunk) if worth and seconds <= rest else (False, alone)

    def chunk_fits(self, load: Load, spent: float) -> bool:
        """Whether the smallest chunk still fits into a step that has lasted for `spent` seconds."""
        return spent + self.prefill_seconds(SMALLEST_CHUNK, load.cohort_context) < self.target

    def copies_until(self, began: float, now: float) -> float:
        """When a step that began then stops making copies: at half of the target, or a little later."""
        return max(began + self.target / 2, min(now + self.target * COPYING, began + self.target * HEADROOM))

    def home(self, batches: Sizes, rows: int, context: int) -> int | None:
        """In which batch `rows`, the longest with `context` tokens, had best decode; None for a new one."""
        if not batches:
            return None
        alone = self.decode_seconds((rows, context))
        more = [
            self.decode_seconds((live + rows, max(longest, context))) - self.decode_seconds((live, longest))
            for live, longest in batches
        ]
        least = min(more)
        return None if least > WORTH_A_BATCH * alone and len(batches) < MOST_BATCHES else more.index(least)

    def may_join(self, load: Load, rows: int, context: int) -> bool:
        """Whether `rows` more, the longest after `context` tokens, may decode with the live ones; one alone always may.

        What they add to their contexts afterwards is not foreseen: a step that grows a little longer is better
        than a stream that has to stop.
        """
        batches, home = list(load.batches), self.home(load.batches, rows, context)
        if home is None:
            batches.append((rows, context))
        else:
            live, longest = batches[home]
            batches[home] = live + rows, max(longest, context)
        alone = len(batches) == 1 and batches[0][0] <= 1
        return alone or self.decode_seconds(*batches) <= self.target * ROOM_TO_GROW

    def room(self, load: Load) -> int:
        """Positions that a new cohort may have to be prefilled in one step as long as these rows are live."""
        return self._share(replace(load, cohort_context=0, cohort_left=None))[1]

    def _chunk(self, seconds: float, load: Load, decode: float) -> int:
        """Positions that take at most `seconds`, unless it is the smallest chunk, beside rows that take `decode`."""
        context, left = load.cohort_context, load.cohort_left
        chunk = min(SMALLEST_CHUNK, self._largest)
        if self._last_seen(chunk) > self.target * HEADROOM:
            return self._worthwhile()
        while chunk * 2 <= self._largest and self.prefill_seconds(chunk * 2, context + chunk) <= seconds:
            chunk *= 2
        if load.rows:
            chunk = self._frugal(chunk, context, decode)
        if left is not None and left <= TAIL * chunk and self.prefill_seconds(left, context) <= seconds:
            return min(max(left, SMALLEST_CHUNK), self._largest)
        return chunk - context % chunk if chunk >= ALIGNED and load.cohort <= 1 else chunk

    def _frugal(self, chunk: int, context: int, decode: float) -> int:
        """The smallest chunk with which the prompt gets on about as fast as with this one."""

        def pace(positions: int) -> float:
            return positions / max(decode + self.prefill_seconds(positions, context), MOMENT)

        least = WORTH_WAITING * pace(chunk)
        while chunk // 2 >= SMALLEST_CHUNK and pace(chunk // 2) >= least:
            chunk //= 2
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

    def observe_decode(self, seconds: float, *batches: tuple[int, int]) -> None:
        """The live rows decoded: learn from what it took; of context only where it has most of that.

        A GPU attends while Python launches what comes after, so that a short context costs nothing: if that were
        believed of a long one, its row would get a place in a batch of many, all of which then took several times as
        long as in two batches (on an H100, 16 rows and one of 13,800 tokens: 35 ms instead of 12).
        """
        self._rows_next = False
        parts = self._decode_parts(batches)
        *others, context = self._decode.scaled(*parts)
        self._decode.learn(*parts, seconds=seconds, of_last=context >= sum(others))

    def observe_prefill(self, positions: int, context: int, seconds: float, *, typical: bool = True) -> None:
        """A chunk was prefilled: learn from what it took, if that was `typical`."""
        self._rows_next = True
        if not typical:
            return
        self._chunks += 1
        self._seen[positions] = seconds, self._chunks
        self._prefill.learn(*self._prefill_parts(positions, context), seconds=seconds)
