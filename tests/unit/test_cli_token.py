"""`mlxd token`: what an operator is told about a token, and what a denial does."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.auth.strict_jwt import Reason
from service.cli import commands, token as module
from tests.token_authority import SECRET, ec_key, key_set, pack, rsa_jwk, rsa_key, sign_ec, sign_hmac, sign_rsa

ISSUERS = """
[server]
state_dir = "state"
[[auth.issuers]]
name = "dev"
issuer = "https://dev.test/"
audience = "mlxd"
algorithms = ["HS256"]
secret_file = "secret"
tenant_claim = "tid"
tenants = { blue = "" }
models_claim = "models"
max_lifetime = 7200
[[auth.issuers]]
name = "acme"
issuer = "https://acme.test/"
audience = "mlxd"
algorithms = ["RS256"]
jwks_file = "keys.json"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.toml").write_text(ISSUERS)
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "keys.json").write_bytes(key_set(rsa_jwk(rsa_key(), kid="r1")))
    monkeypatch.setattr("service.observability.logging.configure", lambda **_: None)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def mlxd(folder: Path, *arguments: str, given: str | bytes = "") -> Result:
    return CliRunner().invoke(commands(), ["--config", str(folder / "mine.toml"), "token", *arguments], input=given)


def issued(folder: Path, *more: str) -> str:
    result = mlxd(folder, "issue", "--issuer", "dev", "--sub", "bob", *more)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.strip()


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    return {"iss": "https://acme.test/", "aud": "mlxd", "sub": "eve", "iat": now, "exp": now + 60, **changes}


def test_an_issued_token_is_verified_step_by_step(folder: Path) -> None:
    result = mlxd(folder, "verify", given=issued(folder, "--tenant", "blue", "--scope", "models") + "\n")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("ok ")] == [
        f"ok        {step}"
        for step in ("form", "issuer", "header", "key", "signature", "claims", "deny-list", "grants")
    ]
    assert lines[-3:] == [
        'ACCEPTED  "dev:bob", tenant "dev/blue", plan default',
        "          scopes models",
        "          models []",
    ]
    assert "the deny-list is not looked at" in result.stderr, "there is no database yet"


def test_a_token_without_scopes_says_so(folder: Path) -> None:
    result = mlxd(folder, "verify", given=pack({"alg": "RS256", "typ": "JWT"}, claims(), sign_rsa(rsa_key())))
    assert result.stdout.splitlines()[-2:] == [
        'ACCEPTED  "acme:eve", tenant "acme:eve", plan default',
        "          scopes none",
    ]


def test_a_refusal_is_explained_after_the_steps_that_were_passed(folder: Path) -> None:
    token = pack({"alg": "RS256", "typ": "JWT"}, claims(aud="other"), sign_rsa(rsa_key()))
    result = mlxd(folder, "verify", given=token)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert 'claims    "aud" = "other"' in lines
    assert lines[-2:] == ["ok        key", "REFUSED   audience: `aud` does not contain the issuer's audience"]
    assert token.rpartition(".")[2] not in result.output


def test_what_a_token_says_cannot_reach_the_terminal_as_an_escape(folder: Path) -> None:
    token = pack({"alg": "RS256", "typ": "JWT", "\x1b[2J": 1}, claims(sub="\x1b]0;x\x07\u202e"), sign_rsa(rsa_key()))
    result = mlxd(folder, "verify", given=token)
    assert result.exit_code == 1
    assert result.stdout.isascii()
    assert "\x1b" not in result.output


@pytest.mark.parametrize("given", ["", "not a token", b"\xff\xfe", "x" * 200_000, "a.b.c.d.e"])
def test_anything_may_be_on_standard_input(given: str | bytes, folder: Path) -> None:
    result = mlxd(folder, "verify", given=given)
    assert result.exit_code == 1
    assert result.stdout.startswith("REFUSED   ")


def test_only_one_issuer_may_be_believed(folder: Path) -> None:
    assert mlxd(folder, "verify", "--issuer", "dev", given=issued(folder)).exit_code == 0
    result = mlxd(folder, "verify", "--issuer", "acme", given=issued(folder))
    assert result.stdout.splitlines()[-1].startswith("REFUSED   unknown_issuer: ")
    assert mlxd(folder, "verify", "--issuer", "nobody", given="x").exit_code == 2


def test_keys_that_cannot_be_had_are_no_refusal(folder: Path) -> None:
    (folder / "keys.json").unlink()
    token = pack({"alg": "RS256", "typ": "JWT"}, claims(), sign_rsa(rsa_key()))
    result = mlxd(folder, "verify", given=token)
    assert result.exit_code == os.EX_UNAVAILABLE
    assert "mlxd: the keys of acme cannot be had: cannot be read: No such file or directory" in result.stderr
    assert "REFUSED" not in result.stdout


def test_a_denied_token_is_refused_and_listed(folder: Path) -> None:
    token = issued(folder)
    said = mlxd(folder, "verify", given=token).stdout
    token_id = next(json.loads(line.partition(" = ")[2]) for line in said.splitlines() if '"jti"' in line)
    result = mlxd(folder, "deny", "--issuer", "dev", "--jti", token_id)
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-1]
    assert last.startswith("denied until 2")
    assert last.endswith(f': "{token_id}" of dev')
    assert mlxd(folder, "verify", given=token).stdout.splitlines()[-1].startswith("REFUSED   denied: ")
    assert mlxd(folder, "verify", given=issued(folder)).exit_code == 0, "another token of the same subject"
    [row] = json.loads(mlxd(folder, "denied", "--json").stdout)
    assert (row["issuer"], row["kind"], row["value"]) == ("dev", "jti", token_id)
    assert row["expires_at"] - time.time() == pytest.approx(7260, abs=30), "as long as a token can be valid"
    assert token_id in mlxd(folder, "denied").stdout


def test_a_denied_subject_gets_in_with_no_token(folder: Path) -> None:
    assert mlxd(folder, "deny", "--issuer", "dev", "--sub", "bob", "--for", "24h").exit_code == 0
    assert mlxd(folder, "verify", given=issued(folder)).exit_code == 1
    [row] = json.loads(mlxd(folder, "denied", "--json").stdout)
    assert row["expires_at"] - time.time() == pytest.approx(86_400, abs=30)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--issuer", "dev"], "one of --jti and --sub"),
        (["--issuer", "dev", "--jti", "a", "--sub", "b"], "one of --jti and --sub"),
        (["--issuer", "dev", "--sub", "a\nb"], "not a text that a token can have"),
        (["--issuer", "dev", "--sub", ""], "not a text that a token can have"),
        (["--issuer", "dev", "--sub", "a", "--for", "soon"], "not a duration"),
        (["--issuer", "dev", "--sub", "a", "--for", "0s"], "longer than no time"),
        (["--issuer", "nobody", "--sub", "a"], 'no issuer "nobody"'),
    ],
)
def test_a_denial_that_means_nothing_is_wrong_usage(arguments: list[str], problem: str, folder: Path) -> None:
    result = mlxd(folder, "deny", *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--issuer", "acme", "--sub", "a"], "acme has no shared secret"),
        (["--issuer", "dev", "--sub", "a", "--scope", "admin"], "dev may not grant admin"),
        (["--issuer", "dev", "--sub", "a", "--lifetime", "3h"], "would refuse this token: lifetime"),
        (["--issuer", "dev", "--sub", "a", "--lifetime", "x"], "not a duration"),
    ],
)
def test_a_token_that_would_be_refused_is_not_made(arguments: list[str], problem: str, folder: Path) -> None:
    result = mlxd(folder, "issue", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr


def test_a_secret_that_is_open_to_others_is_code_78(folder: Path) -> None:
    (folder / "secret").chmod(0o644)
    result = mlxd(folder, "issue", "--issuer", "dev", "--sub", "a")
    assert result.exit_code == os.EX_CONFIG
    assert "chmod 600" in result.stderr


def test_a_database_that_is_not_ours_alone_is_told_and_not_passed_over(folder: Path) -> None:
    mlxd(folder, "deny", "--issuer", "dev", "--sub", "x")
    database = folder / "state" / "mlxd.db"
    database.write_bytes(b"not a database" * 100)
    result = mlxd(folder, "verify", given=issued(folder))
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    assert "ACCEPTED" not in result.stdout


def test_every_reason_has_an_explanation() -> None:
    assert set(module.EXPLANATIONS) == {reason.value for reason in Reason}


def test_a_token_of_another_algorithm_is_refused_by_name(folder: Path) -> None:
    for token in (
        pack({"alg": "ES256", "typ": "JWT"}, claims(), sign_ec(ec_key())),
        pack({"alg": "HS256", "typ": "JWT"}, claims(), sign_hmac(SECRET)),
    ):
        assert "REFUSED   algorithm: " in mlxd(folder, "verify", given=token).stdout
