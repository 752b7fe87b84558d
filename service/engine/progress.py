"""How far the engine gets: the one thing that tells busy from stuck.

Progress is what somebody could wait for: a token, a chunk of a prompt, a layer copied, a stage of loading. That the
generation thread takes steps is none: it may do so for ever and get nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    """What the generation thread does, or was about to do when it got stuck."""

    IDLE = "idle"
    LOADING = "loading"
    WARMING = "warming"
    QUEUED = "queued"
    PLANNING = "planning"
    STEPPING = "stepping"
    DELIVERING = "delivering"
    REBUILDING = "rebuilding"
    CANARY = "canary"

    @property
    def starting(self) -> bool:
        return self in {Phase.LOADING, Phase.WARMING}


class Progress:
    """Seconds for which there is work and nothing comes of it. `clock` is monotonic, in seconds.

    Written by the generation thread, and under its lock by who brings work. Any thread may read: there is no lock here,
    so that it can be read whatever the stuck thread holds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = 0.0
        self._barren = 0.0
        self.phase = Phase.IDLE

    @property
    def age(self) -> float | None:
        """Seconds of work since the last progress; None while there is nothing to do.

        Steps that had rows and got nowhere stay counted over pauses: clients that give up before the watchdog does, one
        after the other, would hide a livelock.
        """
        barren = self._barren  # first, so that a step that ends meanwhile is not counted twice
        return None if self.phase is Phase.IDLE else barren + self._clock() - self._since

    def enter(self, phase: Phase) -> None:
        """There is work, and it is in `phase`; the time runs from here if there was none."""
        if self.phase is Phase.IDLE:
            self._since = self._clock()
        self.phase = phase

    def queued(self) -> None:
        """Work was brought; where there is some already, that says nothing new."""
        if self.phase is Phase.IDLE:
            self.enter(Phase.QUEUED)

    def made(self) -> None:
        """Something came of it."""
        self._barren = 0.0
        self._since = self._clock()

    def reported(self) -> None:
        """A stage of loading was told, by any thread; a late report of a download says nothing of what came after."""
        if self.phase.starting:
            self.made()

    def stepped(self, *, fruitful: bool, wanted: bool) -> None:
        """A step has ended, `fruitful` or not; `wanted`: there are rows that it should have brought on."""
        if fruitful:
            self.made()
        elif wanted:
            now = self._clock()
            self._barren += now - self._since
            self._since = now

    def rest(self) -> None:
        """Nothing is left to do."""
        self.phase = Phase.IDLE
