"""`mlxd usage`: the same numbers as a table with bars, as JSON and as CSV, from a database that others may use."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner, Result

from service import cli
from service.cli.usage import _bar
from service.settings import StorageSettings
from service.storage import usage
from service.storage.database import Database
from service.storage.schema import SCHEMA_VERSION
from service.storage.usage import DAY, UsageSum
from tests.usage_rows import NOON, row

SPAN = ("--from", "2027-01-13", "--to", "2027-01-15")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Each command sends it to its own standard error."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def mlxd(database_url: str, tmp_path: Path) -> Any:
    config = tmp_path / "mine.toml"
    config.write_text(f"[server]\nstate_dir = 'state'\n[storage]\nurl = '{database_url}'\n[log]\nlevel = 'error'\n")

    def invoke(*arguments: str, columns: int = 140) -> Result:
        runner = CliRunner(env={"COLUMNS": str(columns), "TERM": "dumb"})
        return runner.invoke(cli.commands(), ["--config", str(config), "usage", *arguments])

    return invoke


@pytest.fixture
def filled(database: Database) -> Database:
    """A database that stays open here, as a running service has it."""
    rows = [
        row(1, at=NOON - 2 * DAY),
        row(2, at=NOON, key_id="k2", prompt_tokens=30_000, completion_tokens=10_000, tenant="[red]other"),
        row(3, at=NOON, key_id=None, prompt_tokens=1, cached_tokens=0, completion_tokens=1, model="=cmd()"),
    ]
    database.write(lambda connection: usage.append(connection, rows)).result()
    return database


def bars(result: Result) -> dict[str, str]:
    """The bar of each line of the table, by the line's first cell."""
    assert result.exit_code == 0, result.stderr
    cells = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    return {line[1].strip(): line[-2].strip() for line in cells}


@pytest.mark.usefixtures("filled")
def test_the_table_has_every_day_and_its_bars_are_as_long_as_the_days_were_busy(mlxd: Any) -> None:
    result = mlxd(*SPAN)
    drawn = bars(result)
    assert list(drawn) == ["2027-01-13", "2027-01-14", "2027-01-15", "total"]
    assert (drawn["2027-01-13"], drawn["2027-01-14"], drawn["total"]) == ("█", "", "")
    busiest = drawn["2027-01-15"]
    assert busiest == "█" * 37 + "▒" * 13  # of 30,001 prompt tokens and 10,001 of output
    assert "40,017" in result.stdout  # of all three
    assert "2027-01-13 to 2027-01-15 (UTC)" in result.stdout


@pytest.mark.usefixtures("filled")
def test_a_narrow_terminal_gets_fewer_numbers_and_none_that_is_cut(mlxd: Any) -> None:
    result = mlxd(*SPAN, columns=80)
    assert {name: len(bar) for name, bar in bars(result).items() if bar} == {"2027-01-13": 1, "2027-01-15": 17}
    assert "40,017" in result.stdout
    assert "30,001" not in result.stdout
    assert "…" not in result.stdout


@pytest.mark.usefixtures("filled")
def test_a_name_is_shown_as_it_is(mlxd: Any) -> None:
    assert list(bars(mlxd(*SPAN, "--by", "tenant"))) == ["[red]other", "acme", "total"]
    assert list(bars(mlxd(*SPAN, "--by", "key"))) == ["k2", "k1", "-", "total"]
    assert list(bars(mlxd("--from", "2027-01-13", "--to", "2027-01-13", "--by", "key"))) == ["k1"]


@pytest.mark.usefixtures("filled")
def test_json_and_csv_say_the_same(mlxd: Any) -> None:
    report = json.loads(mlxd(*SPAN, "--by", "model", "--json").stdout)
    assert [(each["model"], each["requests"], each["total_tokens"]) for each in report["data"]] == [
        ("org/model", 2, 40_015),
        ("=cmd()", 1, 2),
    ]
    header, *lines = csv.reader(io.StringIO(mlxd(*SPAN, "--by", "model", "--csv").stdout, newline=""))
    assert header == ["model", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "total_tokens"]
    assert lines == [["org/model", "2", "30010", "8", "10005", "40015"], ["'=cmd()", "1", "1", "0", "1", "2"]]


def test_without_a_span_it_is_the_last_thirty_days(mlxd: Any, database: Database) -> None:
    now = time.time()
    rows = [row(1, at=now), row(2, at=now - 28 * DAY), row(3, at=now - 40 * DAY)]
    database.write(lambda connection: usage.append(connection, rows)).result()
    report = json.loads(mlxd("--json").stdout)
    assert (len(report["data"]), report["total"]["requests"]) == (30, 2)
    assert report["to"] == datetime.fromtimestamp(now, UTC).date().isoformat()


@pytest.mark.usefixtures("database")
def test_no_usage_is_a_table_of_nothing(mlxd: Any) -> None:
    assert bars(mlxd(*SPAN, "--by", "key")) == {"total": ""}
    assert set(bars(mlxd(*SPAN)).values()) == {""}


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--from", "yesterday"), "not a day"),
        (("--to", "2027-02-30"), "not a day"),
        (("--from", "2027-02-02", "--to", "2027-02-01"), "`from` is later than `to`"),
        (("--from", "2020-01-01", "--to", "2027-01-01"), "400 days at most"),
        (("--by", "hour"), "hour"),
        (("--json", "--csv"), "one of --json and --csv"),
    ],
)
def test_what_cannot_be_told_is_wrong_usage(mlxd: Any, arguments: tuple[str, ...], told: str) -> None:
    result = mlxd(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[server]\nstate_dir = 'state'\n")
    result = CliRunner().invoke(cli.commands(), ["--config", str(tmp_path / "c.toml"), "usage"])
    assert (result.exit_code, not (tmp_path / "state").exists()) == (os.EX_UNAVAILABLE, True)
    assert "run: mlxd db migrate" in result.stderr


def test_a_database_of_before_is_asked_to_be_migrated(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[server]\nstate_dir = 'state'\n")
    state = tmp_path / "state"
    with Database.open(StorageSettings(), state, migrate=True) as database:
        database.write(lambda connection: connection.exec_driver_sql("DROP TABLE usage")).result()
        database.write(
            lambda connection: connection.execute(SCHEMA_VERSION.delete().where(SCHEMA_VERSION.c.version == 2))
        ).result()
    result = CliRunner().invoke(cli.commands(), ["--config", str(tmp_path / "c.toml"), "usage"])
    assert result.exit_code == os.EX_UNAVAILABLE
    assert "run: mlxd db migrate" in result.stderr


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [(0, 0, ""), (1, 0, "#"), (0, 1, "-"), (5, 5, "#####-----"), (10, 0, "##########"), (2, 1, "##-"), (3, 0, "###")],
)
def test_a_bar_is_of_what_was_used_and_plain_where_the_terminal_is(prompt: int, output: int, expected: str) -> None:
    each = UsageSum("x", 1, prompt, 0, output)
    assert _bar(each, 10, 10, "#-").plain == expected
