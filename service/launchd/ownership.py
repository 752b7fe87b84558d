"""Who could change what the service runs: the reason why an installation refuses a path.

Root runs nothing from there, but whoever can replace the code can read every key and prompt. So each component of a
path, and everything below it, must belong to root and be writable for nobody else. Reads only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

ROOT_UID = 0


def changeable(path: Path, *, owners: Collection[int] = (ROOT_UID,), below: Path = Path("/")) -> Iterator[str]:
    """Why somebody else could change `path`, or it could not be read: one sentence a component, none when all is well.

    Links are followed, and the way to each is looked at too. `owners` are the users who may own and write; `below` is
    the folder, not looked at itself, from where on it matters.
    """
    for each in _components(path, below, seen=set()):
        yield from _component(each, owners)


def changeable_below(folder: Path, *, owners: Collection[int] = (ROOT_UID,), below: Path = Path("/")) -> Iterator[str]:
    """The same of everything inside `folder`; links are followed where they lead out of it."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            each = Path(place, name)
            if each.is_symlink() and not each.resolve().is_relative_to(folder.resolve()):
                yield from changeable(each, owners=owners, below=below)
            yield from _component(each, owners)


def _components(path: Path, below: Path, seen: set[Path]) -> Iterator[Path]:
    for each in (*reversed(path.parents), path):
        if each in seen or not each.is_relative_to(below) or (each == below and below != Path("/")):
            continue
        seen.add(each)
        yield each
        if each.is_symlink():
            yield from _components(each.parent / each.readlink(), below, seen)


def _component(path: Path, owners: Collection[int]) -> Iterator[str]:
    try:
        found = path.lstat()
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if found.st_uid not in owners:
        yield f"{path}: belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode):  # its mode means nothing
        return
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield f"{path}: its group or others may write (mode {stat.S_IMODE(found.st_mode):o})"
    if stat.S_ISDIR(found.st_mode) and not found.st_mode & stat.S_IXOTH and found.st_uid == ROOT_UID:
        yield f"{path}: the service's account may not enter"
