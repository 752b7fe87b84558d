"""`mlxd db` and `mlxd audit`: what they print for people and for programs, and how they end."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service import cli
from service.settings import StorageSettings
from service.storage import audit
from service.storage.database import Database, upgrade
from service.storage.migrations import MIGRATIONS
from tests.databases import create

STEPS = list(range(1, len(MIGRATIONS) + 1))


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(f"[server]\nstate_dir = 'state'\n[storage]\nurl = '{database_url}'\n[log]\nlevel = 'error'\n")
    return path


@pytest.fixture
def mlxd(config: Path) -> Any:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli.commands(), ["--config", str(config), *arguments])

    return invoke


@pytest.fixture
def filled(storage_settings: StorageSettings, tmp_path: Path) -> StorageSettings:
    with Database.open(storage_settings, tmp_path, migrate=True) as database:
        for number in range(3):
            database.write(create(number)).result()
    return storage_settings


def tamper(settings: StorageSettings, tmp_path: Path, statement: str) -> None:
    with Database.open(settings, tmp_path) as database:
        database.write(lambda connection: connection.exec_driver_sql(statement)).result()


def test_migrate_says_what_it_made(mlxd: Any) -> None:
    first = mlxd("db", "migrate", "--json")
    assert (first.exit_code, json.loads(first.stdout)) == (0, {"made": STEPS})
    again = mlxd("db", "migrate")
    assert (again.exit_code, again.stdout) == (0, "nothing to migrate\n")


def test_migrate_tells_people_too(mlxd: Any) -> None:
    result = mlxd("db", "migrate")
    assert (result.exit_code, result.stdout) == (0, f"migrations made: {', '.join(map(str, STEPS))}\n")


@pytest.mark.usefixtures("filled")
def test_check_finds_a_used_database_sound(mlxd: Any) -> None:
    result = mlxd("db", "check", "--json")
    assert result.exit_code == 0
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert list(found) == ["file", "schema", "keys", "audit"]
    assert all(finding["ok"] for finding in found.values())
    assert found["keys"]["detail"] == "3 keys, revision 3"
    table = mlxd("db", "check")
    assert table.exit_code == 0
    assert "3 keys, revision 3" in table.stdout
    assert "DAMAGED" not in table.stdout


DAMAGE = {
    "a table is gone": ("DROP TABLE denied", ("schema", "missing: denied")),
    "a column is gone": ("ALTER TABLE keys DROP COLUMN rotated_to", ("schema", "missing: keys.rotated_to")),
    "the revision is gone": ("DELETE FROM revisions", ("keys", "cannot be read")),
    "scopes are something else": ("UPDATE keys SET scopes = '7'", ("keys", "cannot be read")),
    "the log was altered": ("UPDATE audit SET actor = 'x' WHERE seq = 2", ("audit", "entry 2 is altered, after 1 ")),
}


@pytest.mark.parametrize(("statement", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_check_says_what_is_damaged_and_ends_with_1(
    filled: StorageSettings, mlxd: Any, tmp_path: Path, statement: str, expected: tuple[str, str]
) -> None:
    tamper(filled, tmp_path, statement)
    result = mlxd("db", "check", "--json")
    assert result.exit_code == 1
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert not found[expected[0]]["ok"]
    assert expected[1] in found[expected[0]]["detail"]
    assert found["file"]["ok"]
    table = mlxd("db", "check")
    assert table.exit_code == 1
    assert "DAMAGED" in table.stdout


def test_check_of_an_older_database_says_to_migrate(mlxd: Any, database_url: str, tmp_path: Path) -> None:
    if database_url.startswith("sqlite"):
        upgrade(StorageSettings(url=database_url), tmp_path)
        tamper(StorageSettings(url=database_url), tmp_path, "DELETE FROM schema_version")
    result = mlxd("db", "check", "--json")
    assert result.exit_code in {1, os.EX_UNAVAILABLE}
    assert "run: mlxd db migrate" in result.stdout + result.stderr


def test_a_damaged_file_ends_every_command_with_1(sqlite_url: str, tmp_path: Path) -> None:
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    file.parent.mkdir(mode=0o700)
    file.write_bytes(b"this is not a database, it only says so " * 200)
    (tmp_path / "c.toml").write_text(f"[storage]\nurl = '{sqlite_url}'\n")
    for command in ("db migrate", "db check", f"db backup {tmp_path / 'x'}", "audit verify", "audit list"):
        result = CliRunner().invoke(cli.commands(), ["--config", str(tmp_path / "c.toml"), *command.split()])
        assert result.exit_code == 1, command
        assert "is damaged" in result.stderr or "DAMAGED" in result.stdout, command
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["db check", "db backup {}/x", "audit verify", "audit list"])
def test_what_is_not_there_ends_with_69_and_is_not_made(command: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[server]\nstate_dir = 'state'\n")
    arguments = ["--config", str(tmp_path / "c.toml"), *command.format(tmp_path).split()]
    result = CliRunner().invoke(cli.commands(), arguments)
    assert result.exit_code == os.EX_UNAVAILABLE
    assert result.stderr == f"mlxd: There is no database at {tmp_path}/state/mlxd.db; run: mlxd db migrate\n"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("command", ["db check", "db migrate", "audit verify"])
def test_a_server_that_is_not_there_ends_with_69(command: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(f"[storage]\nurl = 'postgresql://mlxd@/x?host={tmp_path}'\n")
    result = CliRunner().invoke(cli.commands(), ["--config", str(tmp_path / "c.toml"), *command.split()])
    assert result.exit_code == os.EX_UNAVAILABLE
    *logged, told = result.stderr.splitlines()
    assert told == "mlxd: The storage cannot be reached."
    assert "No such file or directory" in "".join(logged)


def test_a_wrong_url_ends_with_78(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[storage]\nurl = 'mysql://x'\n")
    result = CliRunner().invoke(cli.commands(), ["--config", str(tmp_path / "c.toml"), "db", "check"])
    assert result.exit_code == os.EX_CONFIG
    assert result.stderr.startswith("mlxd: configuration: storage.url: must begin with")


@pytest.mark.usefixtures("filled")
def test_backup_makes_a_file_once_or_says_what_to_do(mlxd: Any, database_url: str, tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    result = mlxd("db", "backup", str(target))
    if not database_url.startswith("sqlite"):
        assert result.exit_code == 2
        assert "pg_dump" in result.stderr
        return
    assert (result.exit_code, result.stdout) == (0, f"{target}: {target.stat().st_size} bytes, checked\n")
    again = mlxd("db", "backup", str(target))
    assert (again.exit_code, again.stderr) == (2, f"mlxd: {target} exists already; a backup never overwrites\n")
    other = tmp_path / "other.db"
    as_json = json.loads(mlxd("db", "backup", str(other), "--json").stdout)
    assert as_json == {"file": str(other), "bytes": other.stat().st_size}


@pytest.mark.usefixtures("filled")
def test_audit_verify_prints_the_head_to_remember_and_takes_it_back(mlxd: Any) -> None:
    report = json.loads(mlxd("audit", "verify", "--json").stdout)
    assert (report["ok"], report["count"], report["problem"], report["broken_seq"]) == (True, 3, None, None)
    assert mlxd("audit", "verify").stdout == f"sound: 3 entries, head {report['head']}\n"
    assert mlxd("audit", "verify", "--head", report["head"]).exit_code == 0


def test_audit_verify_of_a_broken_log_says_where_and_ends_with_1(
    filled: StorageSettings, mlxd: Any, tmp_path: Path
) -> None:
    head = json.loads(mlxd("audit", "verify", "--json").stdout)["head"]
    tamper(filled, tmp_path, "DELETE FROM audit WHERE seq = 3")
    assert mlxd("audit", "verify").exit_code == 0
    cut = mlxd("audit", "verify", "--head", head)
    assert (cut.exit_code, cut.stdout) == (1, "BROKEN: entry 3 is truncated, after 2 sound ones\n")
    tamper(filled, tmp_path, "UPDATE audit SET event = 'nothing' WHERE seq = 1")
    result = mlxd("audit", "verify", "--json")
    assert result.exit_code == 1
    expected = {"ok": False, "count": 0, "head": None, "problem": "altered", "broken_seq": 1}
    assert json.loads(result.stdout) == expected


def test_audit_verify_of_an_empty_log_says_so(mlxd: Any) -> None:
    mlxd("db", "migrate")
    assert mlxd("audit", "verify").stdout == "sound: 0 entries, head none\n"


def test_a_head_that_is_none_is_wrong_usage(mlxd: Any) -> None:
    result = mlxd("audit", "verify", "--head", "3:xyz")
    assert result.exit_code == 2
    assert "SEQ:HASH" in result.stderr


@pytest.mark.usefixtures("filled")
def test_audit_list_prints_the_newest_first(mlxd: Any) -> None:
    listed = json.loads(mlxd("audit", "list", "--limit", "2", "--json").stdout)
    assert [(entry["seq"], entry["event"], entry["detail"]) for entry in listed] == [
        (3, "key_created", {"kid": "k2"}),
        (2, "key_created", {"kid": "k1"}),
    ]
    assert listed[0]["previous_hash"] == listed[1]["hash"]
    older = json.loads(mlxd("audit", "list", "--before", "2", "--json").stdout)
    assert [entry["seq"] for entry in older] == [1]
    table = mlxd("audit", "list").stdout
    assert table.index("k2") < table.index("k1") < table.index("k0")
    assert "1970-01-01 00:00:02+00:00" in table


def test_audit_list_shows_texts_as_they_are_and_survives_what_we_never_wrote(
    filled: StorageSettings, mlxd: Any, tmp_path: Path
) -> None:
    with Database.open(filled, tmp_path) as database:
        database.write(lambda c: audit.append(c, "x", actor="[red]me[/red]", at=1.0)).result()
    assert "[red]me[/red]" in mlxd("audit", "list").stdout
    tamper(filled, tmp_path, "UPDATE audit SET detail = 'no json', at = 1e300")
    assert "1e+300" in mlxd("audit", "list").stdout
    assert json.loads(mlxd("audit", "list", "--json").stdout)[0]["detail"] == "no json"
