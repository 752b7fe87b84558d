"""Who may read the secrets and write the state."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.auth import development
from service.auth.pepper import pepper_file
from service.doctor.finding import Finding, Verdict, fail, ok, skipped
from service.doctor.surroundings import Surroundings, user_name
from service.settings import secret_settings
from service.storage.location import DEFAULT_NAME

OTHERS = 0o077
REPLACEABLE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Private:
    """A path that should be ours alone. `made`: the service makes it when it is not there.

    `enforced`: the service refuses one that others may read.
    """

    what: str
    path: Path
    made: bool = False
    enforced: bool = True


def privates(around: Surroundings) -> Iterator[Private]:
    """The state directory with what is kept in it, and every file that a setting calls a secret."""
    settings, folder = around.settings, around.state_dir
    yield Private("server.state_dir", folder, made=True)
    yield Private("compiled kernels", folder / "tmp", made=True)
    if settings.auth.enabled:
        yield Private("peppers", pepper_file(settings.auth, folder), made=True)
        if not settings.storage.url and settings.storage.url_file is None:
            yield Private("database", folder / DEFAULT_NAME, made=True)
        if settings.auth.development_key:
            yield Private("development key", folder / development.FILE_NAME, made=True)
    for each in secret_settings(settings):
        if each.key != "auth.pepper_file":
            yield Private(each.key, each.file, enforced=each.enforced)


def permissions(around: Surroundings) -> Iterator[Finding]:
    """Each of them: there, of its owner, no link, and closed to everybody else."""
    owner = around.service_uid
    if around.euid and around.state_dir.is_dir() and around.state_dir.stat().st_uid != around.euid:
        whose = user_name(around.state_dir.stat().st_uid)
        yield fail("user", f"the state is {whose}'s; you are {user_name(around.euid)}", f"sudo -u {whose} mlxd doctor")
    absent = []
    for each in privates(around):
        if each.made and not os.path.lexists(each.path):
            absent.append(each.what)
        else:
            yield _finding(each, owner)
    if absent:
        yield skipped("permissions", f"not there yet, made when needed: {', '.join(absent)}")


def _finding(private: Private, owner: int) -> Finding:
    name, user = f"permissions: {private.what}", user_name(owner)
    try:
        found = private.path.lstat()
    except OSError as error:
        return fail(name, f"{private.path}: {error.strerror}", f"it must be there, of the user {user} alone (0600)")
    if (problem := _problem(private.path, found, owner)) is not None:
        return Finding(name, Verdict.FAIL if private.enforced else Verdict.WARN, *problem)
    return ok(name, f"{private.path} ({stat.S_IMODE(found.st_mode):04o}, {user})")


def _problem(path: Path, found: os.stat_result, owner: int) -> tuple[str, str] | None:
    """What was seen, and the mend."""
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a link", "name the file itself, not a link to it"
    if found.st_uid != owner:
        user = user_name(owner)
        return f"{path} belongs to {user_name(found.st_uid)}, not to {user}", f"sudo chown {user} {path}"
    if found.st_mode & OTHERS:
        mode = "700" if stat.S_ISDIR(found.st_mode) else "600"
        return f"{path} is open to others ({stat.S_IMODE(found.st_mode):04o})", f"chmod {mode} {path}"
    if (above := _replaceable(path.parent)) is not None:
        return f"others may write to {above} and replace {path.name}", f"chmod go-w {above}"
    return None


def _replaceable(folder: Path) -> Path | None:
    """The folder, where others may rename what is in it."""
    mode = os.stat(folder).st_mode  # noqa: PTH116 - what a link leads to, by name
    return folder if mode & REPLACEABLE and not mode & stat.S_ISVTX else None
