"""Files and folders that must be ours alone, and the error that says so."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names the key and what is wrong with it."""


def private_tmpdir(state_dir: Path) -> Path:
    """Point TMPDIR at a 0700 folder in `state_dir`; call before mlx is first imported.

    mlx loads the kernels it compiled from a predictable path below TMPDIR: in a shared /tmp another user
    could plant a library there. A private folder also keeps compiled kernels over restarts.
    Raises ConfigurationError when the folder is not ours alone.
    """
    folder = state_dir.expanduser().resolve() / "tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        # What was checked is what is changed: an open folder cannot be swapped for a link in between.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be used as a private folder: {error.strerror}") from None
    try:
        _make_private(folder, handle)
    finally:
        os.close(handle)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    return folder


def _make_private(folder: Path, handle: int) -> None:
    found, parent = os.fstat(handle), folder.parent.stat()
    if found.st_uid != os.geteuid():
        raise ConfigurationError(f"{folder}: must belong to the user that runs mlxd")
    if parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX:
        raise ConfigurationError(f"{folder.parent}: others may write here and replace {folder.name}; chmod go-w it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.fchmod(handle, 0o700)
