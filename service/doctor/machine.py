"""The machine: what mlx computes on, sleep, open files, the clock, the disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

from service.doctor.finding import Finding, fail, ok, size, skipped, warn
from service.doctor.surroundings import Ran, Surroundings
from service.listening import RESERVED_FILES

OLDEST_MACOS = (14, 0)
"""The oldest that mlx's packages are built for."""

MLX_FILES = 4096
"""mlx-lm lowers the hard limit of open files to this when it is imported."""

CLOCK_OFF = 5.0
"""Seconds that a clock may be off before it is worth a word; an issuer's leeway decides what fails."""

FUTURE = 60.0
"""Seconds by which a file may be newer than now."""

NO_SPACE, LITTLE_SPACE = 100e6, 1e9
"""Bytes: below the first the database cannot be counted on, below the second it is a matter of days."""


def platform(around: Surroundings) -> Iterator[Finding]:
    """Apple Silicon with Metal, or which backend of mlx a Linux machine has."""
    name, machine = "platform", around.machine
    where = f"{'macOS' if machine.is_mac else machine.system} {machine.release} {machine.architecture}"
    if machine.is_mac and machine.architecture != "arm64":
        yield fail(name, where, "mlx needs Apple Silicon and a Python built for arm64 (not one under Rosetta)")
        return
    if machine.is_mac and _numbers(machine.release) < OLDEST_MACOS:
        yield fail(name, where, f"update macOS: mlx needs {OLDEST_MACOS[0]} or newer")
        return
    device = _device(around.device)
    if isinstance(device, str):
        yield fail(name, f"{where}; mlx cannot be used: {device}", "mend the installation of mlx, or its access to GPU")
        return
    seen = f"{where}; mlx on {device['backend']} ({device['name']})"
    if machine.is_mac and device["backend"] != "metal":
        yield fail(name, seen, "no Metal device: run it on the Mac itself, not in a virtual machine")
    else:
        yield ok(name, seen)


def _device(ran: Ran | None) -> dict[str, object] | str:
    """What `service.engine.device` said, or why it did not."""
    if ran is None:
        return "it does not answer"
    if ran.code != 0:
        last = (ran.err.strip().splitlines() or [""])[-1]
        return f"signal {-ran.code}" if ran.code < 0 else last or f"exit code {ran.code}"
    try:
        found = json.loads(ran.out)
    except ValueError:
        found = None
    return found if isinstance(found, dict) and {"backend", "name"} <= found.keys() else "its answer is not understood"


def working_set(around: Surroundings) -> int | None:
    """Bytes that the GPU recommends to stay below; None without one, or where mlx cannot be asked."""
    device = _device(around.device)
    found = None if isinstance(device, str) else device.get("working_set")
    return found if isinstance(found, int) else None


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release))


def sleep(around: Surroundings) -> Iterator[Finding]:
    """A server that sleeps does not serve, and one that lost power should come back."""
    name = "sleep"
    if not around.machine.is_mac:
        yield skipped(name, "looked at on macOS only")
        return
    ran = around.run(["/usr/bin/pmset", "-g"])
    found = dict(re.findall(r"^\s*(\w+)\s+(\d+)\b", ran.out, re.MULTILINE)) if ran and ran.code == 0 else {}
    if "sleep" not in found:
        yield skipped(name, "pmset does not say", "pmset -g")
        return
    if found["sleep"] != "0" and found.get("SleepDisabled") != "1":
        yield warn(name, f"the Mac sleeps after {found['sleep']} minutes", "sudo pmset -a sleep 0")
    elif found.get("autorestart") == "0":
        yield warn(name, "never sleeps; stays off after a power failure", "sudo pmset -a autorestart 1")
    else:
        yield ok(name, "never sleeps")


def files(around: Surroundings) -> Iterator[Finding]:
    """Every connection is an open file."""
    name, most = "open files", around.settings.server.max_connections
    wanted, limit = most + RESERVED_FILES, min(around.machine.files, MLX_FILES)
    if limit >= wanted:
        yield ok(name, f"{limit} may be opened, {wanted} are wanted")
        return
    seen = f"{limit} may be opened here, {wanted} are wanted: {max(1, limit - RESERVED_FILES)} of {most} connections"
    if wanted > MLX_FILES:
        yield warn(name, seen, f"server.max_connections: at most {MLX_FILES - RESERVED_FILES} can be had")
    else:
        yield warn(name, seen, f"ulimit -Hn {wanted}; under launchd HardResourceLimits, NumberOfFiles")


def clock(around: Surroundings) -> Iterator[Finding]:
    """Tokens, expiries and quotas go by it."""
    name, leeway = "clock", min((each.leeway for each in around.settings.auth.issuers), default=None)
    newest = _newest(around)
    if newest is not None and newest[1] > around.now() + FUTURE:
        ahead = newest[1] - around.now()
        yield fail(name, f"{newest[0]} was written {ahead:.0f} s in the future: the clock was put back", _SET_CLOCK)
        return
    compared = [(issuer, off) for issuer, off in _offsets(around) if off is not None]
    if not compared:
        yield skipped(name, "nothing here to compare it with", "date -u, beside a clock that you trust")
        return
    source, off = max(compared, key=lambda each: abs(each[1]))
    seen = f"{off:+.1f} s against {source}" if abs(off) >= 1 else f"right to the second ({source})"
    if leeway is not None and abs(off) > leeway:
        yield fail(name, f"{seen}; tokens allow {leeway} s", _SET_CLOCK)
    elif abs(off) > CLOCK_OFF:
        yield warn(name, seen, _SET_CLOCK)
    else:
        yield ok(name, seen)


_SET_CLOCK = "have the clock set by the network: System Settings, Date & Time; on Linux systemd-timesyncd or chrony"


def _newest(around: Surroundings) -> tuple[str, float] | None:
    try:
        found = [(each.name, each.lstat().st_mtime) for each in around.state_dir.iterdir()]
    except OSError:
        return None
    return max(found, key=lambda each: each[1], default=None)


def _offsets(around: Surroundings) -> Iterator[tuple[str, float | None]]:
    """(source, seconds by which this clock is ahead of it)."""
    for issuer, answer in around.key_sets.items():
        if answer.date is not None:
            try:
                yield issuer, around.now() - parsedate_to_datetime(answer.date).timestamp()
            except (ValueError, OverflowError):
                yield issuer, None
    if around.machine.is_mac:
        ran = around.run(["/usr/bin/sntp", "-t", "2", "time.apple.com"])
        offset = re.search(r"^([+-]\d+\.\d+) \+/- ", ran.out, re.MULTILINE) if ran else None
        yield "time.apple.com", -float(offset[1]) if offset else None
    else:
        ran = around.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
        yield "the network's time", 0.0 if ran and ran.out.strip() == "yes" else None


def disk(around: Surroundings) -> Iterator[Finding]:
    """Keys, audit log and usage are written to the state directory."""
    name, folder = "disk", around.state_dir
    if not folder.is_dir():
        parent = next(each for each in folder.parents if each.is_dir())
        may = os.access(parent, os.W_OK | os.X_OK)
        seen = f"{folder} is not there yet"
        yield (
            ok(name, f"{seen}; it is made at the first start")
            if may
            else fail(name, f"{seen}, and {parent} cannot be written", f"sudo install -d -m 700 -o USER {folder}")
        )
        return
    free = shutil.disk_usage(folder).free
    seen = f"{size(free)} free for {folder}"
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield fail(name, f"{folder} cannot be written", "mount it read-write; its owner runs the service")
    elif free < NO_SPACE:
        yield fail(name, seen, "make room: nothing that changes anything is done on a full disk")
    elif free < LITTLE_SPACE:
        yield warn(name, seen, "make room soon")
    else:
        yield ok(name, seen)
