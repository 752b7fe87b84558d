"""Moving windows in memory for the `limits` library, on an injected monotonic clock.

The library's own memory storage is on wall time: a clock that is put forward and back blocks a key for as long as
the jump, and one that is put back blocks it again. It also never bounds its keys, and sweeps them in a thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from limits.storage import MovingWindowSupport, Storage

SCHEME = "mlxd-memory"
MAX_KEYS = 65_536
"""Windows that are kept; beyond it the one that was used longest ago starts anew."""

FORGOTTEN_PER_HIT = 8
"""More than a hit can add."""


@dataclass(slots=True)
class _Window:
    """Times of hits, oldest first; none counts for longer than `length` seconds."""

    length: float
    hits: deque[float] = field(default_factory=deque)

    def trim(self, now: float) -> None:
        while self.hits and self.hits[0] + self.length <= now:
            self.hits.popleft()


class MonotonicWindows(Storage, MovingWindowSupport):
    """Holds what was hit within a window, and no key longer than that. Any thread.

    Registered under `mlxd-memory://`, so that `storage_uri` names it. Only the moving-window strategy works on it.
    Times that the library reports as absolute are times of `clock`.
    """

    STORAGE_SCHEME = (SCHEME,)  # type: ignore[assignment]  # the library iterates; a list would be shared state

    def __init__(
        self,
        uri: str | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_keys: int = MAX_KEYS,
    ) -> None:
        super().__init__(uri)
        self._clock = clock
        self._max_keys = max_keys
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Count `amount` hits now, all or none; what is refused is not counted."""
        with self._lock:
            now = self._clock()
            window = self._windows.get(key)
            if window is None:
                window = _Window(expiry)
            window.trim(now)
            if len(window.hits) + amount > limit:
                return False
            window.hits.extend([now] * amount)
            self._windows[key] = window
            self._windows.move_to_end(key)
            self._forget(now)
            return True

    def _forget(self, now: float) -> None:
        """Drop windows from the front, where those stand that were hit longest ago; a few, so that no hit is slow."""
        for _ in range(FORGOTTEN_PER_HIT):
            key, window = next(iter(self._windows.items()))
            over = not window.hits or window.hits[-1] + window.length <= now
            if not over and len(self._windows) <= self._max_keys:
                return
            del self._windows[key]

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:  # noqa: ARG002
        """The time of the oldest hit that counts (now, without one), and how many count."""
        with self._lock:
            now = self._clock()
            window = self._windows.get(key)
            if window is None:
                return now, 0
            window.trim(now)
            return (window.hits[0], len(window.hits)) if window.hits else (now, 0)

    def take_back(self, key: str) -> None:
        """Make the last hit not counted; nothing where there is none."""
        with self._lock:
            window = self._windows.get(key)
            if window is not None and window.hits:
                window.hits.pop()

    def newest(self, key: str) -> float | None:
        """The time of the last hit, or None when there is none."""
        with self._lock:
            window = self._windows.get(key)
            return window.hits[-1] if window is not None and window.hits else None

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        with self._lock:
            count = len(self._windows)
            self._windows.clear()
            return count

    def clear(self, key: str) -> None:
        with self._lock:
            self._windows.pop(key, None)

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError

    def get(self, key: str) -> int:
        raise NotImplementedError

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError
