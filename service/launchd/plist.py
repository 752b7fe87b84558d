"""The job as launchd reads it: rendered from a frozen description, and checked key by key.

`plistlib` writes and reads whatever it is given: a string where launchd wants a boolean is valid to it, and ignored by
launchd. So types are exact here, keys are an allow-list, and what depends on the configuration is computed from it.
"""

from __future__ import annotations

import math
import plistlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from xml.parsers.expat import ExpatError

from service.launchd.layout import Account, Layout, interpreter
from service.settings import Settings

THROTTLE: Final = 30
"""Seconds between two starts, at least: longer than a model takes that cannot be loaded."""

TEARDOWN: Final = 25
"""Seconds after `engine.drain_timeout` at which a process that was told to stop has ended, done or not: 20, and 5 for
the last lines of its log. A test adds them up from where they are."""

MARGIN: Final = 10
"""Seconds that launchd waits longer: a SIGKILL of a process with wired memory can cost it until the next boot."""

FILES: Final = 4096
UMASK: Final = 0o077
PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin"

TYPES: Final = MappingProxyType(
    {
        "Label": str,
        "ProgramArguments": list,
        "EnvironmentVariables": dict,
        "WorkingDirectory": str,
        "StandardOutPath": str,
        "StandardErrorPath": str,
        "UserName": str,
        "GroupName": str,
        "InitGroups": bool,
        "Umask": int,
        "RunAtLoad": bool,
        "KeepAlive": dict,
        "ThrottleInterval": int,
        "ExitTimeOut": int,
        "ProcessType": str,
        "SoftResourceLimits": dict,
        "HardResourceLimits": dict,
        "LimitLoadToSessionType": list,
    }
)
INNER: Final = MappingProxyType(
    {
        "ProgramArguments": str,
        "LimitLoadToSessionType": str,
        "EnvironmentVariables": str,
        "KeepAlive": bool,
        "SoftResourceLimits": int,
        "HardResourceLimits": int,
    }
)
OPTIONAL: Final = frozenset({"UserName", "GroupName", "InitGroups", "LimitLoadToSessionType"})
VARIABLES: Final = frozenset({"HOME", "PATH"})
SHELLS: Final = frozenset({"sh", "bash", "zsh", "dash", "env", "caffeinate", "nohup"})


def exit_timeout(settings: Settings) -> int:
    """Seconds from SIGTERM to SIGKILL: above whatever a clean end can take with these settings."""
    return math.ceil(settings.engine.drain_timeout) + TEARDOWN + MARGIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is particular to one installation; the rest is the same in all of them."""

    label: str
    interpreter: Path
    config: Path
    state: Path
    crash_log: Path
    account: Account | None
    exit_timeout: int
    home: Path

    @classmethod
    def of(cls, layout: Layout, settings: Settings, *, agent_interpreter: Path | None = None) -> Job:
        """The job of `layout`. An agent names the interpreter that it runs; a daemon's is its current version's."""
        return cls(
            label=layout.name,
            interpreter=agent_interpreter or interpreter(layout.current),
            config=layout.config,
            state=layout.state,
            crash_log=layout.crash_log,
            account=layout.account,
            exit_timeout=exit_timeout(settings),
            home=layout.state if layout.account is not None else layout.root,
        )

    def properties(self) -> dict[str, Any]:
        """Launchd's keys. No shell is in between, and no secret: anybody can read the file, and `launchctl print`."""
        found: dict[str, Any] = {
            "Label": self.label,
            # -I: neither the working directory, which is the service's to write, nor PYTHON* choose what is imported
            "ProgramArguments": [
                *(str(self.interpreter), "-I", "-m", "service"),
                *("--config", str(self.config), "serve", "--supervised"),
            ],
            "EnvironmentVariables": {"HOME": str(self.home), "PATH": PATH},
            "WorkingDirectory": str(self.state),
            "StandardOutPath": str(self.crash_log),
            "StandardErrorPath": str(self.crash_log),
            "Umask": UMASK,
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": THROTTLE,
            "ExitTimeOut": self.exit_timeout,
            "ProcessType": "Interactive",  # the others are slowed down, also on the GPU
            "SoftResourceLimits": {"Core": 0, "NumberOfFiles": FILES},
            "HardResourceLimits": {"Core": 0, "NumberOfFiles": FILES},
        }
        if self.account is None:
            return found | {"LimitLoadToSessionType": ["Aqua", "Background"]}
        return found | {"UserName": self.account.user, "GroupName": self.account.group, "InitGroups": False}

    def render(self) -> bytes:
        """The plist as XML."""
        return plistlib.dumps(self.properties(), fmt=plistlib.FMT_XML)


def problems(data: bytes, settings: Settings | None = None) -> list[str]:
    """What is wrong with a plist of ours, one sentence each; with `settings` also whether it fits them."""
    try:
        found = plistlib.loads(data)
    except (plistlib.InvalidFileException, ExpatError, ValueError, TypeError, AttributeError) as error:
        return [f"is no property list: {error}"]
    if type(found) is not dict:
        return ["must be a dictionary"]
    twice = [] if data.count(b"<key>") in (0, _number_of_keys(found)) else ["has a key twice"]
    shape = [*twice, *_shape(found)]
    return shape or [*_rules(found), *([] if settings is None else _fits(found, settings))]


def _number_of_keys(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_number_of_keys, value.values()))
    return sum(map(_number_of_keys, value)) if isinstance(value, list) else 0


def _shape(found: Mapping[str, Any]) -> Iterator[str]:
    """Keys that launchd or we do not know, keys that are missing, and types: exact ones, since bool is an int."""
    yield from (f"{key}: is not a key that mlxd uses" for key in sorted(found.keys() - TYPES.keys()))
    yield from (f"{key}: is missing" for key in sorted(TYPES.keys() - OPTIONAL - found.keys()))
    for key, value in found.items():
        if key in TYPES and type(value) is not TYPES[key]:
            yield f"{key}: must be {TYPES[key].__name__}, is {type(value).__name__}"
        elif key in INNER:
            inner = value.values() if isinstance(value, dict) else value
            yield from (
                f"{key}: must hold {INNER[key].__name__} only, has {type(each).__name__}"
                for each in inner
                if type(each) is not INNER[key]
            )


def _rules(found: Mapping[str, Any]) -> Iterator[str]:
    if found["KeepAlive"] != {"SuccessfulExit": False}:
        yield "KeepAlive: must be {SuccessfulExit: false}: exit code 0 stays down, any other starts again"
    program, *arguments = found["ProgramArguments"] or [""]
    if not program.startswith("/") or Path(program).name in SHELLS:
        yield "ProgramArguments: must begin with the absolute path of the interpreter, and no shell"
    if "--supervised" not in arguments:
        yield "ProgramArguments: needs --supervised"
    if not set(found["EnvironmentVariables"]) <= VARIABLES:
        yield "EnvironmentVariables: HOME and PATH only; anybody can read them"
    if found["Umask"] != UMASK:
        yield f"Umask: must be {UMASK} (octal 077)"
    if found["ProcessType"] != "Interactive":
        yield "ProcessType: must be Interactive; the others are slowed down"
    if found["ThrottleInterval"] < THROTTLE:
        yield f"ThrottleInterval: must be at least {THROTTLE}"
    if found.get("UserName") in ("", "root"):
        yield "UserName: must not be root"
    limits = [found[key].get("NumberOfFiles", 0) for key in ("SoftResourceLimits", "HardResourceLimits")]
    if not FILES <= limits[0] <= limits[1]:
        yield f"SoftResourceLimits: NumberOfFiles must be at least {FILES} and at most the hard limit"


def _fits(found: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    if found["ExitTimeOut"] < exit_timeout(settings):  # 0 is for ever by older manuals, and nobody says so now
        yield (
            f"ExitTimeOut: {found['ExitTimeOut']} s, but with engine.drain_timeout a clean end may take "
            f"{exit_timeout(settings) - MARGIN} s: at least {exit_timeout(settings)}"
        )
    if Path(found["WorkingDirectory"]).resolve() != settings.server.state_dir:
        yield f"WorkingDirectory: {found['WorkingDirectory']} is not server.state_dir"
