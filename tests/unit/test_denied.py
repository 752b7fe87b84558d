"""The deny-list over a real database: what it refuses, how fresh it is, and what happens when it cannot be read."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from service.auth.claims import Identity
from service.auth.denial_store import DatabaseDenialStore
from service.auth.denied import DenyList, deny
from service.errors import StorageUnavailable
from service.settings import StorageSettings
from service.storage import audit
from service.storage.database import Database
from service.storage.denied import Denied

NOW = 1_800_000_000.0
TOKEN = Identity("acme", "alice", "t1")


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(StorageSettings(), tmp_path / "state", migrate=True) as opened:
        yield opened


def write(database: Database, identity: Identity, lasting: float = 60.0) -> None:
    database.write(lambda connection: deny(connection, identity, lasting=lasting, actor="cli:0", now=NOW)).result()


def deny_list(database: Database) -> tuple[DenyList, Clock, Clock]:
    now, clock = Clock(NOW), Clock(0.0)
    return DenyList(DatabaseDenialStore(database), stale_for=60.0, now=now, clock=clock), now, clock


async def test_a_token_is_denied_by_its_id_and_only_that_one(database: Database) -> None:
    listed, _, _ = deny_list(database)
    assert await listed.refresh()
    assert not listed.denies(TOKEN)
    write(database, TOKEN)
    assert not listed.denies(TOKEN), "not before the next poll"
    assert await listed.refresh()
    assert listed.denies(TOKEN)
    others = [Identity("acme", "alice", "t2"), Identity("acme", "alice", None), Identity("other", "alice", "t1")]
    assert not any(map(listed.denies, others))


async def test_a_subject_is_denied_with_all_its_tokens_but_not_its_namesake(database: Database) -> None:
    listed, _, _ = deny_list(database)
    write(database, Identity("acme", "alice", None))
    await listed.refresh()
    assert all(map(listed.denies, [TOKEN, Identity("acme", "alice", None), Identity("acme", "alice", "new")]))
    assert not listed.denies(Identity("other", "alice", "t1"))
    assert not listed.denies(Identity("acme", "t1", "alice"))


async def test_a_denial_ends_by_itself(database: Database) -> None:
    listed, now, _ = deny_list(database)
    write(database, TOKEN, lasting=60)
    await listed.refresh()
    now.now += 59
    assert listed.denies(TOKEN)
    now.now += 1
    assert not listed.denies(TOKEN)


async def test_a_denial_is_in_the_audit_log(database: Database) -> None:
    write(database, TOKEN)
    [entry] = database.read(lambda connection: audit.entries(connection, limit=10)).result()
    assert (entry.event, entry.actor) == ("token_denied", "cli:0")
    assert entry.detail == '{"issuer":"acme","jti":"t1","until":1800000060.0}'


async def test_listeners_hear_of_changes_only(database: Database) -> None:
    listed, _, _ = deny_list(database)
    heard: list[int] = []
    listed.on_change(lambda: heard.append(1))
    await listed.refresh()
    assert heard == [1]
    await listed.refresh()
    write(database, TOKEN)
    assert heard == [1]
    await listed.refresh()
    assert heard == [1, 1]


class Rows:
    """A store that can be broken."""

    def __init__(self) -> None:
        self.broken = self.silent = False
        self.asked = 0

    async def revision(self) -> int:
        self.asked += 1
        await self._answer()
        return 1

    async def _answer(self) -> None:
        if self.silent:
            await asyncio.Event().wait()
        if self.broken:
            raise StorageUnavailable("broken")

    async def all_denied(self, now: float) -> Sequence[Denied]:
        await self._answer()
        return [Denied(issuer="acme", kind="jti", value="t1", expires_at=now + 60, created_at=now)]


def scripted() -> tuple[DenyList, Rows, Clock]:
    rows, clock = Rows(), Clock(0.0)
    return DenyList(rows, stale_for=60.0, now=Clock(NOW), clock=clock, timeout=0.02), rows, clock


def readable(listed: DenyList) -> bool:
    try:
        listed.check_readable()
    except StorageUnavailable as error:
        assert "denied" not in error.message  # noqa: PT017 - it is about the message too
        return False
    return True


@pytest.mark.parametrize("way", ["broken", "silent"])
async def test_what_is_known_is_gone_by_for_a_while_when_the_store_cannot_be_read(way: str) -> None:
    listed, rows, clock = scripted()
    assert not readable(listed), "nothing is known yet"
    assert await listed.refresh()
    assert readable(listed)
    setattr(rows, way, True)
    clock.now = 60.0
    assert not await listed.refresh()
    assert readable(listed)
    assert listed.denies(TOKEN)
    clock.now = 60.1
    assert not readable(listed)
    setattr(rows, way, False)
    assert await listed.refresh()
    assert readable(listed)


async def test_who_polls_for_the_keys_polls_for_the_denials_too() -> None:
    listed, rows, clock = scripted()
    heard: list[int] = []
    listed.on_change(lambda: heard.append(1))
    assert await listed.up_to(1, 0.0)
    assert (readable(listed), listed.denies(TOKEN), rows.asked, heard) == (True, True, 0, [1])
    clock.now = 60.1
    assert await listed.up_to(1, 30.0)
    assert (readable(listed), heard) == (True, [1]), "as old as the poll's beginning, and not read again"
    assert not await listed.up_to(None, 60.0)
    clock.now = 90.1
    assert not readable(listed)


@pytest.mark.parametrize("way", ["broken", "silent"])
async def test_rows_that_cannot_be_read_leave_what_is_known(way: str) -> None:
    listed, rows, clock = scripted()
    assert await listed.up_to(1, 0.0)
    setattr(rows, way, True)
    clock.now = 60.1
    assert not await listed.up_to(2, 60.0)
    assert (readable(listed), listed.denies(TOKEN)) == (False, True)
    setattr(rows, way, False)
    assert await listed.up_to(2, 60.0)
    assert readable(listed)
