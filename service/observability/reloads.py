"""How the last reload of the configuration ended, for whoever asks. Belongs to the event loop's thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.observability.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """One reload, at Unix time `at`. With `problems` it changed nothing.

    `applied` are the keys that it put in force, `restart_needed` those that differ from what runs and wait for a
    restart; a failed one repeats what the last good one said of these.
    """

    at: float
    problems: Sequence[str] = ()
    applied: Sequence[str] = ()
    restart_needed: Sequence[str] = ()


class Reloads:
    """Keeps the last one and counts them all."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.last: Reload | None = None

    def note(self, reload: Reload) -> None:
        """Take the place of the one before."""
        self.last = reload
        self._metrics.config_reloads.labels("failure" if reload.problems else "success").inc()
