"""What a step is thought to take, corrected by what steps took. Arithmetic only; one thread learns, any may look."""

from __future__ import annotations

UP, DOWN = 0.5, 0.2
"""Shares of an error that are learnt: what took longer is believed sooner than what took less."""

OUTLIER = 2.0
"""A step that took more than this many times its plan counts as this many times, so that a hiccup is not a lesson."""


class Estimate:
    """Seconds as a sum of parts, a fixed one and others that grow with the work, each scaled by what steps really took.

    A normalised least-mean-squares filter (Widrow and Hoff, 1960): the error goes to each part by its size.
    """

    def __init__(self, parts: int) -> None:
        self._scales = (1.0,) * parts

    def scaled(self, *parts: float) -> tuple[float, ...]:
        """What each part is now thought to take."""
        return tuple(scale * part for scale, part in zip(self._scales, parts, strict=True))

    def of(self, *parts: float) -> float:
        return sum(self.scaled(*parts))

    def learn(self, *parts: float, seconds: float, of_last: bool = True) -> None:
        """A step that was planned as `of(*parts)` took `seconds`: `of_last`, also a lesson about the last part."""
        planned, taught = self.of(*parts), parts if of_last else (*parts[:-1], 0.0)
        size = sum(part * part for part in taught)
        if planned <= 0 or seconds <= 0 or size <= 0:
            return
        error = min(seconds, OUTLIER * planned) - planned
        gain = error * (UP if error > 0 else DOWN) / size
        # A part that would go below nothing stays; the others have the rest of the way.
        self._scales = tuple(max(0.0, scale + gain * part) for scale, part in zip(self._scales, taught, strict=True))
