"""Ids that nobody can guess, of requests, answers and what was used."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Final

BYTES: Final = 16
STOCK: Final = 256
"""Ids that one question to the system is enough for."""


class Ids:
    """At each call one of 128 random bits, in 32 hexadecimal digits, well-formed as a request id. Any thread.

    They come from a stock, because who asks the system lets go of the interpreter, and beside a thread that computes
    may wait for a millisecond to have it back: 73 us for each on average, instead of one.
    """

    def __init__(self, random: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._random = random
        self._stock: Iterator[str] = iter(())

    def __call__(self) -> str:
        found = next(self._stock, None)
        if found is None:
            digits, size = self._random(STOCK * BYTES).hex(), 2 * BYTES
            found, *more = (digits[at : at + size] for at in range(0, len(digits), size))
            self._stock = iter(more)
        return found
