"""How many rows are handed to the backend before it begins with them. No mlx; one thread.

The backend takes prompts in the order in which it got them, and where steps are limited by time it may make them wait
although admission has places left. Who stands there cannot be overtaken by who was served less. So the next rows are
handed over when it has begun with the last, a cohort at a time; and one at a time once it has made them wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.engine.jobs import Job


class Lineup:
    """Asked once before each step. `most`: rows of a cohort."""

    def __init__(self, most: int) -> None:
        self._most = self._allowed = most
        self._stalled = False

    @property
    def stalled(self) -> bool:
        """Whether rows that were handed over wait although the backend has nothing else to do with newcomers."""
        return self._stalled

    def room(self, running: Sequence[Job], *, busy: bool) -> int:
        """Rows to hand over now, beside those that are `running`; `busy`: the backend is copying."""
        phases = {job.phase for job in running}
        if "queue" in phases:
            if "prefill" not in phases and not busy:
                self._stalled, self._allowed = True, 1
            return 0
        if not self._stalled:
            self._allowed = min(2 * self._allowed, self._most)
        self._stalled = False
        return self._allowed
