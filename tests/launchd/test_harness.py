"""The harness itself keeps to launchd's rules: tried with scripts of a few lines."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launchd.harness import Supervisor

SCALE = 0.02

Job = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job that runs these lines of Python; it has launchd's defaults but for `more`."""

    def make(program: str, **more: Any) -> dict[str, Any]:
        script = tmp_path / "script.py"
        script.write_text(f"import os, sys, time, signal\n{program}\n")
        arguments = [sys.executable, "-I", "-S", str(script), str(tmp_path / "said")]
        keep = {"KeepAlive": {"SuccessfulExit": False}, "RunAtLoad": True}
        return {"Label": "tiny", "ProgramArguments": arguments, **keep, **more}

    return make


SAY = "open(sys.argv[1], 'a').write(f'{%s}\\n')\n"


def said(tmp_path: Path) -> list[str]:
    path = tmp_path / "said"
    return path.read_text().splitlines() if path.exists() else []


def test_exit_code_0_stays_down(job: Job) -> None:
    with Supervisor(job("sys.exit(0)"), scale=0) as supervisor:
        supervisor.wait(lambda: supervisor.runs and supervisor.last.ended)
        assert supervisor.last.status == 0
        assert not supervisor._wanted


def test_any_other_exit_code_starts_again_no_sooner_than_the_throttle(job: Job) -> None:
    with Supervisor(job("sys.exit(1)", ThrottleInterval=10), scale=SCALE) as supervisor:
        supervisor.wait(lambda: len(supervisor.runs) >= 3)
        first, second, third = (run.began for run in supervisor.runs[:3])
    assert min(second - first, third - second) >= 10 * SCALE


def test_the_throttle_is_of_starts_so_a_job_that_ran_longer_starts_at_once(job: Job) -> None:
    with Supervisor(job("time.sleep(0.3); sys.exit(1)", ThrottleInterval=10), scale=SCALE) as supervisor:
        supervisor.wait(lambda: len(supervisor.runs) >= 2)
        first, second = supervisor.runs[:2]
        assert first.ended is not None
        assert second.began - first.ended < 10 * SCALE


def test_death_by_a_signal_starts_again(job: Job) -> None:
    with Supervisor(job("time.sleep(60)"), scale=0) as supervisor:
        supervisor.wait(lambda: supervisor.runs)
        supervisor.signal(signal.SIGKILL)
        supervisor.wait(lambda: len(supervisor.runs) == 2)
        assert supervisor.runs[0].status == -signal.SIGKILL


def test_who_ignores_sigterm_is_killed_when_exit_timeout_has_passed(job: Job, tmp_path: Path) -> None:
    program = f"signal.signal(signal.SIGTERM, lambda *_: None)\n{SAY % '1'}\nwhile True: time.sleep(1)"
    with Supervisor(job(program, ExitTimeOut=10, KeepAlive=False), scale=SCALE) as supervisor:
        _until(lambda: said(tmp_path))
        began = time.monotonic()
        run = supervisor.stop()
    assert (run.killed, run.status) == (True, -signal.SIGKILL)
    assert run.ended is not None
    assert run.ended - began >= 10 * SCALE


def test_who_ends_by_sigterm_is_not_killed(job: Job, tmp_path: Path) -> None:
    program = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n{SAY % '1'}\nwhile True: time.sleep(1)"
    with Supervisor(job(program, ExitTimeOut=1000), scale=SCALE) as supervisor:
        _until(lambda: said(tmp_path))
        run = supervisor.stop()
    assert (run.killed, run.status) == (False, 0)


def test_environment_umask_limits_folder_and_session_are_the_plists(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_SHELL", "1")
    program = (
        "import json, resource\nmask = os.umask(0)\n"
        "json.dump({'environment': dict(os.environ), 'umask': mask, 'folder': os.getcwd(),\n"
        "  'files': resource.getrlimit(resource.RLIMIT_NOFILE), 'core': resource.getrlimit(resource.RLIMIT_CORE),\n"
        "  'leader': os.getsid(0) == os.getpid()}, open(sys.argv[1], 'w'))\nprint('out'); print('err', file=sys.stderr)"
    )
    plist = job(
        program,
        EnvironmentVariables={"HOME": "/nowhere", "PATH": "/bin"},
        Umask=0o027,
        WorkingDirectory=str(tmp_path),
        SoftResourceLimits={"NumberOfFiles": 100, "Core": 0},
        HardResourceLimits={"NumberOfFiles": 200, "Core": 0},
        StandardOutPath=str(tmp_path / "log"),
        StandardErrorPath=str(tmp_path / "log"),
    )
    with Supervisor(plist, scale=0) as supervisor:
        supervisor.wait(lambda: supervisor.runs and supervisor.last.ended)
    assert supervisor.last.status == 0
    found = json.loads((tmp_path / "said").read_text())
    assert found["environment"] == {
        "HOME": "/nowhere",
        "PATH": "/bin",
        "XPC_FLAGS": "0x0",
        "XPC_SERVICE_NAME": "tiny",
    } | {key: value for key, value in found["environment"].items() if key == "LC_CTYPE"}  # Python's own doing
    assert (found["umask"], found["folder"], found["leader"]) == (0o027, str(tmp_path.resolve()), True)
    assert (found["files"], found["core"]) == ([100, 200], [0, 0])
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_without_run_at_load_it_waits_for_kickstart(job: Job) -> None:
    with Supervisor(job("time.sleep(60)", RunAtLoad=False), scale=0) as supervisor:
        assert not supervisor.runs
        supervisor.start()
        assert supervisor.up


def test_children_die_with_their_parent(job: Job, tmp_path: Path) -> None:
    program = f"child = os.fork()\nif not child: time.sleep(60)\n{SAY % 'child'}"
    with Supervisor(job(program), scale=0) as supervisor:
        supervisor.wait(lambda: supervisor.runs and supervisor.last.ended)
    child = int(said(tmp_path)[0])
    _until(lambda: _gone(child))


def test_an_account_that_is_not_there_is_skipped_and_told(job: Job) -> None:
    with Supervisor(job("sys.exit(0)", UserName="_nobody_here", GroupName="_nobody_here"), scale=0) as supervisor:
        supervisor.wait(lambda: supervisor.runs)
    assert supervisor.notes == ["UserName _nobody_here is skipped: there is no such account"]


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z" if Path("/proc").is_dir() else False


def _until(true: Callable[[], object]) -> None:
    ends = time.monotonic() + 10
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.005)
