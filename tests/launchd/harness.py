"""A supervisor that reads a plist and follows launchd's documented rules, so that they can be tried without a Mac.

What it keeps to (launchd.plist(5), launchd(8)): a clean environment; Umask, WorkingDirectory, resource limits and
output files; UserName and GroupName where root runs it and they exist; RunAtLoad; KeepAlive as a boolean or by
SuccessfulExit; not started sooner than ThrottleInterval after its last start; SIGTERM and, ExitTimeOut later, SIGKILL;
what is left of the process group dies with it. Every number of seconds in the plist is multiplied by `scale`.
What it cannot do: sessions, ProcessType, privacy gates, wired memory.
"""

from __future__ import annotations

import grp
import os
import plistlib
import pwd
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from service.launchd.launchctl import LaunchdError, Seen

KNOWN = {
    *("Label", "ProgramArguments", "EnvironmentVariables", "WorkingDirectory", "StandardOutPath", "StandardErrorPath"),
    *("UserName", "GroupName", "InitGroups", "Umask", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut"),
    *("ProcessType", "SoftResourceLimits", "HardResourceLimits", "LimitLoadToSessionType"),
}
DEFAULT_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"
LIMITS = {"NumberOfFiles": resource.RLIMIT_NOFILE, "Core": resource.RLIMIT_CORE}
SPAWN = """
import os, resource, sys
count = int(sys.argv[1])
for each in sys.argv[2:2 + count]:
    kind, soft, hard = map(int, each.split(":"))
    resource.setrlimit(kind, (soft, hard))
program = sys.argv[2 + count:]
os.execve(program[0], program, dict(os.environ))
"""


@dataclass
class Run:
    """One start. Times are monotonic; `status` is as Popen's returncode; `killed`: ExitTimeOut had passed."""

    pid: int
    began: float
    ended: float | None = None
    status: int | None = None
    killed: bool = False


class Supervisor:
    """One job. Its methods are launchctl's verbs. `extra` is environment that only this machine needs."""

    def __init__(
        self, plist: Path | Mapping[str, Any], *, scale: float = 1.0, extra: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.job = dict(plist) if isinstance(plist, Mapping) else plistlib.loads(plist.read_bytes())
        assert set(self.job) <= KNOWN, set(self.job) - KNOWN
        self.scale = scale
        self.extra = dict(extra)
        self.runs: list[Run] = []
        self.notes: list[str] = []
        self._changed = threading.Condition()
        self._wanted = bool(self.job.get("RunAtLoad", False))
        self._unloading = False
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bootout()

    @property
    def throttle(self) -> float:
        return float(self.job.get("ThrottleInterval", 10)) * self.scale

    @property
    def exit_timeout(self) -> float:
        return float(self.job.get("ExitTimeOut", 20)) * self.scale

    @property
    def last(self) -> Run:
        return self.runs[-1]

    @property
    def up(self) -> bool:
        return bool(self.runs) and self.last.ended is None

    def wait(self, true: Callable[[], object], timeout: float = 60) -> None:
        """Until `true`, asked whenever a run begins or ends."""
        with self._changed:
            assert self._changed.wait_for(true, timeout), (self.runs, self.notes)

    def signal(self, number: int) -> None:
        """`launchctl kill`."""
        os.kill(self.last.pid, number)

    def start(self) -> None:
        """`launchctl kickstart`; waits until it has begun, which the throttle may delay."""
        with self._changed:
            if self.up:
                return
            before = len(self.runs)
            self._wanted = True
            self._changed.notify_all()
        self.wait(lambda: len(self.runs) > before, self.throttle + 10)

    def stop(self) -> Run:
        """`launchctl stop`: SIGTERM, SIGKILL when ExitTimeOut has passed; then KeepAlive has its say."""
        with self._changed:
            run = self.last
            self._terminate(run)
        return run

    def bootout(self) -> None:
        """Stop it, and start it no more. Harmless twice."""
        with self._changed:
            self._unloading = True
            if self.runs:
                self._terminate(self.last)
            self._changed.notify_all()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _terminate(self, run: Run) -> None:
        if run.ended is not None:
            return
        with suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGTERM)
        if not self._changed.wait_for(lambda: run.ended is not None, self.exit_timeout):
            run.killed = True
            os.kill(run.pid, signal.SIGKILL)
            assert self._changed.wait_for(lambda: run.ended is not None, 30)

    def _supervise(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unloading or self._wanted)
                if self.runs:
                    rest = self.runs[-1].began + self.throttle - time.monotonic()
                    self._changed.wait_for(lambda: self._unloading, max(0.0, rest))
                if self._unloading:
                    return
                self._wanted = False
                began = time.monotonic()
                process = self._spawn()
                run = Run(process.pid, began)
                self.runs.append(run)
                self._changed.notify_all()
            status = process.wait()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(run.pid, signal.SIGKILL)
            with self._changed:
                run.ended, run.status = time.monotonic(), status
                self._wanted = self._kept_alive(status)
                self._changed.notify_all()

    def _kept_alive(self, status: int) -> bool:
        match self.job.get("KeepAlive", False):
            case {"SuccessfulExit": bool(wanted)}:
                return (status == 0) == wanted
            case bool(always):
                return always
            case other:
                raise AssertionError(f"KeepAlive {other!r} is ignored by launchd")

    def _spawn(self) -> subprocess.Popen[bytes]:
        job = self.job
        environment = {"PATH": DEFAULT_PATH, "XPC_FLAGS": "0x0", "XPC_SERVICE_NAME": job["Label"], **self.extra}
        limits = self._limits()
        with (
            Path(job.get("StandardOutPath", os.devnull)).open("ab") as out,
            Path(job.get("StandardErrorPath", os.devnull)).open("ab") as err,
        ):
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", SPAWN, str(len(limits)), *limits, *job["ProgramArguments"]],
                env=environment | job.get("EnvironmentVariables", {}),
                cwd=job.get("WorkingDirectory", "/"),
                umask=job.get("Umask", 0o022),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                **self._account(),
            )

    def _limits(self) -> list[str]:
        soft, hard = (self.job.get(f"{kind}ResourceLimits", {}) for kind in ("Soft", "Hard"))
        found = []
        for name in {*soft, *hard}:
            was = resource.getrlimit(LIMITS[name])
            found.append(f"{LIMITS[name]}:{soft.get(name, was[0])}:{hard.get(name, was[1])}")
        return found

    def _account(self) -> dict[str, Any]:
        user, group = self.job.get("UserName"), self.job.get("GroupName", "")
        if user is None:
            return {}
        try:
            ids = {"user": pwd.getpwnam(user).pw_uid, "group": grp.getgrnam(group).gr_gid, "extra_groups": []}
        except KeyError:
            ids = {}
        if os.geteuid() != 0 or not ids:
            self.notes.append(f"UserName {user} is skipped: {'not root' if ids else 'there is no such account'}")
            return {}
        return ids


class HarnessLaunchd:
    """The `Launchd` of plans, over supervisors."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale
        self.job: Supervisor | None = None
        self.verbs: list[str] = []

    def look(self) -> Seen | None:
        if self.job is None:
            return None
        last = self.job.last if self.job.runs else None
        pid = last.pid if last is not None and last.ended is None else None
        status = next((run.status for run in reversed(self.job.runs) if run.ended is not None), None)
        return Seen("running" if pid else "not running", pid, len(self.job.runs), status)

    def bootstrap(self, plist: Path) -> None:
        self.verbs.append("bootstrap")
        if self.job is not None:
            raise LaunchdError("input/output error: loaded already")
        self.job = Supervisor(plist, scale=self.scale).__enter__()

    def bootout(self, patience: float) -> None:
        self.verbs.append("bootout")
        if self.job is not None:
            self.job.bootout()
            self.job = None

    def start(self, *, kill: bool = False) -> None:
        self.verbs.append("kickstart -k" if kill else "kickstart")
        assert self.job is not None
        if kill:
            self.job.signal(signal.SIGKILL)
        self.job.start()

    def signal(self, name: str) -> None:
        self.verbs.append(f"kill {name}")
        assert self.job is not None
        self.job.signal(signal.Signals[f"SIG{name}"])
