"""Install, upgrade, restart, uninstall: real folders and real processes under the harness, of a service of 30 lines."""

import json
import os
import plistlib
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from service.launchd import readiness
from service.launchd.configuration import flat
from service.launchd.environment import Model, Source
from service.launchd.install import Daemon, Parts, install, install_agent, refusals, restart, uninstall
from service.launchd.launchctl import Seen
from service.launchd.layout import Account, Layout
from service.launchd.plan import Plan, PlanFailed, StepFailed
from service.launchd.plist import problems
from service.settings import Settings
from tests.launchd.harness import HarnessLaunchd
from tests.launchd.test_plan import tree

SCALE = 0.02

SERVICE = """
import http.server, json, signal, sys, threading, tomllib
config = tomllib.load(open(sys.argv[sys.argv.index("--config") + 1], "rb"))
if "config" in sys.argv:
    sys.exit(CHECK)
if EXIT is not None:
    sys.exit(EXIT)

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"ready": READY, "state": NAME, "reasons": [] if READY else ["never"]}).encode()
        self.send_response(200 if READY else 503)
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", config["server"]["port"]), Answer)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
"""


class Accounts:
    """The account is who runs the tests, or as root somebody else."""

    def __init__(self) -> None:
        self.there = False

    def ids(self, account: Account) -> tuple[int, int] | None:
        return (65534, 65534) if self.there else None

    def create(self, account: Account) -> None:
        self.there = True

    def delete(self, account: Account) -> None:
        self.there = False


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "cache/snapshot"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs/weights").write_text("weights")
    (folder / "model.safetensors").symlink_to("blobs/weights")
    (folder / "config.json").write_text("{}")
    return Model("org/tiny", folder)


@pytest.fixture
def parts(tmp_path: Path, port: int) -> Iterator[Parts]:
    layout = Layout.daemon(root=tmp_path / "mac")
    settings = Settings.load(
        None,
        {
            "server.state_dir": layout.state,
            "server.port": port,
            "ops.bind": "",
            "engine.drain_timeout": 1,
            "model.reference": "org/tiny",
        },
    )
    launchd = HarnessLaunchd(scale=SCALE)
    probe = partial(readiness.ask, f"http://127.0.0.1:{port}")
    yield Parts(
        layout=layout,
        settings=settings,
        launchd=launchd,
        accounts=Accounts() if os.geteuid() == 0 else None,
        wait_ready=partial(readiness.wait, probe, launchd, timeout=20, sleep=lambda _: time.sleep(0.02)),
    )
    launchd.bootout(0)


class Quick(Source):
    """A version whose interpreter is a script: the real one takes half a second to make."""

    def build(self, folder: Path) -> None:
        write_python(folder / "env/bin/python", self)


def write_python(path: Path, source: Source) -> None:
    """What understands `python -I -m service ...`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nshift 3\nexec {source.python} -I -S {source.package}/__main__.py "$@"\n')
    path.parent.parent.chmod(0o755)
    path.parent.chmod(0o755)
    path.chmod(0o755)


def source(
    folder: Path,
    *,
    name: str = "first",
    ready: bool = True,
    check: int = 0,
    exits: int | None = None,
    kind: type[Source] = Quick,
) -> Source:
    package = folder / f"code-{name}/service"
    package.mkdir(parents=True)
    values = f"NAME, READY, CHECK, EXIT = {name!r}, {ready}, {check}, {exits}\n"
    (package / "__main__.py").write_text(values + SERVICE)
    (package / "__init__.py").write_text("")
    libraries = folder / "libraries"
    (libraries / "some-1.0.dist-info").mkdir(parents=True, exist_ok=True)
    (libraries / "some.py").write_text("")
    (libraries / "_editable_impl.pth").write_text(str(folder))
    return kind(package, libraries, Path(sys._base_executable), Path(sys.base_prefix), "1.2.3")  # type: ignore[attr-defined]


def run(plan: Plan) -> list[str]:
    told: list[str] = []
    plan.run(told.append)
    return told


def served(parts: Parts, port: int) -> str | None:
    return readiness.ask(f"http://127.0.0.1:{port}").state


def test_an_installation_runs_and_the_second_one_has_nothing_to_do(
    parts: Parts, model: Model, tmp_path: Path, port: int
) -> None:
    layout, daemon = parts.layout, Daemon(source(tmp_path, kind=Source), model)
    run(install(parts, daemon))
    assert served(parts, port) == "first"
    assert problems(layout.plist.read_bytes(), parts.settings) == []
    job = plistlib.loads(layout.plist.read_bytes())
    assert layout.current.resolve().name == daemon.source.name()
    packages = next((layout.current / "env/lib").glob("python*/site-packages"))
    assert {"some.py", "service"} <= {each.name for each in packages.iterdir()}
    assert not list(packages.glob("*.pth")), "the code would be another user's"
    assert list(packages.glob("service/__pycache__/*.pyc")), "the service could not keep what it compiles"
    installed = Settings.load(layout.config)
    assert installed.server.state_dir == Path(job["WorkingDirectory"])
    assert Path(installed.model.reference).is_relative_to(layout.models)
    assert (Path(installed.model.reference) / "model.safetensors").read_text() == "weights"
    assert not (Path(installed.model.reference) / "model.safetensors").is_symlink()
    assert installed.model.aliases == ("default", "org/tiny"), "clients know it by this name"
    assert installed.model.offline
    again = install(parts, daemon)
    assert again.nothing_to_do, again.lines()
    assert parts.launchd is not None
    assert getattr(parts.launchd, "verbs", None) == ["bootstrap"]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED HERE: needs root, to give files away")
def test_the_service_can_write_its_state_and_logs_and_nothing_else(parts: Parts, model: Model, tmp_path: Path) -> None:
    run(install(parts, Daemon(source(tmp_path, kind=Source), model)))
    layout = parts.layout
    theirs = {each for each in layout.root.rglob("*") if each.lstat().st_uid != 0}
    assert theirs == {layout.state, layout.logs}
    assert layout.state.stat().st_mode & 0o777 == 0o700
    assert layout.config.stat().st_gid == 65534
    assert not [each for each in layout.root.rglob("*") if not each.is_symlink() and each.stat().st_mode & 0o022]


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED HERE: needs root, to give files away")
def test_code_that_others_could_change_is_refused_and_nothing_stays(parts: Parts, model: Model, tmp_path: Path) -> None:
    base = parts.layout.base
    base.mkdir(parents=True)
    for each in (base, *base.parents):
        if each.is_relative_to(parts.layout.root):
            each.chmod(0o755)
    base.parent.chmod(0o777)
    before = tree(parts.layout.root)
    with pytest.raises(PlanFailed, match="its group or others may write"):
        run(install(parts, Daemon(source(tmp_path), model)))
    assert tree(parts.layout.root) == before


def test_an_interpreter_that_others_could_change_is_refused(parts: Parts, model: Model, tmp_path: Path) -> None:
    python = parts.layout.root / "opt/bin/python3"
    python.parent.mkdir(parents=True)
    python.parent.chmod(0o777)
    python.write_text("")
    found = list(refusals(parts, Daemon(replace(source(tmp_path), python=python), model)))
    assert any("opt/bin: its group or others may write" in each for each in found), found


def test_the_development_key_and_files_that_others_could_change_are_refused(
    parts: Parts, model: Model, tmp_path: Path
) -> None:
    secret = parts.layout.root / "home/pepper.json"
    secret.parent.mkdir(parents=True)
    secret.write_text("{}")
    secret.chmod(0o666)
    settings = Settings.load(None, {"auth.development_key": True, "auth.pepper_file": secret})
    found = list(refusals(replace(parts, settings=settings), Daemon(source(tmp_path), model)))
    assert any(each.startswith("auth.development_key: ") for each in found)
    assert any(each.startswith("auth.pepper_file: ") and "may write" in each for each in found)
    assert len([each for each in found if each.startswith("server.state_dir")]) == 0


def test_an_upgrade_needs_an_installation(parts: Parts, tmp_path: Path) -> None:
    assert any("install first" in each for each in refusals(parts, Daemon(source(tmp_path), None)))


def test_an_upgrade_runs_the_new_code_with_the_old_configuration(
    parts: Parts, model: Model, tmp_path: Path, port: int
) -> None:
    run(install(parts, Daemon(source(tmp_path), model)))
    config = parts.layout.config.read_bytes()
    first = parts.layout.current.resolve()
    run(install(parts, Daemon(source(tmp_path, name="second"), None)))
    assert served(parts, port) == "second"
    assert first.is_dir(), "the version before stays"
    run(install(parts, Daemon(source(tmp_path, name="third"), None)))
    assert served(parts, port) == "third"
    assert not first.exists(), "the one before that goes"
    assert parts.layout.config.read_bytes() == config


BAD = {
    "not ready after 1 s: never": {"ready": False},
    "ended and stays down": {"exits": 0},
    "not ready after 1 s": {"exits": 70},
    "config show: exit code 78": {"check": 78},
}


@pytest.mark.parametrize("why", BAD)
def test_a_version_that_does_not_become_ready_is_rolled_back(
    parts: Parts, model: Model, tmp_path: Path, port: int, why: str
) -> None:
    run(install(parts, Daemon(source(tmp_path), model)))
    before = tree(parts.layout.root)
    probe = partial(readiness.ask, f"http://127.0.0.1:{port}")
    assert parts.launchd is not None
    impatient = replace(parts, wait_ready=partial(readiness.wait, probe, parts.launchd, timeout=1.0))
    with pytest.raises(PlanFailed, match=why) as failed:
        run(install(impatient, Daemon(source(tmp_path, name="second", **BAD[why]), None)))  # type: ignore[arg-type]
    assert failed.value.left == ()
    assert {name: value for name, value in tree(parts.layout.root).items() if "__pycache__" not in name} == {
        name: value for name, value in before.items() if "__pycache__" not in name
    }
    parts.wait_ready()
    assert served(parts, port) == "first"


def test_a_first_installation_that_fails_leaves_nothing(parts: Parts, model: Model, tmp_path: Path) -> None:
    with pytest.raises(PlanFailed, match="stays down"):
        run(install(parts, Daemon(source(tmp_path, exits=0), model)))
    assert not [each for each in parts.layout.root.rglob("*") if each.is_file()]
    assert parts.launchd is not None
    assert parts.launchd.look() is None


def test_uninstall_takes_away_what_install_brought_but_not_keys(parts: Parts, model: Model, tmp_path: Path) -> None:
    layout = parts.layout
    run(install(parts, Daemon(source(tmp_path), model)))
    (layout.state / "mlxd.db").write_text("keys")
    run(uninstall(parts, purge=False))
    left = {str(each.relative_to(layout.root)) for each in layout.root.rglob("*") if each.is_file()}
    assert left == {
        "var/db/mlxd/mlxd.db",
        "var/log/mlxd/crash.log",
        "Library/Application Support/mlxd/config/mlxd.toml",
    }
    assert parts.launchd is not None
    assert parts.launchd.look() is None
    run(uninstall(parts, purge=True))
    assert not [each for each in layout.root.rglob("*") if each.is_file()]
    assert uninstall(parts, purge=True).lines()[0].startswith("= ")


def test_an_uninstall_that_fails_puts_everything_back_and_the_service_up(
    parts: Parts, model: Model, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(install(parts, Daemon(source(tmp_path), model)))
    before = tree(parts.layout.root)
    plan = uninstall(parts, purge=True)

    def fail() -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(plan.steps[-2], "apply", fail)
    with pytest.raises(PlanFailed, match="Read-only"):
        run(plan)
    assert tree(parts.layout.root) == before
    parts.wait_ready()
    assert served(parts, port) == "first"


def test_a_restart_is_sigterm_and_a_start_and_kills_nobody(parts: Parts, model: Model, tmp_path: Path) -> None:
    run(install(parts, Daemon(source(tmp_path), model)))
    launchd = parts.launchd
    assert isinstance(launchd, HarnessLaunchd)
    assert launchd.job is not None
    run(restart(parts))
    assert launchd.verbs == ["bootstrap", "kill TERM", "kickstart"]
    assert [run.status for run in launchd.job.runs] == [0, None]


def test_only_a_service_that_does_not_end_is_killed(parts: Parts) -> None:
    class Stuck(HarnessLaunchd):
        def look(self) -> Seen:
            return Seen("running", 1, 1, None)

        def signal(self, name: str) -> None:
            self.verbs.append(f"kill {name}")

        def start(self, *, kill: bool = False) -> None:
            self.verbs.append("kickstart -k" if kill else "kickstart")

    moments = iter(range(0, 10_000, 10))
    launchd = Stuck()
    stuck = replace(
        parts, launchd=launchd, clock=lambda: float(next(moments)), sleep=lambda _: None, wait_ready=lambda: None
    )
    run(restart(stuck))
    assert launchd.verbs == ["kill TERM", "kickstart -k", "kickstart"]


def test_what_is_not_installed_cannot_be_restarted(parts: Parts) -> None:
    with pytest.raises(StepFailed, match="system/mlxd is not installed"):
        restart(parts)


def test_an_agent_runs_the_code_where_it_is(parts: Parts, tmp_path: Path, port: int) -> None:
    made = source(tmp_path)
    config = tmp_path / "my.toml"
    config.write_text(f"[server]\nport = {port}\n")
    python = tmp_path / "env/bin/python"
    write_python(python, made)
    layout = Layout.agent(home=tmp_path / "home", uid=501, config=config, state=tmp_path / "state")
    agent = replace(parts, layout=layout)
    run(install_agent(agent, python))
    assert served(agent, port) == "first"
    assert install_agent(agent, python).nothing_to_do
    run(uninstall(agent, purge=False))
    assert [each.name for each in layout.root.rglob("*") if each.is_file()] == ["crash.log"]
    assert layout.state.is_dir()


def test_without_launchd_the_rest_is_installed(parts: Parts, model: Model, tmp_path: Path) -> None:
    staged = replace(parts, launchd=None, accounts=None)
    run(install(staged, Daemon(source(tmp_path), model)))
    assert staged.layout.plist.is_file()
    assert staged.layout.newsyslog.read_text().count("_mlxd:_mlxd\t640") == 2


def test_equal_code_is_one_version_and_other_code_another(tmp_path: Path) -> None:
    first, second = source(tmp_path), source(tmp_path, name="second")
    assert first.name() == replace(first).name()
    assert first.name() != second.name()
    assert first.name().startswith("1.2.3-")


def test_the_installed_configuration_holds_differences_only(parts: Parts, model: Model, tmp_path: Path) -> None:
    run(install(replace(parts, launchd=None, accounts=None), Daemon(source(tmp_path), model)))
    installed, usual = flat(Settings.load(parts.layout.config)), flat(Settings())
    text = parts.layout.config.read_text()
    assert {key for key in installed if installed[key] != usual[key]} == {
        *("server.port", "server.state_dir", "engine.drain_timeout", "ops.bind", "log.format", "log.file"),
        *("model.reference", "model.offline", "model.aliases"),
    }
    assert "[http]" not in text
    assert json.dumps(str(parts.layout.state)) in text
