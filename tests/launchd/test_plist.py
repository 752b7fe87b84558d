"""The plist: exact types, nothing secret, and numbers that fit the configuration."""

import plistlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import leaving
from service.launchd import plist
from service.launchd.layout import Layout
from service.launchd.plist import Job, exit_timeout, problems
from service.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.load(None, {"server.state_dir": tmp_path / "var/db/mlxd"})


@pytest.fixture
def job(settings: Settings, tmp_path: Path) -> Job:
    return Job.of(Layout.daemon(root=tmp_path), settings)


def test_a_rendered_plist_has_no_problems(job: Job, settings: Settings) -> None:
    assert problems(job.render(), settings) == []


def test_an_agents_plist_has_none_either(settings: Settings, tmp_path: Path) -> None:
    layout = Layout.agent(
        home=tmp_path, uid=501, config=tmp_path / "my.toml", state=settings.server.state_dir, name="mlxd"
    )
    found = Job.of(layout, settings, agent_interpreter=tmp_path / "python")
    assert problems(found.render(), settings) == []
    assert found.properties()["LimitLoadToSessionType"] == ["Aqua", "Background"]
    assert not {"UserName", "GroupName"} & found.properties().keys()


def test_every_value_has_launchds_type_and_value(job: Job, tmp_path: Path) -> None:
    base = f"{tmp_path}/Library/Application Support/mlxd"
    assert plistlib.loads(job.render()) == {
        "Label": "mlxd",
        "ProgramArguments": [
            *(f"{base}/current/env/bin/python", "-I", "-m", "service"),
            *("--config", f"{base}/config/mlxd.toml", "serve", "--supervised"),
        ],
        "EnvironmentVariables": {"HOME": f"{tmp_path}/var/db/mlxd", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        "WorkingDirectory": f"{tmp_path}/var/db/mlxd",
        "StandardOutPath": f"{tmp_path}/var/log/mlxd/crash.log",
        "StandardErrorPath": f"{tmp_path}/var/log/mlxd/crash.log",
        "UserName": "_mlxd",
        "GroupName": "_mlxd",
        "InitGroups": False,
        "Umask": 63,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 30,
        "ExitTimeOut": 65,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"Core": 0, "NumberOfFiles": 4096},
        "HardResourceLimits": {"Core": 0, "NumberOfFiles": 4096},
    }
    text = job.render()
    assert b"<key>Umask</key>\n\t<integer>63</integer>" in text
    assert b"<key>SuccessfulExit</key>\n\t\t<false/>" in text
    assert b"<key>RunAtLoad</key>\n\t<true/>" in text


def test_exit_timeout_is_above_whatever_a_clean_end_can_take() -> None:
    assert leaving.TEARDOWN_TIMEOUT + leaving.LEAVE_TIMEOUT == plist.TEARDOWN
    assert exit_timeout(Settings.load(None, {"engine.drain_timeout": 100.5})) == 101 + plist.TEARDOWN + plist.MARGIN


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda job: job.update(Umask="077"), "Umask: must be int, is str"),
        (lambda job: job.update(Umask=77), "Umask: must be 63 (octal 077)"),
        (lambda job: job.update(KeepAlive="true"), "KeepAlive: must be dict, is str"),
        (lambda job: job.update(KeepAlive=True), "KeepAlive: must be dict, is bool"),
        (lambda job: job.update(KeepAlive={"SuccessfulExit": 0}), "KeepAlive: must hold bool only, has int"),
        (lambda job: job.update(KeepAlive={"SuccessfulExit": True}), "KeepAlive: must be {SuccessfulExit: false}"),
        (lambda job: job.update(KeepAlive={"Crashed": True}), "KeepAlive: must be {SuccessfulExit: false}"),
        (lambda job: job.update(ThrottleInterval=30.0), "ThrottleInterval: must be int, is float"),
        (lambda job: job.update(ThrottleInterval=True), "ThrottleInterval: must be int, is bool"),
        (lambda job: job.update(ThrottleInterval=10), "ThrottleInterval: must be at least 30"),
        (lambda job: job.update(RunAtLoad=1), "RunAtLoad: must be bool, is int"),
        (lambda job: job.update(ExitTimeOut=64), "ExitTimeOut: 64 s, but with engine.drain_timeout"),
        (lambda job: job.update(ExitTimeOut=0), "ExitTimeOut: 0 s, but with engine.drain_timeout"),
        (lambda job: job.update(Nice=10), "Nice: is not a key that mlxd uses"),
        (lambda job: job.update(LowPriorityIO=True), "LowPriorityIO: is not a key that mlxd uses"),
        (lambda job: job.update(ProcessType="Background"), "ProcessType: must be Interactive"),
        (lambda job: job.pop("ExitTimeOut"), "ExitTimeOut: is missing"),
        (lambda job: job.update(UserName="root"), "UserName: must not be root"),
        (lambda job: job.update(ProgramArguments="python"), "ProgramArguments: must be list, is str"),
        (lambda job: job.update(ProgramArguments=[]), "ProgramArguments: must begin with the absolute path"),
        (lambda job: job.update(ProgramArguments=["/bin/sh", "-c", "x"]), "ProgramArguments: must begin with the"),
        (lambda job: job.update(ProgramArguments=["python", "--supervised"]), "ProgramArguments: must begin with the"),
        (lambda job: job["ProgramArguments"].remove("--supervised"), "ProgramArguments: needs --supervised"),
        (lambda job: job["ProgramArguments"].append(7), "ProgramArguments: must hold str only, has int"),
        (lambda job: job["EnvironmentVariables"].update(MLXD_AUTH__PEPPER="x"), "EnvironmentVariables: HOME and PATH"),
        (lambda job: job["EnvironmentVariables"].update(HOME=1), "EnvironmentVariables: must hold str only, has int"),
        (lambda job: job["SoftResourceLimits"].update(NumberOfFiles=256), "SoftResourceLimits: NumberOfFiles must be"),
        (lambda job: job["HardResourceLimits"].update(NumberOfFiles=4095), "SoftResourceLimits: NumberOfFiles must be"),
        (lambda job: job["SoftResourceLimits"].update(Core=0.0), "SoftResourceLimits: must hold int only, has float"),
        (lambda job: job.update(WorkingDirectory="/elsewhere"), "WorkingDirectory: /elsewhere is not server.state_dir"),
    ],
)
def test_what_launchd_would_ignore_or_misread_is_told(job: Job, settings: Settings, change: Change, said: str) -> None:
    found = job.properties()
    change(found)
    told = problems(plistlib.dumps(found), settings)
    assert any(each.startswith(said) for each in told), told


def test_a_key_that_is_there_twice_is_told_though_plistlib_takes_the_last(job: Job, settings: Settings) -> None:
    twice = job.render().replace(b"<key>Label</key>", b"<key>Umask</key>\n\t<integer>63</integer>\n\t<key>Label</key>")
    assert plistlib.loads(twice) == job.properties()
    assert problems(twice, settings) == ["has a key twice"]


@pytest.mark.parametrize("data", [b"", b"<plist>", b"\xff", b"bplist00rubbish", plistlib.dumps(["a list"])])
def test_what_is_no_plist_is_told(data: bytes) -> None:
    assert len(problems(data)) == 1


def test_plistutil_reads_it_and_gives_it_back(
    job: Job, tmp_path: Path, need_command: Callable[[str, str], str]
) -> None:
    plistutil = need_command("plistutil", "libplist-utils")
    xml, binary, back = (tmp_path / name for name in ("job.plist", "job.bin", "back.plist"))
    xml.write_bytes(job.render())
    for source, to, form in ((xml, binary, "bin"), (binary, back, "xml")):
        subprocess.run([plistutil, "-i", str(source), "-o", str(to), "-f", form], check=True, timeout=30)
    assert binary.read_bytes().startswith(b"bplist00")
    assert plistlib.loads(binary.read_bytes()) == plistlib.loads(back.read_bytes()) == job.properties()
    assert problems(back.read_bytes()) == problems(binary.read_bytes()) == []
