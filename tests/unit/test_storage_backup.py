"""A backup is a whole, private, new file, made beside a writer; or there is none."""

import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from service.settings import StorageSettings
from service.storage import audit, keys
from service.storage.backup import BackupRefused, back_up
from service.storage.database import Database
from service.storage.failures import Reason, StorageFailure
from service.storage.inspection import inspect
from tests.databases import create


@pytest.fixture
def settings(sqlite_url: str) -> StorageSettings:
    return StorageSettings(url=sqlite_url)


@pytest.fixture
def database(settings: StorageSettings, tmp_path: Path) -> Any:
    with Database.open(settings, tmp_path, migrate=True) as database:
        for number in range(3):
            database.write(create(number)).result()
        yield database


def test_a_backup_holds_what_was_committed_while_a_writer_is_at_work(
    database: Database, settings: StorageSettings, tmp_path: Path
) -> None:
    target = tmp_path / "restored" / "mlxd.db"
    target.parent.mkdir(mode=0o700)

    def meanwhile(connection: Any) -> None:
        create(3)(connection)
        back_up(settings, tmp_path, target)

    database.write(meanwhile).result()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [path.name for path in target.parent.iterdir()] == ["mlxd.db"]
    assert len(database.read(keys.all_keys).result()) == 4
    restored = StorageSettings(url=f"sqlite:///{target}")
    assert all(finding.ok for finding in inspect(restored, tmp_path))
    with Database.open(restored, tmp_path) as copy:
        assert {each.kid for each in copy.read(keys.all_keys).result()} == {"k0", "k1", "k2"}
        copy.write(create(9)).result()
        assert copy.read(audit.verify).result().count == 4


@pytest.mark.usefixtures("database")
def test_a_backup_never_overwrites(settings: StorageSettings, tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.write_text("precious")
    with pytest.raises(BackupRefused, match="exists already"):
        back_up(settings, tmp_path, target)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BackupRefused, match="exists already"):
        back_up(settings, tmp_path, tmp_path / "link")
    assert target.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("database")
def test_a_place_that_is_not_there_is_named(settings: StorageSettings, tmp_path: Path) -> None:
    with pytest.raises(BackupRefused, match="no/x cannot be written: No such file or directory"):
        back_up(settings, tmp_path, tmp_path / "no" / "x")


def test_postgresql_has_its_own_tool(postgres_url: str, tmp_path: Path) -> None:
    with pytest.raises(BackupRefused, match="pg_dump"):
        back_up(StorageSettings(url=postgres_url), tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


class Full(sqlite3.Connection):
    """A target whose disk is full once the copy has begun."""

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if "synchronous" in statement:
            super().execute("PRAGMA max_page_count = 2")
        return super().execute(statement, *parameters)


def test_a_backup_that_does_not_fit_is_removed(
    database: Database, settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageFailure) as caught:
        _with_target(monkeypatch, Full, settings, tmp_path)
    assert caught.value.reason is Reason.FULL
    assert not (tmp_path / "copy").exists()
    assert len(database.read(keys.all_keys).result()) == 3


class Damaged(sqlite3.Connection):
    """A target in which the check finds something."""

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return super().execute("SELECT 'row 3 missing'" if "integrity" in statement else statement, *parameters)


@pytest.mark.usefixtures("database")
def test_a_copy_that_is_damaged_is_removed(
    settings: StorageSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageFailure, match="The copy is damaged: row 3 missing") as caught:
        _with_target(monkeypatch, Damaged, settings, tmp_path)
    assert caught.value.reason is Reason.DAMAGED
    assert not (tmp_path / "copy").exists()


def _with_target(
    monkeypatch: Any, factory: type[sqlite3.Connection], settings: StorageSettings, tmp_path: Path
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr("service.storage.backup.sqlite3.connect", lambda target: connect(target, factory=factory))
    back_up(settings, tmp_path, tmp_path / "copy")


@pytest.mark.usefixtures("database")
def test_a_backup_is_readable_by_itself(settings: StorageSettings, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    back_up(settings, tmp_path, target)
    target.chmod(0o400)
    with closing(sqlite3.connect(f"file:{target}?mode=ro&immutable=1", uri=True)) as copy:
        assert copy.execute("SELECT count(*) FROM keys").fetchone() == (3,)
