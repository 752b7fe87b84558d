"""The development key: kept, made anew when it does not work, and gone where it is not wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.auth import development
from service.auth.api_keys import Operator, list_all
from service.auth.key_format import KID_LENGTH, generate, parse
from service.auth.key_spec import KeySpec
from service.auth.key_store import DatabaseKeyStore
from service.auth.keyring import KeyRing
from service.auth.pepper import Peppers
from service.auth.principal import Scope
from service.errors import InvalidRequest, StorageUnavailable
from service.settings import ConfigurationError, read_private, write_private
from service.storage import audit, keys
from service.storage.database import Database
from service.storage.keys import KeyRecord


class Start:
    """What each start of the service does."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.path = folder / "state" / development.FILE_NAME
        self.peppers = Peppers.open(folder / "pepper.json")

    def ensure(self) -> str:
        return development.ensure(self.database, self.peppers, self.path)

    def withdraw(self) -> int:
        return development.withdraw(self.database, self.peppers, self.path)

    def records(self) -> list[KeyRecord]:
        return list(self.database.read(list_all).result())

    def events(self) -> list[str]:
        entries = self.database.read(lambda connection: audit.entries(connection, limit=100)).result()
        assert {entry.actor for entry in entries} <= {"service", "tester"}
        return [entry.event for entry in reversed(entries)]


@pytest.fixture
def start(database: Database, tmp_path: Path) -> Start:
    return Start(database, tmp_path)


async def test_the_first_start_makes_a_key_that_works_and_the_next_ones_keep_it(start: Start) -> None:
    text = start.ensure()
    assert parse(text).env == "dev"
    assert read_private(start.path) == f"{text}\n".encode()
    assert start.path.stat().st_mode & 0o777 == 0o600
    assert [start.ensure() for _ in range(2)] == [text, text]
    assert start.events() == ["key_created"], "a start that finds its key writes nothing"
    store = DatabaseKeyStore(start.database)
    grant = await KeyRing(store, start.peppers, touch=store.touch, stale_for=60.0).verify(text, "127.0.0.1")
    assert grant.principal.scopes == set(Scope) - {Scope.ADMIN}
    assert grant.principal.tenant == development.TENANT


def lose_file(start: Start) -> None:
    start.path.unlink()


def garble_file(start: Start) -> None:
    write_private(start.path, b"\xffnonsense", replace=True)


def put_another_key_there(start: Start) -> None:
    operator = Operator(actor="tester", peppers=start.peppers, environment="live")
    spec = KeySpec.of(name="production", scopes=["admin"])
    issued = start.database.write(lambda connection: operator.create(connection, spec)).result()
    write_private(start.path, issued.text.encode(), replace=True)


def revoke(start: Start) -> None:
    kid = start.records()[0].kid
    start.database.write(lambda connection: keys.revoke(connection, kid, 1.0)).result()


def rescope(start: Start) -> None:
    kid = start.records()[0].kid
    start.database.write(lambda connection: keys.update(connection, kid, scopes=frozenset({"admin"}))).result()


def change_hash(start: Start) -> None:
    kid = start.records()[0].kid
    start.database.write(lambda connection: keys.update(connection, kid, hash=b"x" * 32)).result()


def lose_pepper(start: Start) -> None:
    kid = start.records()[0].kid
    start.database.write(lambda connection: keys.update(connection, kid, pepper_version=9)).result()


@pytest.mark.parametrize(
    "spoil", [lose_file, garble_file, put_another_key_there, revoke, rescope, change_hash, lose_pepper]
)
def test_a_key_that_does_not_work_is_replaced_and_the_former_one_revoked(
    start: Start, spoil: Callable[[Start], None]
) -> None:
    first = start.ensure()
    spoil(start)
    second = start.ensure()
    assert second != first
    assert start.ensure() == second
    alive = [each.kid for each in start.records() if each.tenant == development.TENANT and each.revoked_at is None]
    assert alive == [parse(second).kid]
    assert start.events()[-1] == "key_created"


def test_a_key_of_another_database_is_replaced(start: Start) -> None:
    text = generate("dev").text
    write_private(start.path, f"{text}\n".encode(), replace=False)
    assert start.ensure() not in {text, ""}
    assert len(start.records()) == 1


def test_a_file_that_others_can_read_is_refused_and_not_used(start: Start) -> None:
    start.ensure()
    start.path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        start.ensure()


def test_where_it_is_not_wanted_it_is_revoked_and_its_file_removed(start: Start) -> None:
    assert start.withdraw() == 0
    assert start.events() == [], "a start that finds nothing writes nothing"
    start.ensure()
    assert start.withdraw() == 1
    assert not start.path.exists()
    assert all(record.revoked_at is not None for record in start.records())
    assert (start.withdraw(), start.events()) == (0, ["key_created", "key_revoked"])


def test_the_operators_keys_are_left_alone(start: Start) -> None:
    put_another_key_there(start)
    start.ensure()
    start.withdraw()
    assert [record.name for record in start.records() if record.revoked_at is None] == ["production"]


def test_a_store_that_is_down_is_told(start: Start) -> None:
    start.database.close()
    with pytest.raises(StorageUnavailable):
        start.ensure()
    assert not start.path.exists()


def test_nobody_else_can_have_its_tenant() -> None:
    name = development.TENANT.removeprefix("key:")
    assert len(name) != KID_LENGTH
    with pytest.raises(InvalidRequest):
        KeySpec.of(name="x", scopes=["models"], tenant=development.TENANT)
