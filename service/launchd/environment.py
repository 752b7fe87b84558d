"""What an installation copies: our package, the libraries it was tested with, an interpreter environment, the model.

Nothing is downloaded: what runs is what ran where `mlxd service install` was called, byte for byte. Each version has a
folder named after its content, so the same code is installed once and two versions stand side by side. Blocks.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import service
from service.launchd.layout import interpreter
from service.launchd.plan import StepFailed

TIMEOUT = 600.0
"""Seconds for making or asking an interpreter environment."""

LEFT_OUT = ("__pycache__", "*.pth", "direct_url.json")
"""Of the libraries: what names the place that they came from, such as an editable install's folder."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a version is copied from. `python` is the interpreter below the environment; it and its library, below
    `prefix`, are not copied."""

    package: Path
    libraries: Path
    python: Path
    prefix: Path
    version: str

    @classmethod
    def running(cls) -> Source:
        """What runs at this moment."""
        base = Path(getattr(sys, "_base_executable", sys.executable))
        libraries = Path(sys.prefix, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        return cls(Path(service.__file__).parent, libraries, base, Path(sys.base_prefix), service.__version__)

    def name(self) -> str:
        """The version's folder: number and content."""
        digest = hashlib.sha256(str(self.python.resolve()).encode())
        for each in sorted(self.libraries.glob("*.dist-info")):
            digest.update(each.name.encode() + b"\0")
        for each in sorted(self.package.rglob("*.py")):
            digest.update(each.relative_to(self.package).as_posix().encode() + b"\0" + each.read_bytes() + b"\0")
        return f"{self.version}-{digest.hexdigest()[:8]}"

    def build(self, folder: Path) -> None:
        """Make the environment in `folder`. Raises StepFailed."""
        ask(self.python, "-m", "venv", "--without-pip", str(folder / "env"))
        packages = next((folder / "env/lib").glob("python*/site-packages"))
        leave_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(self.libraries, packages, dirs_exist_ok=True, ignore=leave_out)
        shutil.rmtree(packages / "service", ignore_errors=True)
        shutil.copytree(self.package, packages / "service", ignore=leave_out)
        # The service may not write here, so it could not keep what it compiles. Some files do not: they are templates.
        ask(interpreter(folder), "-m", "compileall", "-q", "-j", "0", str(packages), codes=(0, 1))
        secure(folder)


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder on this machine, and the name by which clients know it."""

    name: str
    folder: Path

    def place(self) -> Path:
        """Below the models' folder: by what is in it, and the last part is the name it has as a folder."""
        digest = hashlib.sha256()
        for each in self._files():
            found = each.stat()
            digest.update(f"{each.relative_to(self.folder)}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return Path(digest.hexdigest()[:16], self.name.rpartition("/")[2])

    def build(self, folder: Path) -> None:
        """Copy it, links as what they lead to. Raises OSError."""
        for each in self._files():
            to = folder / each.relative_to(self.folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(each, to)
        secure(folder)

    def _files(self) -> Iterator[Path]:
        yield from sorted(each for each in self.folder.rglob("*") if each.is_file())


def secure(folder: Path) -> None:
    """Nobody but root may change what is in here, and everybody may read it; as another user only the modes are set."""
    for place, folders, files in os.walk(folder):
        for each in [Path(place), *(Path(place, name) for name in (*folders, *files))]:
            if os.geteuid() == 0:
                os.chown(each, 0, 0, follow_symlinks=False)
            if not each.is_symlink():
                mode = each.stat().st_mode
                each.chmod(0o755 if stat.S_ISDIR(mode) or mode & 0o111 else 0o644)


def ask(python: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Run an interpreter, apart from the environment and folder we are in; what it printed. Raises StepFailed."""
    command = [str(python), "-I", *arguments]
    clean = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/var/empty"}
    done = subprocess.run(  # noqa: S603
        command, env=clean, cwd="/", capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode not in codes:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-10:])
        raise StepFailed(f"{' '.join(command[2:])}: exit code {done.returncode}\n{last}")
    return done.stdout
