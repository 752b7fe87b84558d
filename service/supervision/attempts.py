"""Trying to load until it works, with a pause that doubles, while the process answers that it is not ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

from service.errors import ModelTooLarge, ModelUnavailable, NotEnoughMemory
from service.observability.logging import get_logger
from service.supervision.policy import backoff

Loaded = TypeVar("Loaded")
Need = Callable[[], str]
"""What must be had before a load, such as an address: tries to have it, and says why not; empty when it has it."""

LONGEST_PAUSE = 30.0
"""Most seconds between two tries: what was missing is found soon after it is there."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """How a load is tried. The default is once, at once.

    First it waits for `delay` seconds, `because` of earlier starts. What a load lacks is waited for up to `patience`
    seconds since it was first missed; memory for as long as it takes; a model that can never fit not at all. `first`
    and `longest` bound the pauses between two tries. `now` is wall time, `clock` monotonic, both in seconds.
    """

    delay: float = 0.0
    because: str = ""
    patience: float = 0.0
    needs: tuple[Need, ...] = ()
    first: float = 1.0
    longest: float = LONGEST_PAUSE
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic

    def run(
        self, load: Callable[[], Loaded], *, tell: Callable[[str], object], pause: Callable[[float], object]
    ) -> Loaded:
        """What `load` returns, sooner or later. Raises what it raised last when patience is over. Blocks.

        `tell` is told what is waited for and until when. `pause` waits for seconds, and raises to end it all.
        """
        if self.delay:
            _log.warning("start_delayed", seconds=self.delay, reason=self.because)
            tell(f"{self.because}; loading begins at {self._moment(self.delay)}")
            pause(self.delay)
        began, tries = self.clock(), 0
        while True:
            tries += 1
            try:
                self._have_needs()
                if tries > 1:
                    _log.info("load_tried_again", attempt=tries)
                return load()
            except ModelUnavailable as error:
                seconds = backoff(tries, self.first, self.longest)
                if not self._is_patient(error, self.clock() - began):
                    raise
                why = error.message
            _log.warning("load_delayed", seconds=seconds, attempt=tries, reason=why)
            tell(f"{why}; next try at {self._moment(seconds)}")
            pause(seconds)

    def _have_needs(self) -> None:
        """Raises ModelUnavailable: where an address is taken or another engine runs, a model is not to be loaded."""
        for need in self.needs:
            if why := need():
                raise ModelUnavailable(why)

    def _is_patient(self, error: ModelUnavailable, waited: float) -> bool:
        if self.patience <= 0 or isinstance(error, ModelTooLarge):
            return False
        return isinstance(error, NotEnoughMemory) or waited < self.patience

    def _moment(self, seconds: float) -> str:
        return datetime.fromtimestamp(self.now() + seconds, UTC).strftime("%H:%M:%SZ")


ONCE = Attempts()
