"""A database that comes later."""

from pathlib import Path

import pytest

from service.settings import StorageSettings
from service.storage.connection import Connection
from service.storage.database import Database
from service.storage.failures import Reason, StorageFailure
from service.storage.keys import revision
from service.storage.opening import OpeningDatabase


class Machine:
    """Where a database is, once `up`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"
        self.up = False
        self.connections = 0

    def connect(self) -> Database:
        if not self.up:
            raise StorageFailure(Reason.UNREACHABLE)
        self.connections += 1
        return Database.open(StorageSettings(), self.folder, migrate=True)


def test_until_it_is_there_all_work_fails_and_from_then_on_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    database = OpeningDatabase(machine.connect)
    for submit in (database.read, database.write):
        with pytest.raises(StorageFailure):
            submit(revision).result(10)
    with pytest.raises(StorageFailure):
        database.open()
    was_open = database.is_open
    machine.up = True
    assert database.open() is database.open()
    assert (was_open, database.is_open) == (False, True)
    assert machine.connections == 1
    assert (database.read(revision).result(10), database.write(revision).result(10)) == (0, 0)
    database.close()
    database.close()


def test_what_was_closed_is_not_opened_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.up = True
    never = OpeningDatabase(machine.connect)
    never.close()
    with pytest.raises(StorageFailure):
        never.open()
    assert machine.connections == 0
    once = OpeningDatabase(machine.connect)
    once.open()
    once.close()

    def work(_: Connection) -> None:
        raise AssertionError

    with pytest.raises(StorageFailure):
        once.read(work).result(10)
