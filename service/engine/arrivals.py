"""Requests that come together are begun together. Belongs to the event loop.

Those of one wave reach the generation thread one after the other. On a GPU a cohort of the first alone takes nearly as
long as one of all, where their prompts are short or cached. So who comes is held until the loop is through with
everybody who had come by then. Where that is nobody else it takes a tenth of a millisecond on two cores, 0.3
to 0.5 on an H100's host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.worker import Worker

TURNS = 6
"""Of the event loop, in which a connection is accepted, and its request read and submitted."""

MOST_PATIENCE = 0.02
"""Seconds for which anybody is held at most, and for no longer than the backend says that it is worth."""


class Arrivals:
    """Holds newcomers while others are on their way, but once only until the loop is through with all of them: a
    request that is made ready slowly delays the others once."""

    def __init__(self) -> None:
        self._come = 0
        self._underway = 0
        self._through = True
        self._watching = False
        self._holding: tuple[Worker, asyncio.TimerHandle] | None = None

    @contextmanager
    def underway(self) -> Iterator[None]:
        """While a request is made ready for submission off the loop."""
        self._underway += 1
        try:
            yield
        finally:
            self._underway -= 1
            if not self._through:
                self._watch()

    def came(self, worker: Worker, prompt: int) -> None:
        """Somebody with a prompt of so many tokens is about to be submitted to `worker`."""
        self._come += 1
        if self._through and (patience := min(MOST_PATIENCE, worker.patience(prompt))) > 0:
            worker.hold(True)
            self._holding = worker, asyncio.get_running_loop().call_later(patience, self._release)
            self._through = False
            self._watch()

    def lose(self) -> None:
        """The worker is lost: it is not told anything any more."""
        if self._holding is not None:
            self._holding[1].cancel()
            self._holding = None

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._look(self._come, 0)

    def _look(self, come: int, turns: int) -> None:
        """Once more after every turn of the loop, until nobody came for `TURNS` of them."""
        if come != self._come:
            come, turns = self._come, 0
        if turns < TURNS:
            asyncio.get_running_loop().call_soon(self._look, come, turns + 1)
            return
        self._watching = False
        if not self._underway:
            self._through = True
            self._release()

    def _release(self) -> None:
        if self._holding is not None:
            worker, latest = self._holding
            latest.cancel()
            self._holding = None
            worker.hold(False)
