"""`mlxd keys`: what goes to which stream, what is asked of whom, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import typer
from typer.testing import CliRunner, Result

from service import cli
from service.auth.key_format import generate, parse
from service.auth.key_store import DatabaseKeyStore
from service.auth.keyring import KeyRing
from service.auth.pepper import Peppers
from service.cli.moments import duration, moment
from service.errors import Unauthorized
from service.settings import StorageSettings
from service.storage import audit
from service.storage.database import Database

NOW = 1_800_000_000.0


class Shell:
    """A folder with a configuration, and `mlxd keys` run in it."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "mine.toml"
        self.config.write_text("[server]\nstate_dir = 'state'\n[log]\nlevel = 'error'\n[limits.plans.gold]\n")
        self.state_dir = folder / "state"

    def run(self, *arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(cli.commands(), ["--config", str(self.config), "keys", *arguments], input=stdin)

    def ok(self, *arguments: str, stdin: str = "") -> Result:
        result = self.run(*arguments, stdin=stdin)
        assert result.exit_code == 0, result.stderr
        return result

    def json(self, *arguments: str, stdin: str = "") -> Any:
        return json.loads(self.ok(*arguments, "--json", stdin=stdin).stdout)

    def database(self) -> Database:
        return Database.open(StorageSettings(), self.state_dir)

    def events(self) -> list[str]:
        with self.database() as database:
            entries = database.read(lambda connection: audit.entries(connection, limit=50)).result()
        assert {entry.actor for entry in entries} <= {f"cli:{os.getuid()}"}
        return [entry.event for entry in reversed(entries)]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """Leaves logging as it was: each command sends it to its own standard error."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Shell(tmp_path)
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_create_prints_the_key_alone_and_once(shell: Shell) -> None:
    result = shell.ok("create", "--name", "ci", "--scope", "inference", "--scope", "models")
    key = parse(result.stdout.removesuffix("\n"))
    assert result.stdout == f"{key.text}\n"
    assert result.stderr.startswith(f"mlxd: key {key.kid}; it is shown this once")
    for command in (("list",), ("show", key.kid), ("list", "--json"), ("show", key.kid, "--json")):
        shown = shell.ok(*command)
        assert key.kid in shown.stdout
        assert key.text.split("_")[3] not in shown.stdout + shown.stderr
    assert stat.S_IMODE(shell.state_dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in shell.state_dir.iterdir()} == {0o600}


def test_every_option_ends_up_in_the_key(shell: Shell) -> None:
    made = shell.json(
        *("create", "--name", "ci [x]", "--scope", "usage", "--plan", "gold", "--tenant", "acme", "--model", "b"),
        *("--model", "a", "--network", "10.0.0.0/8", "--not-before", "2030-01-01"),
        *("--expires", "2030-06-01T12:00:00+02:00"),
    )  # fmt: skip
    assert parse(made.pop("key")).kid == made["kid"]
    assert (made["name"], made["scopes"], made["plan"], made["tenant"]) == ("ci [x]", ["usage"], "gold", "acme")
    assert (made["models"], made["networks"], made["status"]) == (["a", "b"], ["10.0.0.0/8"], "not_yet_valid")
    assert (made["not_before"], made["expires_at"]) == ("2030-01-01T00:00:00Z", "2030-06-01T10:00:00Z")
    assert shell.json("show", made["kid"]) == made
    assert shell.json("list") == [made]
    assert "ci [x]" in shell.ok("list").stdout


def test_a_plan_that_is_not_configured_makes_no_key(shell: Shell) -> None:
    result = shell.run("create", "--name", "ci", "--scope", "usage", "--plan", "silver")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "mlxd: There is no such plan in the configuration.\n"
    assert shell.json("list") == []


async def test_what_the_command_line_does_a_running_service_obeys(shell: Shell) -> None:
    old = shell.ok("create", "--name", "ci", "--scope", "inference").stdout.strip()
    with shell.database() as database:
        store = DatabaseKeyStore(database)
        peppers = Peppers.open(shell.state_dir / "pepper.json")
        ring = KeyRing(store, peppers, touch=store.touch, stale_for=60.0, now=lambda: NOW)
        grant = await ring.verify(old, "127.0.0.1")
        result = await asyncio.to_thread(shell.ok, "rotate", parse(old).kid, "--overlap", "12h")
        new = result.stdout.strip()
        assert (await ring.verify(new, "127.0.0.1")).principal.id == grant.principal.id
        await asyncio.to_thread(shell.ok, "rotate-pepper")
        late = (await asyncio.to_thread(shell.ok, "create", "--name", "late", "--scope", "models")).stdout.strip()
        await ring.verify(late, "127.0.0.1")
        await asyncio.to_thread(shell.ok, "revoke", parse(old).kid)
        with pytest.raises(Unauthorized):
            await ring.verify(generate("live").text, "127.0.0.1")
        assert grant.refusal() is not None
    assert shell.events() == ["key_created", "key_rotated", "pepper_rotated", "key_created", "key_revoked"]


def test_rotate_keeps_everything_but_id_and_secret(shell: Shell) -> None:
    old = shell.json("create", "--name", "ci", "--scope", "usage", "--tenant", "acme", "--expires", "90d")
    new = shell.json("rotate", old["kid"], "--expires", "2099-01-01")
    changed = {name for name, value in new.items() if value != old[name]}
    assert changed <= {"kid", "key", "created_at", "expires_at"}
    assert new["expires_at"] == "2099-01-01T00:00:00Z"
    assert shell.json("show", old["kid"])["rotated_to"] == new["kid"]
    assert shell.run("rotate", old["kid"]).exit_code == 1


def test_revoke_says_so_and_may_be_said_twice(shell: Shell) -> None:
    kid = shell.json("create", "--name", "ci", "--scope", "usage")["kid"]
    result = shell.ok("revoke", kid)
    assert (result.stdout, result.stderr) == ("", f"mlxd: revoked {kid}\n")
    assert shell.json("revoke", kid)["status"] == "revoked"
    assert shell.events() == ["key_created", "key_revoked"]


def test_import_takes_keys_from_standard_input(shell: Shell) -> None:
    made = [generate("old").text for _ in range(3)]
    given = f"{made[0]}\r\n\n  {made[1]}\n"
    result = shell.ok("import", "--name", "moved", "--scope", "models", stdin=given)
    assert (result.stdout, result.stderr.count("mlxd: imported ")) == ("", 2)
    assert shell.json("import", "--name", "moved", "--scope", "models", stdin=made[2])[0]["kid"] == parse(made[2]).kid
    assert [key["kid"] for key in shell.json("list")] == [parse(text).kid for text in made]


@pytest.mark.parametrize("given", ["", "sk-of-somebody-else", b"\xff\xfe\0", "x\n" * 1001, "x" * 100_000])
def test_import_refuses_what_is_no_key_of_ours_and_shows_none_of_it(shell: Shell, given: str | bytes) -> None:
    result = shell.run("import", "--name", "moved", "--scope", "models", stdin=given)
    assert result.exit_code == 1
    assert result.stderr.startswith(("mlxd: Key 1 of the import", "mlxd: An import is 1 to 1000"))
    assert "sk-of" not in result.stderr
    assert shell.json("list") == []


@pytest.mark.parametrize("command", [("show",), ("rotate",), ("revoke",)])
def test_a_key_that_is_not_there_is_code_1(shell: Shell, command: tuple[str, ...]) -> None:
    result = shell.run(*command, "nobody")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "mlxd: There is no such key.\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("create",),
        ("create", "--name", "x"),
        ("create", "--name", "x", "--scope", "root"),
        ("create", "--name", "", "--scope", "models"),
        ("create", "--name", "x", "--scope", "models", "--network", "10.0.0.1/8"),
        ("create", "--name", "x", "--scope", "models", "--tenant", "key:x"),
        ("create", "--name", "x", "--scope", "models", "--expires", "soon"),
        ("create", "--name", "x", "--scope", "models", "--expires", "2001-01-01"),
        ("create", "--name", "x", "--scope", "models", "--not-before", "1y"),
        ("rotate", "nobody", "--overlap", "2030-01-01"),
    ],
)
def test_what_a_key_cannot_be_is_code_2_and_nothing_is_made(shell: Shell, arguments: tuple[str, ...]) -> None:
    result = shell.run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr
    assert shell.json("list") == []


def test_a_pepper_that_others_can_read_is_code_78(shell: Shell) -> None:
    shell.ok("list")
    (shell.state_dir / "pepper.json").chmod(0o644)
    result = shell.run("create", "--name", "x", "--scope", "models")
    assert (result.exit_code, result.stdout) == (os.EX_CONFIG, "")
    assert "pepper.json: holds a secret that others may read" in result.stderr


def test_a_storage_that_cannot_be_asked_is_code_69(shell: Shell) -> None:
    shell.config.write_text("[storage]\nurl = 'postgresql://nobody@127.0.0.1:1/none'\n[server]\nstate_dir = 'state'\n")
    result = shell.run("list")
    assert (result.exit_code, result.stdout) == (os.EX_UNAVAILABLE, "")
    assert result.stderr.splitlines()[-1].startswith("mlxd: The storage cannot be reached")


def test_limits_and_emptiness_have_a_cell() -> None:
    from service.cli.keys import _cell

    assert [_cell(value) for value in (None, ["a", "b"], {"rpm": 3}, {}, 7)] == ["-", "a b", "rpm=3", "-", "7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("30s", NOW + 30),
        ("15m", NOW + 900),
        ("12h", NOW + 43_200),
        ("90d", NOW + 90 * 86_400),
        ("2w", NOW + 14 * 86_400),
        ("2027-01-15", NOW - 8 * 3600),
        ("2027-01-15T08:00:00", NOW),
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T10:00:00+02:00", NOW),
    ],
)
def test_moments_are_read_in_utc(text: str | None, expected: float | None) -> None:
    assert moment("--expires", text, NOW) == expected


@pytest.mark.parametrize("text", ["", "soon", "5", "-5d", "5y", "\u0665d", "1.5h", "2027-13-01", "9999999999d"])
def test_other_moments_are_wrong_usage(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        duration("--overlap", text)
    with pytest.raises(typer.BadParameter):
        moment("--expires", text, NOW)
