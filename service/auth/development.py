"""The development key: in clear, in a 0600 file of the state directory, so that a checkout can be tried at once.

It is the only key that is ever stored in clear. Settings allow it on loopback only; where the setting is off,
`withdraw` revokes what an earlier start left behind, so that no copy of that file opens anything. Blocks: for the
start of the process, before it serves.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.auth.api_keys import IssuedKey, Operator, list_all
from service.auth.key_format import MalformedKey, ParsedKey, Random, parse
from service.auth.key_spec import KeySpec
from service.auth.keyring import status
from service.auth.pepper import Peppers
from service.auth.principal import Scope
from service.settings import read_private, write_private
from service.storage.connection import Connection
from service.storage.database import Database
from service.storage.keys import KeyRecord

FILE_NAME = "development.key"
ENVIRONMENT = "dev"
TENANT = "key:development"
"""Nobody else's: an operator's name has no colon, and no kid is of that length."""

SPEC = KeySpec(
    name="development",
    scopes=frozenset(map(str, (Scope.INFERENCE, Scope.MODELS, Scope.METRICS, Scope.USAGE))),
    tenant=TENANT,
)


def ensure(
    database: Database,
    peppers: Peppers,
    path: Path,
    *,
    now: Callable[[], float] = time.time,
    random: Random = secrets,
) -> str:
    """The key in the file; a new one when it is not there or does not work any more, and then the former is revoked.

    Raises StorageUnavailable, and ConfigurationError for a file that is not ours alone.
    """
    kept = _kept(path)
    if kept is not None and _works(kept, database.read(list_all).result(), peppers, now()):
        return kept.text
    operator = Operator(actor="service", peppers=peppers, environment=ENVIRONMENT, now=now, random=random)

    def renew(connection: Connection) -> IssuedKey:
        _revoke_all(connection, operator)
        return operator.create(connection, SPEC)

    issued = database.write(renew).result()
    write_private(path, f"{issued.text}\n".encode("ascii"), replace=True)
    return issued.text


def withdraw(database: Database, peppers: Peppers, path: Path, *, now: Callable[[], float] = time.time) -> int:
    """Revoke every development key and remove the file; returns how many there were. Raises StorageUnavailable."""
    operator = Operator(actor="service", peppers=peppers, environment=ENVIRONMENT, now=now)
    found = any(_is_ours(record) for record in database.read(list_all).result())
    revoked = database.write(lambda connection: _revoke_all(connection, operator)).result() if found else 0
    path.unlink(missing_ok=True)
    return revoked


def _kept(path: Path) -> ParsedKey | None:
    try:
        return parse(read_private(path).decode("ascii").removesuffix("\n"))
    except (FileNotFoundError, UnicodeDecodeError, MalformedKey):
        return None


def _works(key: ParsedKey, records: Sequence[KeyRecord], peppers: Peppers, now: float) -> bool:
    record = next((each for each in records if each.kid == key.kid), None)
    if record is None or not _is_ours(record) or record.scopes != SPEC.scopes or status(record, now) is not None:
        return False
    if record.pepper_version not in peppers.versions:
        return False
    return hmac.compare_digest(peppers.digest(record.pepper_version, key.text), record.hash)


def _is_ours(record: KeyRecord) -> bool:
    return record.tenant == TENANT and record.revoked_at is None


def _revoke_all(connection: Connection, operator: Operator) -> int:
    ours = [record for record in list_all(connection) if _is_ours(record)]
    for record in ours:
        operator.revoke(connection, record.kid)
    return len(ours)
