"""Where an installation is: one value that every other file here takes its paths from.

Two kinds. A daemon runs under an account of its own before anybody logs in; code, interpreter and model are copied into
folders that belong to root and that its account can only read. An agent runs a checkout for the developer who is logged
in, from where the files are. `root` is a prefix in front of a daemon's paths, for tests and staging; the paths in the
plist have it too, so that what was staged can be run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NAME = "mlxd"


@dataclass(frozen=True, slots=True)
class Account:
    """Who the service runs as."""

    user: str
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The paths of one installation. `account` None: an agent, of whoever installs it.

    `name` is launchd's label and the stem of every path, so that two installations do not meet.
    """

    name: str
    root: Path
    domain: str
    base: Path
    config: Path
    state: Path
    logs: Path
    plist: Path
    account: Account | None

    @classmethod
    def daemon(cls, *, name: str = NAME, root: Path = Path("/")) -> Layout:
        """A LaunchDaemon, in the places that macOS has for such."""
        base = root / "Library/Application Support" / name
        return cls(
            name=name,
            root=root,
            domain="system",
            base=base,
            config=base / "config" / "mlxd.toml",
            state=root / "var/db" / name,
            logs=root / "var/log" / name,
            plist=root / "Library/LaunchDaemons" / f"{name}.plist",
            account=Account(f"_{name}", f"_{name}"),
        )

    @classmethod
    def agent(cls, *, home: Path, uid: int, config: Path, state: Path, name: str = NAME) -> Layout:
        """A LaunchAgent of one user, over that user's own configuration and state directory."""
        return cls(
            name=name,
            root=home,
            domain=f"gui/{uid}",
            base=home / "Library/Application Support" / name,
            config=config,
            state=state,
            logs=home / "Library/Logs" / name,
            plist=home / "Library/LaunchAgents" / f"{name}.plist",
            account=None,
        )

    @property
    def target(self) -> str:
        """The job, as launchctl names it."""
        return f"{self.domain}/{self.name}"

    @property
    def staged(self) -> bool:
        """Whether launchd cannot know of it, because it is below a prefix."""
        return self.account is not None and self.root != Path("/")

    @property
    def versions(self) -> Path:
        return self.base / "versions"

    @property
    def models(self) -> Path:
        return self.base / "models"

    @property
    def current(self) -> Path:
        """The link to the version that the plist runs."""
        return self.base / "current"

    @property
    def newsyslog(self) -> Path:
        return self.root / "etc/newsyslog.d" / f"{self.name}.conf"

    @property
    def log(self) -> Path:
        """What the service writes itself, one event a line, and newsyslog rotates."""
        return self.logs / "mlxd.log"

    @property
    def crash_log(self) -> Path:
        """Where launchd leads standard output and error: what is said when no logging is there, or no more."""
        return self.logs / "crash.log"


def interpreter(version: Path) -> Path:
    """The interpreter of a version's own environment."""
    return version / "env/bin/python"
