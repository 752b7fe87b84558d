"""The secrets that hash API keys: HMAC-SHA256(pepper, key). A stolen database alone says nothing about any key.

They are in one 0600 file (JSON: version -> hexadecimal secret), never in the database. The newest version hashes
new keys; older ones stay to verify the keys they hashed. Losing the file makes every key invalid: back it up apart
from the database. No slow hash: a key has 190 random bits, and 50 ms of scrypt for each request would let anybody
who can connect occupy the service (LiteLLM #983 is about the other mistake, a hash without any secret).
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Self

from service.settings import AuthSettings, ConfigurationError, read_private, write_private

SECRET_BYTES = 32
FILE_NAME = "pepper.json"


class Peppers:
    """The versions that were in the file when it was last read. Any thread; only `rotate` and `reload` do I/O."""

    def __init__(self, path: Path, secrets_by_version: Mapping[int, bytes]) -> None:
        self._path = path
        self._take(secrets_by_version)

    def _take(self, secrets_by_version: Mapping[int, bytes]) -> None:
        self._keyed = {version: hmac.new(secret, digestmod="sha256") for version, secret in secrets_by_version.items()}
        self._secrets = MappingProxyType(dict(secrets_by_version))  # `current` is known by now

    @classmethod
    def open(cls, path: Path, random: Callable[[int], bytes] = secrets.token_bytes) -> Self:
        """Read the file, making it with a first version where there is none: of racing processes one wins.

        Raises ConfigurationError for a file that is not ours alone or does not hold peppers.
        """
        try:
            return cls(path, _read(path))
        except FileNotFoundError:
            pass
        with suppress(FileExistsError):  # another process was first; its secret is the one
            write_private(path, _encode({1: random(SECRET_BYTES)}), replace=False)
        return cls(path, _read(path))

    @property
    def current(self) -> int:
        """The version that hashes new keys."""
        return max(self._secrets)

    @property
    def versions(self) -> frozenset[int]:
        return frozenset(self._secrets)

    def digest(self, version: int, text: str) -> bytes:
        """The 32 bytes that are stored instead of a key. Raises KeyError for a version that is not known."""
        keyed = self._keyed[version].copy()  # hmac.digest lets go of the interpreter, and may wait to have it back
        keyed.update(text.encode("ascii"))
        return keyed.digest()

    def reload(self) -> None:
        """Read the file again. Raises ConfigurationError, also when it is gone; what was known then stays."""
        try:
            self._take(_read(self._path))
        except FileNotFoundError:
            raise ConfigurationError(f"{self._path}: the file of the peppers is gone") from None

    def rotate(self, random: Callable[[int], bytes] = secrets.token_bytes) -> int:
        """Add a version to the file and use it from now on; returns it. Racing processes add one each."""
        with _alone(self._path.parent):
            self.reload()
            version = self.current + 1
            write_private(self._path, _encode({**self._secrets, version: random(SECRET_BYTES)}), replace=True)
        self.reload()
        return version


def pepper_file(settings: AuthSettings, state_dir: Path) -> Path:
    """Where the peppers are kept."""
    return settings.pepper_file or state_dir / FILE_NAME


def _read(path: Path) -> dict[int, bytes]:
    text = read_private(path)
    try:
        found = {int(version): bytes.fromhex(secret) for version, secret in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError):
        raise ConfigurationError(f"{path}: does not hold peppers") from None
    if not found or min(found) < 1 or any(len(secret) < SECRET_BYTES for secret in found.values()):
        raise ConfigurationError(f"{path}: each pepper must have a version from 1 on and at least {SECRET_BYTES} bytes")
    return found


def _encode(secrets_by_version: Mapping[int, bytes]) -> bytes:
    return json.dumps({str(version): secret.hex() for version, secret in secrets_by_version.items()}).encode() + b"\n"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out: of two rotations that read the same file, the later would erase the earlier's."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
