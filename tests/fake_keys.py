"""A scripted key store, and a key ring over it whose clocks and operations the test holds."""

from __future__ import annotations

import asyncio
import hmac
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.auth.key_format import ParsedKey, generate
from service.auth.keyring import KeyRing
from service.auth.pepper import Peppers
from service.errors import StorageUnavailable
from service.storage.keys import KeyRecord


class ScriptedStore:
    """Keys in memory. `broken` makes it unreadable, `hold` makes each query wait."""

    def __init__(self) -> None:
        self.records: dict[str, KeyRecord] = {}
        self.number = 1
        self.broken = False
        self.hold: asyncio.Event | None = None
        self.trace: list[str] = []
        self.together = 0
        self.most_together = 0
        self.touched: list[Mapping[str, float]] = []

    def put(self, record: KeyRecord) -> None:
        self.records[record.kid] = record
        self.number += 1

    def change(self, kid: str, **changes: Any) -> None:
        self.put(replace(self.records[kid], **changes))

    def remove(self, kid: str) -> None:
        del self.records[kid]
        self.number += 1

    async def _ask(self, what: str) -> None:
        self.trace.append(what)
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(0)
        finally:
            self.together -= 1
        if self.broken:
            raise StorageUnavailable("scripted")

    async def revision(self) -> int:
        number = self.number  # as of the beginning of the query
        await self._ask("revision")
        return number

    async def all_keys(self) -> Sequence[KeyRecord]:
        await self._ask("all_keys")
        return list(self.records.values())

    async def touch(self, used: Mapping[str, float]) -> None:
        if self.broken:
            raise StorageUnavailable("scripted")
        self.touched.append(used)


class TracedPeppers(Peppers):
    """Notes in `trace` each HMAC, and how much was hashed."""

    def __init__(self, path: Path, secrets_by_version: Mapping[int, bytes]) -> None:
        super().__init__(path, secrets_by_version)
        self.trace: list[str] = []

    def digest(self, version: int, text: str) -> bytes:
        self.trace.append(f"hmac of {len(text)}")
        return super().digest(version, text)


class World:
    """A key ring, its store, its two clocks, and keys to ask it with."""

    def __init__(self, tmp_path: Path, *, stale_for: float = 60.0) -> None:
        self.store = ScriptedStore()
        self.monotonic = 1000.0
        self.wall = 1_800_000_000.0
        self.pepper_path = tmp_path / "pepper.json"
        self.peppers = TracedPeppers.open(self.pepper_path)
        self.peppers.trace = self.store.trace
        self._random = random.Random(5)
        self.ring = KeyRing(
            self.store,
            self.peppers,
            touch=self.store.touch,
            stale_for=stale_for,
            clock=lambda: self.monotonic,
            now=lambda: self.wall,
            compare=self._compare,
        )

    def _compare(self, ours: bytes, theirs: bytes) -> bool:
        assert type(ours) is type(theirs) is bytes
        self.store.trace.append(f"compare {len(ours)} with {len(theirs)}")
        return hmac.compare_digest(ours, theirs)

    def key(self) -> ParsedKey:
        """A well-formed key that nobody knows."""
        return generate("live", self._random)

    def add(self, key: ParsedKey | None = None, peppers: Peppers | None = None, **attributes: Any) -> str:
        """Store a key; returns its text."""
        key, peppers = key or self.key(), peppers or self.peppers
        record = KeyRecord(
            **{
                "kid": key.kid,
                "principal": f"key:{key.kid}",
                "tenant": f"key:{key.kid}",
                "name": "a key",
                "scopes": frozenset({"inference", "models"}),
                "plan": "default",
                "hash": Peppers.digest(peppers, peppers.current, key.text),
                "pepper_version": peppers.current,
                "created_at": self.wall,
                **attributes,
            }
        )
        self.store.put(record)
        return key.text
