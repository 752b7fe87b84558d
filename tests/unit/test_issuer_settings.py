"""A malformed issuer is refused when the configuration is read, and never means "accept"."""

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from service.auth.principal import Scope
from service.settings import ConfigurationError, IssuerSettings, Settings, _toml_value
from service.settings.issuers import GrantedScope
from tests.conftest import ROOT

GOOD: dict[str, Any] = {
    "name": "acme",
    "issuer": "https://acme.test/",
    "audience": "mlxd",
    "algorithms": ["RS256"],
    "jwks_file": "keys.json",
}
SECRET = {"jwks_file": "", "secret_file": "s", "algorithms": ["HS256"]}
URL = {"jwks_file": "", "jwks_url": "https://acme.test/keys"}


def load(*issuers: dict[str, Any]) -> Settings:
    return Settings.load(None, {"auth.issuers": list(issuers)})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SECRET,
        URL,
        {"algorithms": ["RS256", "ES256", "RS512"]},
        URL | {"jwks_ca_file": "ca.pem", "allow_private_addresses": True, "jwks_ttl": 60},
        URL | {"jwks_url": "https://127.0.0.1:8443/x?y=z"},
        {"token_types": ["JWT", ""]},
        {"tenant_claim": "https://acme.test/tenant", "tenants": {"*": "", "a b": "ours"}},
        {"plan_claim": "p", "plans": ["gold"], "default_plan": "free"},
        {"subjects": {"0|a": "alice"}, "models_claim": "m", "scopes": []},
    ],
    ids=str,
)
def test_a_good_issuer_is_taken(changes: dict[str, Any]) -> None:
    [issuer] = load(GOOD | changes).auth.issuers
    assert issuer.symmetric is ("secret_file" in changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *(({"name": name}, "name") for name in ("", "A", "a:b", "a/b", "a_b", "x" * 33, "a\n", "é")),
        *(({"name": name}, "name: is reserved") for name in ("key", "local", "user")),
        *(({key: value}, key) for key in ("issuer", "audience") for value in ("", "a\n", "x" * 257, ["a"], None)),
        *(({"algorithms": value}, "algorithms") for value in ([], "RS256", ["none"], ["PS256"], ["rs256"], ["HS512"])),
        ({"algorithms": ["RS256", "RS256"]}, "algorithms: one is given twice"),
        ({"algorithms": ["HS256"]}, "HS256 needs secret_file"),
        ({"algorithms": ["RS256", "HS256"]}, "HS256 needs secret_file"),
        (SECRET | {"algorithms": ["HS256", "RS256"]}, "secret_file is for HS256 alone"),
        (SECRET | {"algorithms": ["RS256"]}, "secret_file is for HS256 alone"),
        ({"jwks_file": ""}, "exactly one of"),
        (URL | {"jwks_file": "k"}, "exactly one of"),
        ({"secret_file": "s"}, "exactly one of"),
        *(
            (URL | {"jwks_url": url}, "jwks_url")
            for url in (
                *("http://acme.test/", "file:///etc/passwd", "https://", "acme.test", "https://u:p@acme.test/"),
                *("https://acme.test/#x", "https://acme.test:x/", "https://acme.test/ x", "https://é.test/"),
            )
        ),
        *(({"leeway": value}, "leeway") for value in (-1, 61, 1.5, "x")),
        *(({"max_lifetime": value}, "max_lifetime") for value in (0, 2_592_001)),
        *((URL | {"jwks_ttl": value}, "jwks_ttl") for value in (0, 59, 43_201)),
        *(({"token_types": value}, "token_types") for value in ([], ["x"])),
        ({"jwks_ca_file": "ca.pem"}, "jwks_ca_file needs jwks_url"),
        ({"allow_private_addresses": True}, "allow_private_addresses needs jwks_url"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scope_claim": ""}, "scope_claim"),
        ({"tenant_claim": "t"}, "tenants and tenant_claim need each other"),
        ({"tenants": {"a": ""}}, "tenants and tenant_claim need each other"),
        *(
            ({"tenant_claim": "t", "tenants": {"a": value}}, "tenants")
            for value in ("local", "key:x", "a/b", "-a", "x" * 65, None)
        ),
        ({"tenant_claim": "t", "tenants": {"": ""}}, "tenants"),
        ({"tenant_claim": "t", "tenants": {"*": "ours"}}, '"*" cannot be given one name'),
        ({"plan_claim": "p"}, "plans and plan_claim need each other"),
        ({"plans": ["gold"]}, "plans and plan_claim need each other"),
        ({"plan_claim": "p", "plans": ["Gold"]}, "plans"),
        ({"default_plan": ""}, "default_plan"),
        ({"subjects": {"a": ""}}, "subjects"),
        ({"subjects": {"a": "x:y"}}, "subjects"),
        ({"secret": "hunter2hunter2"}, "secret: unknown key"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_issuer_is_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(GOOD | changes)
    assert str(caught.value).startswith("auth.issuers.0")
    assert problem in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["name", "issuer", "audience", "algorithms"])
def test_nothing_that_decides_has_a_default(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"auth\.issuers\.0\.{name}"):
        load({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("key", ["name", "issuer"])
def test_two_issuers_differ(key: str) -> None:
    other = {"name": "other", "issuer": "https://other.test/"}
    assert len(load(GOOD, GOOD | other).auth.issuers) == 2
    with pytest.raises(ConfigurationError, match=f"two of them have the same {key}"):
        load(GOOD, GOOD | other | {key: GOOD[key]})


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[[auth.issuers]]\nname = 'acme'\nissuer = 'a'\naudience = 'b'\nalgorithms = ['ES256']\n"
        "jwks_file = 'k/s.json'\n"
        "[[auth.issuers]]\nname = 'dev'\nissuer = 'd'\naudience = 'b'\nalgorithms = ['HS256']\nsecret_file = '../s'\n"
    )
    acme, dev = Settings.load(path).auth.issuers
    assert (acme.jwks_file, dev.secret_file) == (tmp_path / "k/s.json", tmp_path.parent / "s")


def test_an_issuer_cannot_be_changed() -> None:
    [issuer] = load(GOOD).auth.issuers
    with pytest.raises(ValidationError):
        issuer.leeway = 0  # type: ignore[misc]


def test_issuers_may_stand_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_AUTH__ISSUERS", '[{"name": "Acme"}]')
    with pytest.raises(ConfigurationError, match=r"auth\.issuers\.0\.name"):
        Settings.load()


@pytest.mark.parametrize("value", ["[1]", '{"a": 1}', '"x"'])
def test_issuers_that_are_no_tables_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[auth]\nissuers = {value.replace(':', ' =')}\n".replace('{"a"', "{a"))
    with pytest.raises(ConfigurationError, match=r"auth\.issuers"):
        Settings.load(path)


def test_the_scopes_are_those_of_principals_and_admin_is_not_given_by_default() -> None:
    assert set(get_args(GrantedScope)) == {scope.value for scope in Scope}
    assert load(GOOD).auth.issuers[0].scopes == ("inference", "models")


def test_every_key_of_an_issuer_is_documented_with_its_default_and_meaning() -> None:
    documented = (ROOT / "docs/jwt.md").read_text("utf-8").splitlines()
    for key, field in IssuerSettings.model_fields.items():
        default = "required" if field.is_required() else f"`{_toml_value(field.default)}`"
        assert f"| `{key}` | {default} | {field.description} |" in documented
