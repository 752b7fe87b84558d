"""launchctl and dscl: the one place that runs them, behind two protocols so that everything else can be tried anywhere.

Blocks. `launchctl print` is written for people, and no interface: it is read for a few words, each of which may be
missing. launchctl's exit codes are explained as far as they are known.
"""

from __future__ import annotations

import grp
import pwd
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from service.launchd.layout import Account

TIMEOUT = 30.0
"""Seconds for one command; one that ends a job may take the job's ExitTimeOut more."""

NOT_LOADED = frozenset({3, 36, 113})
IN_PROGRESS = 37

EXPLANATIONS = MappingProxyType(
    {
        1: "not permitted: a daemon needs root (sudo)",
        3: "there is no such job",
        5: "input/output error: the job is loaded already, or the plist cannot be read, or does not belong to root",
        37: "the job is still ending",
        113: "launchd knows no such job",
        119: "the job is disabled: launchctl enable",
        125: "the domain is not there: an agent needs somebody who is logged in on this Mac's screen; without, install "
        "the daemon (leave --agent out)",
        134: "the job cannot be loaded in this kind of session: is LimitLoadToSessionType right?",
    }
)


class LaunchdError(Exception):
    """launchctl or dscl refused, or cannot be run; the message says what it may mean."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What launchd says of a job that it knows; None for what it did not say."""

    state: str | None = None
    pid: int | None = None
    runs: int | None = None
    last_exit: int | None = None

    @property
    def down_for_good(self) -> bool:
        """Whether it ran, ended with success, and so will not be started again."""
        return self.pid is None and self.last_exit == 0 and self.runs != 0


class Launchd(Protocol):
    """One job in one domain. Every method blocks and may raise LaunchdError."""

    def look(self) -> Seen | None:
        """What launchd knows of the job; None when it is not loaded."""

    def bootstrap(self, plist: Path) -> None:
        """Load the job; with RunAtLoad that starts it."""

    def bootout(self, patience: float) -> None:
        """SIGTERM, SIGKILL after ExitTimeOut, and forget the job; returns when it is gone. Harmless when it was."""

    def start(self, *, kill: bool = False) -> None:
        """Start it now, if it does not run; with `kill` what runs is ended first, by force."""

    def signal(self, name: str) -> None:
        """Send a signal, such as `TERM` or `HUP`."""


class Accounts(Protocol):
    """The accounts of this machine. May raise LaunchdError."""

    def ids(self, account: Account) -> tuple[int, int] | None:
        """User and group id; None when one of them is not there."""

    def create(self, account: Account) -> None:
        """An account that nobody can log in with."""

    def delete(self, account: Account) -> None:
        """Harmless when it is not there."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    code: int
    text: str


Run = Callable[[Sequence[str], float], Ran]


def run(command: Sequence[str], timeout: float) -> Ran:
    """Run it and keep what it says. Raises LaunchdError when it is not there or takes longer than `timeout`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)  # noqa: S603
    except FileNotFoundError:
        raise LaunchdError(f"there is no {command[0]} here: this is not macOS") from None
    except subprocess.TimeoutExpired:
        raise LaunchdError(f"{' '.join(command)}: no end after {timeout:g} s") from None
    return Ran(done.returncode, done.stdout + done.stderr)


class Launchctl:
    """`Launchd` by the command. `target` is domain and label; `clock` and `sleep` are for waiting until it is gone."""

    def __init__(
        self,
        domain: str,
        label: str,
        *,
        run: Run = run,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._domain, self._target = domain, f"{domain}/{label}"
        self._run, self._clock, self._sleep = run, clock, sleep

    def look(self) -> Seen | None:
        ran = self._launchctl("print", self._target, allowed=NOT_LOADED)
        return None if ran.code else parse(ran.text)

    def bootstrap(self, plist: Path) -> None:
        self._launchctl("enable", self._target)
        self._launchctl("bootstrap", self._domain, str(plist))

    def bootout(self, patience: float) -> None:
        self._launchctl("bootout", self._target, allowed=NOT_LOADED | {IN_PROGRESS}, timeout=patience + TIMEOUT)
        ends = self._clock() + patience
        while self.look() is not None:  # it may return before the process has ended
            if self._clock() >= ends:
                raise LaunchdError(f"{self._target} is still there, {patience:g} s after bootout")
            self._sleep(0.2)

    def start(self, *, kill: bool = False) -> None:
        self._launchctl("kickstart", *(["-k"] if kill else []), self._target)

    def signal(self, name: str) -> None:
        self._launchctl("kill", f"SIG{name}", self._target)

    def _launchctl(self, *arguments: str, allowed: frozenset[int] = frozenset(), timeout: float = TIMEOUT) -> Ran:
        ran = self._run(["/bin/launchctl", *arguments], timeout)
        if ran.code and ran.code not in allowed:
            why = EXPLANATIONS.get(ran.code, "see `launchctl error " + str(ran.code) + "`")
            raise LaunchdError(f"launchctl {' '.join(arguments)}: {why} (code {ran.code}: {ran.text.strip()})")
        return ran


def parse(text: str) -> Seen:
    """What `launchctl print` said of a job; its own values are one tab deep, those of its parts deeper."""
    words = dict(re.findall(r"^\t(state|pid|runs|last exit code) = (.+)$", text, re.MULTILINE))

    def number(name: str) -> int | None:
        found = re.match(r"-?\d+", words.get(name, ""))
        return int(found[0]) if found else None

    return Seen(words.get("state"), number("pid"), number("runs"), number("last exit code"))


class Dscl:
    """`Accounts` by the directory service of macOS."""

    FREE_IDS = range(350, 400)
    """Below 500, where an account is not shown at the login window, and above those of Apple's own."""

    def __init__(self, *, run: Run = run) -> None:
        self._run = run

    def ids(self, account: Account) -> tuple[int, int] | None:
        try:
            return pwd.getpwnam(account.user).pw_uid, grp.getgrnam(account.group).gr_gid
        except KeyError:
            return None

    def create(self, account: Account) -> None:
        number = str(self._free_id())
        user, group = f"/Users/{account.user}", f"/Groups/{account.group}"
        for path, *rest in (
            (group,),
            (group, "PrimaryGroupID", number),
            (group, "Password", "*"),
            (group, "RealName", "mlxd"),
            (user,),
            (user, "UniqueID", number),
            (user, "PrimaryGroupID", number),
            (user, "UserShell", "/usr/bin/false"),
            (user, "NFSHomeDirectory", "/var/empty"),
            (user, "Password", "*"),
            (user, "IsHidden", "1"),
            (user, "RealName", "mlxd"),
        ):
            self._dscl("-create", path, *rest)

    def delete(self, account: Account) -> None:
        for path in (f"/Users/{account.user}", f"/Groups/{account.group}"):
            if not self._run(["/usr/bin/dscl", ".", "-read", path], TIMEOUT).code:
                self._dscl("-delete", path)

    def _free_id(self) -> int:
        used = {
            int(number)
            for kind, key in (("/Users", "UniqueID"), ("/Groups", "PrimaryGroupID"))
            for number in re.findall(r"\s(\d+)$", self._dscl("-list", kind, key).text, re.MULTILINE)
        }
        free = next((number for number in self.FREE_IDS if number not in used), None)
        if free is None:
            raise LaunchdError(f"no free id between {self.FREE_IDS.start} and {self.FREE_IDS.stop - 1}")
        return free

    def _dscl(self, *arguments: str) -> Ran:
        ran = self._run(["/usr/bin/dscl", ".", *arguments], TIMEOUT)
        if ran.code:
            raise LaunchdError(f"dscl . {' '.join(arguments)}: {ran.text.strip()} (code {ran.code})")
        return ran
