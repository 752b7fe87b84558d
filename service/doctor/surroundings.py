"""Everything that checks look at outside of the settings and the files they name: the machine, its commands, the time.

Tests give their own. What is asked more than once is kept, so that all checks see the same.
"""

from __future__ import annotations

import asyncio
import os
import platform
import pwd
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import psutil

from service.auth.jwks import KeySetError
from service.auth.jwks_https import HttpsSource, tls_context
from service.engine.speed_record import Speed
from service.launchd.layout import NAME, Layout
from service.settings import ConfigurationError, IssuerSettings, Settings
from service.supervision.starts import StartLedger

COMMAND_TIMEOUT = 20.0
ANSWER_TIMEOUT = 3.0
MAX_ANSWER = 64 * 1024


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended; a negative `code` is a signal's number."""

    code: int
    out: str
    err: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """`system` and `architecture` as uname has them; `release` is macOS's version, elsewhere the kernel's."""

    system: str
    architecture: str
    release: str
    memory: int
    available: int
    files: int

    @property
    def is_mac(self) -> bool:
        return self.system == "Darwin"


@dataclass(frozen=True, slots=True)
class KeysDocument:
    """What an issuer's address answered, or why it did not; `date` is the answer's own time."""

    document: bytes = b""
    date: str | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that listens on a port, as far as this user may see."""

    pid: int
    program: str
    user: str
    files: int | None = None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """`now` is wall time, `euid` who asks. `measure` loads the model; None unless that was asked for. `plists` may be
    installed; `start_trouble` is why the last supervised start did not serve, or empty."""

    settings: Settings
    machine: Machine
    run: Callable[[Sequence[str]], Ran | None]
    get: Callable[[str], object]
    """A URL's JSON; None where there is none to be had."""
    connects: Callable[[str, int], bool]
    """Whether anybody listens there. Raises OSError where the address is not one of this machine's."""
    holder: Callable[[int], Holder | None]
    key_set: Callable[[IssuerSettings], KeysDocument]
    now: Callable[[], float] = time.time
    euid: int = 0
    measure: Callable[[], Speed] | None = None
    plists: Sequence[Path] = ()
    start_trouble: str = ""

    @property
    def state_dir(self) -> Path:
        return self.settings.server.state_dir

    @property
    def service_uid(self) -> int:
        """Whose files they should be: the caller's, or for root those of the state directory's owner."""
        if self.euid == 0 and self.state_dir.is_dir():
            return self.state_dir.stat().st_uid
        return self.euid

    @cached_property
    def device(self) -> Ran | None:
        """How `service.engine.device` ended, in a process of its own: where Metal cannot be used, mlx may abort."""
        return self.run([sys.executable, "-m", "service.engine.device"])

    @cached_property
    def key_sets(self) -> Mapping[str, KeysDocument]:
        """What each issuer with an address answers, by the issuer's name."""
        return {each.name: self.key_set(each) for each in self.settings.auth.issuers if each.jwks_url}

    @cached_property
    def readiness(self) -> Mapping[str, object] | None:
        """`/readyz` of the service that runs with these settings; None where none answers."""
        for url in self.urls:
            answer = self.get(f"{url}/readyz")
            if isinstance(answer, dict) and {"ready", "state", "model_loaded"} <= answer.keys():
                return answer
        return None

    @property
    def urls(self) -> Sequence[str]:
        """The addresses that a service with these settings would have, the operator's first."""
        server, ops = self.settings.server, self.settings.ops
        tls = server.tls_certificate is not None
        found = [(*ops.address, tls and not ops.loopback)] if ops.address else []
        return [
            f"{'https' if encrypted else 'http'}://{_bracketed(reachable(host))}:{port}"
            for host, port, encrypted in [*found, (server.host, server.port, tls)]
            if port
        ]


def reachable(host: str) -> str:
    """Where to ask for what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def user_name(uid: int) -> str:
    """The user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def here(settings: Settings, measure: Callable[[], Speed] | None = None) -> Surroundings:
    """This machine."""
    memory = psutil.virtual_memory()
    machine = Machine(
        system=platform.system(),
        architecture=platform.machine(),
        release=platform.mac_ver()[0] or platform.release(),
        memory=memory.total,
        available=memory.available,
        files=_hard_limit(),
    )
    return Surroundings(
        settings=settings,
        machine=machine,
        run=run_command,
        get=get_json,
        connects=connects,
        holder=holder_of,
        key_set=key_set_of,
        euid=os.geteuid(),
        measure=measure,
        plists=(Layout.daemon().plist, Path.home() / "Library/LaunchAgents" / f"{NAME}.plist"),
        start_trouble=StartLedger(settings.server.state_dir).read().down_because,
    )


def _hard_limit() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def run_command(command: Sequence[str]) -> Ran | None:
    """Run a command that only looks; None where there is none of that name, or it does not end."""
    try:
        done = subprocess.run(  # noqa: S603 - our own, from a closed list
            command, capture_output=True, timeout=COMMAND_TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return Ran(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def get_json(url: str) -> object:
    """What a probe of this machine answers; nothing is sent along, so its certificate need not be believed."""
    try:
        with (
            httpx.Client(verify=False, trust_env=False, timeout=ANSWER_TIMEOUT) as client,  # noqa: S501
            client.stream("GET", url) as answer,
        ):
            body = bytearray()
            for piece in answer.iter_raw():
                body += piece
                if len(body) > MAX_ANSWER:
                    return None
            return httpx.Response(200, content=bytes(body)).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return None


def connects(host: str, port: int) -> bool:
    """See Surroundings."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.bind((host, 0))  # raises for an address of another machine
    try:
        with socket.socket(family, kind, protocol) as client:
            client.settimeout(ANSWER_TIMEOUT)
            client.connect(address)
    except (ConnectionError, TimeoutError):
        return False
    return True


def holder_of(port: int) -> Holder | None:
    """The process that listens on a port; None where this user may not see it."""
    try:
        for each in psutil.net_connections(kind="tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
                process = psutil.Process(each.pid)
                return Holder(each.pid, process.name(), process.username(), _files_of(process))
    except psutil.Error:
        pass
    return None


def _files_of(process: psutil.Process) -> int | None:
    if sys.platform != "linux":
        return None
    return int(process.rlimit(psutil.RLIMIT_NOFILE)[1])


def key_set_of(issuer: IssuerSettings) -> KeysDocument:
    """Ask an issuer's address once, with the bounds of the service's own fetcher."""
    try:
        tls = tls_context(issuer.jwks_ca_file)
    except ConfigurationError as error:
        return KeysDocument(problem=str(error))
    source = HttpsSource(issuer.jwks_url, tls=tls, allow_private=issuer.allow_private_addresses)
    try:
        return KeysDocument(asyncio.run(source.load()), source.date)
    except KeySetError as error:
        return KeysDocument(date=source.date, problem=str(error))
