"""Steps that change files: each remembers what was there, and puts it back when it is undone."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from service.launchd.plan import Step

Ids = Callable[[], tuple[int, int] | None]
"""Who something shall belong to; asked late, since an earlier step may make the account. None: leave it."""


def nobody_else() -> tuple[int, int] | None:
    """Root where root installs; else it stays as it is."""
    return (0, 0) if os.geteuid() == 0 else None


class Folder(Step):
    """A folder with a mode and an owner. Parents that are missing are made as 0755, and go again with it."""

    def __init__(self, path: Path, *, mode: int = 0o755, owner: Ids = nobody_else) -> None:
        self._path, self._mode, self._owner = path, mode, owner
        self._made: list[Path] = []
        self._before: os.stat_result | None = None

    def describe(self) -> str:
        return f"folder {self._path} (mode {self._mode:o})"

    def done(self) -> bool:
        return self._path.is_dir() and _as_wanted(self._path.stat(), self._mode, self._owner())

    def apply(self) -> None:
        missing = [each for each in (self._path, *self._path.parents) if not each.exists()]
        self._before = None if missing else self._path.stat()
        for each in reversed(missing):
            each.mkdir()
            self._made.append(each)
            _give(each, 0o755, nobody_else())
        _give(self._path, self._mode, self._owner())

    def undo(self) -> None:
        if self._before is not None:
            _give(self._path, stat.S_IMODE(self._before.st_mode), (self._before.st_uid, self._before.st_gid))
        for each in reversed(self._made):
            if each == self._path:
                shutil.rmtree(each)  # what the service wrote there since is of this installation
            elif not any(each.iterdir()):
                each.rmdir()


class File(Step):
    """A file with these bytes, replaced in one go."""

    def __init__(
        self, path: Path, content: Callable[[], bytes], *, mode: int = 0o644, owner: Ids = nobody_else
    ) -> None:
        self._path, self._content, self._mode, self._owner = path, content, mode, owner
        self._before: tuple[bytes, os.stat_result] | None = None

    def describe(self) -> str:
        return f"file {self._path} (mode {self._mode:o})"

    def done(self) -> bool:
        if not self._path.is_file() or self._path.is_symlink():
            return False
        return self._path.read_bytes() == self._content() and _as_wanted(self._path.stat(), self._mode, self._owner())

    def apply(self) -> None:
        if self._path.exists():
            self._before = self._path.read_bytes(), self._path.stat()
        _write(self._path, self._content(), self._mode, self._owner())

    def undo(self) -> None:
        if self._before is None:
            self._path.unlink(missing_ok=True)
        else:
            content, was = self._before
            _write(self._path, content, stat.S_IMODE(was.st_mode), (was.st_uid, was.st_gid))


class Link(Step):
    """A symbolic link, moved to its new target in one go."""

    def __init__(self, path: Path, target: Callable[[], Path]) -> None:
        self._path, self._target = path, target
        self._before: Path | None = None

    def describe(self) -> str:
        return f"link {self._path} -> {self._target()}"

    def done(self) -> bool:
        return self._path.is_symlink() and self._path.readlink() == self._target()

    def apply(self) -> None:
        self._before = self._path.readlink() if self._path.is_symlink() else None
        self._point(self._target())

    def undo(self) -> None:
        if self._before is None:
            self._path.unlink(missing_ok=True)
        else:
            self._point(self._before)

    def _point(self, target: Path) -> None:
        draft = self._path.with_name(f".{self._path.name}.new")
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        draft.replace(self._path)


class Built(Step):
    """A folder that is made beside its place by `build` and moved there when it is whole; then it is never changed."""

    def __init__(self, path: Path, build: Callable[[Path], object], *, what: str) -> None:
        self._path, self._build, self._what = path, build, what
        self._draft = path.with_name(f".{path.name}.partial")

    def describe(self) -> str:
        return f"{self._what} in {self._path}"

    def done(self) -> bool:
        return self._path.is_dir()

    def apply(self) -> None:
        shutil.rmtree(self._draft, ignore_errors=True)  # of a run that was killed
        self._draft.parent.mkdir(parents=True, exist_ok=True)
        self._draft.mkdir()
        self._build(self._draft)
        self._draft.rename(self._path)

    def undo(self) -> None:
        for each in (self._draft, self._path):
            if each.exists():
                shutil.rmtree(each)


class Gone(Step):
    """A file, link or folder that is removed: moved aside at first, deleted when all is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.removed")

    def describe(self) -> str:
        return f"remove {self._path}"

    def done(self) -> bool:
        return not self._path.exists() and not self._path.is_symlink()

    def apply(self) -> None:
        _delete(self._aside)
        self._path.rename(self._aside)

    def undo(self) -> None:
        if self._aside.exists() or self._aside.is_symlink():
            self._aside.rename(self._path)

    def commit(self) -> None:
        _delete(self._aside)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_wanted(found: os.stat_result, mode: int, owner: tuple[int, int] | None) -> bool:
    return stat.S_IMODE(found.st_mode) == mode and owner in (None, (found.st_uid, found.st_gid))


def _give(path: Path, mode: int, owner: tuple[int, int] | None) -> None:
    if owner is not None:
        os.chown(path, *owner)
    path.chmod(mode)


def _write(path: Path, content: bytes, mode: int, owner: tuple[int, int] | None) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _give(Path(draft), mode, owner)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)
