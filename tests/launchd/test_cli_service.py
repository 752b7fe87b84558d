"""`mlxd service` as it is typed: what it prints, what it refuses, how it ends."""

import json
import os
import plistlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service import cli
from service.cli import installation
from service.launchd import readiness
from service.launchd.launchctl import LaunchdError, Seen
from service.launchd.layout import Layout
from service.launchd.plist import problems
from service.launchd.readiness import Readiness
from tests.launchd.test_install import source
from tests.launchd.test_plan import tree


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands(), list(arguments))


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(f"[server]\nport = 1\nstate_dir = '{tmp_path}/state'\n[ops]\nbind = ''\n")
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return str(folder)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What runs, as far as an installation copies it, is a service of 30 lines."""
    made = source(tmp_path)
    monkeypatch.setattr("service.launchd.environment.Source.running", lambda: made)
    return made.package


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """launchd as it answers `look`, and the service as it answers `/readyz`."""
    said: dict[str, Any] = {"seen": None, "answer": Readiness(ready=True, reachable=True, state="ready", reasons=())}

    class Launchd:
        def look(self) -> Seen | None:
            if isinstance(said["seen"], LaunchdError):
                raise said["seen"]
            return said["seen"]  # type: ignore[no-any-return]

        def start(self, *, kill: bool = False) -> None:
            pytest.fail("only looked at")

    monkeypatch.setattr(installation, "launchd_of", lambda layout: Launchd())
    monkeypatch.setattr(readiness, "ask", lambda url: said["answer"])
    return said


def test_render_prints_a_plist_without_problems(config: str, tmp_path: Path) -> None:
    result = invoke("--config", config, "service", "render", "--root", str(tmp_path))
    assert result.exit_code == 0
    assert problems(result.stdout_bytes) == []
    assert plistlib.loads(result.stdout_bytes)["Label"] == "mlxd"


def test_the_name_is_the_stem_of_everything(config: str) -> None:
    job = plistlib.loads(invoke("--config", config, "service", "render", "--name", "other").stdout_bytes)
    assert (job["Label"], job["UserName"], job["WorkingDirectory"]) == ("other", "_other", "/var/db/other")
    assert "/Library/Application Support/other/current/" in job["ProgramArguments"][0]


def test_an_agents_plist_runs_this_interpreter(config: str, tmp_path: Path) -> None:
    job = plistlib.loads(invoke("--config", config, "service", "render", "--agent").stdout_bytes)
    assert job["ProgramArguments"][0] == sys.executable
    assert job["WorkingDirectory"] == str(tmp_path / "state")
    assert "UserName" not in job


def test_an_agent_needs_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("service", "render", "--agent").exit_code == 2


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("command", ["install", "upgrade", "uninstall"])
def test_a_dry_run_touches_nothing(config: str, model: str, tmp_path: Path, command: str) -> None:
    root = tmp_path / "mac"
    arguments = ["--root", str(root), *(["--model", model] if command == "install" else [])]
    if command != "install":
        assert invoke("--config", config, "service", "install", "--root", str(root), "--model", model).exit_code == 0
    before = tree(tmp_path)
    result = invoke("--config", config, "service", command, *arguments, "--dry-run")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "dry run: nothing was changed")
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("code")
def test_install_prints_its_plan_first_and_says_that_launchd_is_not_asked(
    config: str, model: str, tmp_path: Path
) -> None:
    root = tmp_path / "mac"
    result = invoke("--config", config, "service", "install", "--root", str(root), "--model", model)
    assert result.exit_code == 0, result.output
    plan, _, done = result.stdout.partition("---\n")
    assert len(plan.splitlines()) > 10
    assert done.splitlines()[-1] == "done"
    assert "launchd is not asked" in result.stderr
    again = invoke("--config", config, "service", "install", "--root", str(root), "--model", model)
    assert again.stdout.splitlines()[-1] == "nothing to do"
    assert invoke("service", "uninstall", "--root", str(root), "--purge").exit_code == 0
    assert not [each for each in root.rglob("*") if each.is_file()]


@pytest.mark.usefixtures("code")
def test_a_plan_that_fails_is_undone_told_and_exit_code_1(config: str, model: str, tmp_path: Path) -> None:
    root = tmp_path / "mac"
    (root / "etc").mkdir(parents=True)
    (root / "etc/newsyslog.d").write_text("a file in the way")
    result = invoke("--config", config, "service", "install", "--root", str(root), "--model", model)
    assert result.exit_code == 1
    assert "newsyslog.d" in result.stderr
    assert "- undo: " in result.stdout
    assert [each.name for each in root.rglob("*") if each.is_file()] == ["newsyslog.d"]


def test_the_development_key_is_refused(tmp_path: Path, model: str) -> None:
    path = tmp_path / "dev.toml"
    path.write_text("[auth]\ndevelopment_key = true\n")
    root = str(tmp_path / "mac")
    result = invoke("--config", str(path), "service", "install", "--root", root, "--model", model)
    assert (result.exit_code, "auth.development_key" in result.stderr) == (os.EX_CONFIG, True)
    assert not (tmp_path / "mac").exists()


def test_a_model_that_is_not_here_is_not_fetched(config: str, tmp_path: Path) -> None:
    result = invoke("--config", config, "service", "install", "--root", str(tmp_path), "--model", str(tmp_path / "x"))
    assert result.exit_code == os.EX_UNAVAILABLE
    assert "mlxd model fetch" in result.stderr


def test_an_upgrade_of_nothing_is_a_configuration_error(tmp_path: Path) -> None:
    assert invoke("service", "upgrade", "--root", str(tmp_path)).exit_code == os.EX_CONFIG


@pytest.mark.usefixtures("mac")
def test_what_is_not_installed_cannot_be_restarted() -> None:
    result = invoke("service", "restart", "--name", "not-installed-here")
    assert (result.exit_code, "system/not-installed-here is not installed" in result.stderr) == (1, True)


def test_a_restarts_dry_run_prints_the_steps(config: str, mac: dict[str, Any]) -> None:
    mac["seen"] = Seen("running", 4711, 1, None)
    result = invoke("--config", config, "service", "restart", "--dry-run")
    assert [line[:10] for line in result.stdout.splitlines()] == ["+ SIGTERM:", "+ start", "+ wait unt", "dry run: n"]


def test_root_is_needed_where_launchd_is_asked(
    config: str, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mac["seen"] = Seen("running", 4711, 1, None)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    result = invoke("--config", config, "service", "restart")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (os.EX_NOPERM, "mlxd: this needs root: sudo")


def test_status_is_what_launchd_the_service_and_its_notes_say(tmp_path: Path, mac: dict[str, Any]) -> None:
    layout = Layout.daemon(root=tmp_path)
    layout.state.mkdir(parents=True)
    start = {"began": 1.0, "pid": 4711, "ready": 2.0, "ended": None, "exit_code": None, "reason": "", "safe_mode": "x"}
    (layout.state / "starts.json").write_text(json.dumps({"starts": [start], "more": 1}))
    mac["seen"] = Seen("running", 4711, 3, 70)
    result = invoke("service", "status", "--root", str(tmp_path), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert {key: found[key] for key in ("launchd", "pid", "runs", "last_exit", "started", "became_ready")} == {
        "launchd": "running",
        "pid": 4711,
        "runs": 3,
        "last_exit": 70,
        "started": 1.0,
        "became_ready": 2.0,
    }
    assert (found["safe_mode"], found["reason"], found["ready"], found["state"]) == ("x", None, True, "ready")


@pytest.mark.parametrize("notes", [None, "rubbish", "{}", '{"starts": []}', '{"starts": [1]}'])
def test_status_does_without_the_services_notes(tmp_path: Path, mac: dict[str, Any], notes: str | None) -> None:
    layout = Layout.daemon(root=tmp_path)
    layout.state.mkdir(parents=True)
    if notes is not None:
        (layout.state / "starts.json").write_text(notes)
    found = json.loads(invoke("service", "status", "--root", str(tmp_path), "--json").stdout)
    assert "started" not in found
    assert (found["launchd"], found["plist"]) == ("not loaded", "not installed")


def test_status_says_why_a_configuration_keeps_it_down(tmp_path: Path, mac: dict[str, Any]) -> None:
    layout = Layout.daemon(root=tmp_path)
    for each in (layout.state, layout.config.parent, layout.plist.parent):
        each.mkdir(parents=True)
    layout.config.write_text("[server]\nprot = 1\n")
    layout.plist.write_bytes(b"rubbish")
    reason = "server.prot: unknown key; did you mean server.port?"
    ended = {"began": 1.0, "pid": 9, "ended": 1.5, "exit_code": 0, "reason": reason}
    (layout.state / "starts.json").write_text(json.dumps({"starts": [ended]}))
    mac["seen"] = Seen("not running", None, 1, 0)
    mac["answer"] = Readiness(ready=False, reachable=False, state=None, reasons=("nobody answers",))
    result = invoke("service", "status", "--root", str(tmp_path))
    assert result.exit_code == 1
    assert "the configuration cannot be used: server.prot" in result.stderr
    text = " ".join(result.stdout.split())
    assert "server.prot: unknown key" in text
    assert "is no property list" in text
    assert "not running" in text


def test_an_agents_plan_copies_nothing_and_asks_nobody_for_root(
    config: str, tmp_path: Path, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = invoke("--config", config, "service", "install", "--agent", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"+ file {tmp_path}/home/Library/LaunchAgents/mlxd.plist (mode 644)" in result.stdout
    assert f"into gui/{os.getuid()}" in result.stdout
    assert "versions" not in result.stdout
    assert not (tmp_path / "home").exists()


def test_what_did_not_become_ready_is_told_with_its_last_words(tmp_path: Path) -> None:
    layout = Layout.daemon(root=tmp_path)
    for each in (layout.state, layout.logs):
        each.mkdir(parents=True)
    assert installation.last_words(layout) == ""
    (layout.state / "starts.json").write_text('{"starts": [{"reason": "not enough memory"}]}')
    layout.crash_log.write_text("".join(f"line {number}\n" for number in range(40)))
    layout.log.symlink_to(layout.crash_log)
    assert installation.last_words(layout).splitlines() == [
        "it noted: not enough memory",
        f"last lines of {layout.crash_log}:",
        *(f"line {number}" for number in range(25, 40)),
    ]


def test_status_tells_of_the_last_reload_to_who_has_a_key(
    tmp_path: Path, mac: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def admin_api(settings: object, url: None, key_file: Path) -> Iterator[Callable[[str, str], dict[str, Any]]]:
        assert key_file == tmp_path / "key"
        last = {"at": 2.5, "problems": ["server.prot: unknown key"], "applied": [], "restart_needed": ["server.port"]}
        yield lambda method, path: {"GET /admin/status": {"reload": last}}[f"{method} {path}"]

    monkeypatch.setattr(installation, "admin_api", admin_api)
    arguments = ("service", "status", "--root", str(tmp_path), "--json", "--key-file", str(tmp_path / "key"))
    found = json.loads(invoke(*arguments).stdout)
    assert {key: value for key, value in found.items() if key.startswith("reload_")} == {
        "reload_at": 2.5,
        "reload_problems": ["server.prot: unknown key"],
        "reload_restart_needed": ["server.port"],
    }
    mac["answer"] = Readiness(ready=False, reachable=False, state=None, reasons=("nobody answers",))
    assert "reload_at" not in json.loads(invoke(*arguments).stdout)


def test_status_tells_what_launchctl_could_not(tmp_path: Path, mac: dict[str, Any]) -> None:
    mac["seen"] = LaunchdError("no launchctl")
    assert (
        json.loads(invoke("service", "status", "--root", str(tmp_path), "--json").stdout)["launchd"] == "no launchctl"
    )


def test_a_reader_that_is_root_follows_no_link_of_the_service(tmp_path: Path, mac: dict[str, Any]) -> None:
    layout = Layout.daemon(root=tmp_path)
    layout.state.mkdir(parents=True)
    (tmp_path / "secret").write_text('{"starts": [{"began": 1, "reason": "a secret"}]}')
    (layout.state / "starts.json").symlink_to(tmp_path / "secret")
    assert "a secret" not in invoke("service", "status", "--root", str(tmp_path), "--json").stdout


def test_logs_prints_the_end_of_both_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layout = Layout.daemon(root=tmp_path)
    assert invoke("service", "logs", "--root", str(tmp_path)).exit_code == 1
    layout.logs.mkdir(parents=True)
    layout.log.write_text("".join(f"event {number}\n" for number in range(9)))
    layout.crash_log.write_text("Fatal Python error\n")
    assert invoke("service", "logs", "--root", str(tmp_path), "-n", "2").exit_code == 0
    out = capfd.readouterr().out
    assert "event 7\nevent 8\n" in out
    assert "event 6" not in out
    assert "Fatal Python error" in out
