"""Files and folders that must be ours alone, and the error that says so."""

from __future__ import annotations

import os
import secrets
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


def read_private(path: Path, *, limit: int = 64 * 1024) -> bytes:
    """The bytes of a secret's file: a plain file of ours that nobody else may open, at most `limit` bytes.

    Raises FileNotFoundError when there is none, and ConfigurationError for one that is not ours alone. What was
    checked is what is read; a symbolic link is not followed.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
                raise ConfigurationError(f"{path}: must be a plain file of at most {limit} bytes")
            if found.st_uid != os.geteuid():
                raise ConfigurationError(f"{path}: must belong to the user that runs mlxd")
            if stat.S_IMODE(found.st_mode) & 0o077:
                raise ConfigurationError(f"{path}: holds a secret that others may read; chmod 600 it")
            return file.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None


def write_private(path: Path, data: bytes, *, replace: bool) -> None:
    """Put `data` into a 0600 file that is whole or absent, also after a power cut; its folder is made (0700).

    Raises FileExistsError when the file is there and `replace` is false (of racing writers one wins), and
    ConfigurationError when it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                draft.replace(path)
            else:
                path.hardlink_to(draft)
        finally:
            draft.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename2 is not None and isinstance(error, FileExistsError):  # the link, not the folder
            raise
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
