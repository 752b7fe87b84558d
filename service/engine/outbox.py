"""When text is handed to the event loop: after every step, or after some of them where steps are short.

A hand-over wakes one task for each stream and writes to its socket, which takes more time than many a step: 32 streams
of a model whose steps take four milliseconds had half of a core for it. Nobody reads that fast.
"""

from __future__ import annotations

from service.engine.generation import Delta, Generation

Delivery = tuple[Generation, Delta]


class Outbox:
    """What waits for the hand-over, a delta for each generation. Whoever calls holds the worker's lock.

    Text may wait for the next step while the last hand-over was less than `interval` seconds ago. A row's first text,
    its end and an error never wait, and whatever waits goes with them.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._waiting: dict[Generation, Delta] = {}
        self._urgent = False
        self._handed_over = float("-inf")

    def post(self, generation: Generation, delta: Delta, *, urgent: bool) -> None:
        before = self._waiting.get(generation)
        self._waiting[generation] = delta if before is None else before.merged(delta)
        self._urgent |= urgent

    def take(self, now: float, *, patient: bool) -> list[Delivery]:
        """What is to be handed over now; when `patient`, nothing that may wait. `patient` promises that a step comes,
        and no long one."""
        if not self._waiting or (patient and not self._urgent and now - self._handed_over < self._interval):
            return []
        taken, self._waiting, self._urgent = self._waiting, {}, False
        self._handed_over = now
        return list(taken.items())
