"""How many rows are handed to the backend before it begins with them. No mlx; under the worker's lock.

The backend takes prompts in the order in which it got them, and where steps are limited by time it may make them wait
although admission has places left. Who stands there cannot be overtaken by who was served less. So no more stand there
than about twice the rows with which it begins at a time, and one once it has made them wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.jobs import Job


class Lineup:
    """Asked once before each step, then told. `most`: rows of a cohort."""

    def __init__(self, most: int) -> None:
        self.held = False
        """Whether who waits is held for others who are on their way, unless they are a cohort already."""
        self._most = self._allowed = most
        self._standing = 0
        self._stalled = False

    @property
    def stalled(self) -> bool:
        """Whether rows that were handed over wait although the backend has nothing else to do with newcomers."""
        return self._stalled

    def due(self, waiting: int) -> bool:
        """Whether any of so many who wait is not held."""
        return waiting > 0 and (not self.held or waiting >= self._most)

    def room(self, running: Sequence[Job], waiting: int, *, busy: bool) -> int:
        """Rows to hand over now of `waiting`, beside those that are `running`; `busy`: the backend is copying."""
        phases = [job.phase for job in running]
        left = phases.count("queue")
        begun, self._standing = self._standing - left, left
        if left and not begun:
            self._stalled = self._stalled or not (busy or "prefill" in phases)
        elif begun:
            self._stalled = False
            self._allowed = min(self._most, 2 * (begun if left else self._allowed))
        if self._stalled:
            self._allowed = 1
        return max(0, self._allowed - left) if self.due(waiting) else 0

    def handed_over(self, rows: int) -> None:
        """So many were."""
        self._standing += rows
