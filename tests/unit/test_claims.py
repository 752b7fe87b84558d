"""What claims are worth: times to the second, and identities that never meet nor grow."""

import re
from typing import Any

import pytest

from service.auth.claims import Identity, check_claims, principal_of
from service.auth.principal import DEFAULT_PLAN, LOCAL, Scope
from service.errors import Unauthorized
from tests.token_authority import issuer_settings

NOW = 1_800_000_000
GOOD: dict[str, Any] = {
    "iss": "https://acme.test/",
    "aud": "mlxd",
    "sub": "alice",
    "iat": NOW,
    "exp": NOW + 60,
    "scope": "inference",
}
ISSUER = issuer_settings(leeway=30, max_lifetime=3600)


def reason(issuer: Any = ISSUER, now: float = NOW, **claims: Any) -> str | None:
    try:
        check_claims({**GOOD, **claims}, issuer, now)
    except Unauthorized as error:
        return error.reason
    return None


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"exp": NOW - 29, "iat": NOW - 60}, None),
        ({"exp": NOW - 30, "iat": NOW - 60}, "expired"),
        ({"nbf": NOW + 30}, None),
        ({"nbf": NOW + 31}, "not_yet_valid"),
        ({"iat": NOW + 30, "exp": NOW + 90}, None),
        ({"iat": NOW + 31, "exp": NOW + 90}, "not_yet_valid"),
        ({"iat": NOW + 31, "nbf": NOW, "exp": NOW + 90}, "not_yet_valid"),
        ({"exp": NOW + 3600}, None),
        ({"exp": NOW + 3601}, "lifetime"),
        ({"iat": NOW - 3600, "exp": NOW + 1}, "lifetime"),
        ({"iat": NOW, "exp": NOW}, "lifetime"),
        ({"iat": NOW + 20, "exp": NOW + 10}, "lifetime"),
        ({"iat": -(2**62)}, "lifetime"),
        ({"exp": 2**63 - 1}, "lifetime"),
    ],
)
def test_times_count_to_the_second(claims: dict[str, Any], expected: str | None) -> None:
    assert reason(**claims) == expected


def test_a_fraction_of_a_second_counts_too() -> None:
    assert reason(now=NOW + 89.9) is None
    assert reason(now=NOW + 90.0) == "expired"


@pytest.mark.parametrize(
    "aud", [["mlxd", 1], [["mlxd"]], {"mlxd": 1}, 1, True, "", ["mlxd"] * 65, ["", "mlxd"], ["mlxd", "a\n"]]
)
def test_an_audience_that_is_no_list_of_texts_is_refused(aud: object) -> None:
    assert reason(aud=aud) == "claims"


@pytest.mark.parametrize("jti", ["", 1, None, "a\0", "x" * 257, []])
def test_a_token_id_is_a_text_if_there_is_one(jti: object) -> None:
    assert reason(jti=jti) == "claims"


def test_another_issuers_claims_are_not_believed() -> None:
    assert reason(iss="https://acme.test") == "unknown_issuer"


def test_the_identity_is_the_issuers_name_with_what_it_said() -> None:
    assert check_claims(GOOD, ISSUER, NOW) == Identity("acme", "alice", None)
    assert check_claims({**GOOD, "jti": "t"}, ISSUER, NOW) == Identity("acme", "alice", "t")


def test_a_principal_without_a_tenant_claim_is_its_own_tenant() -> None:
    who = principal_of(GOOD, ISSUER)
    assert (who.id, who.tenant, who.plan, who.key_id, who.models) == (
        "acme:alice",
        "acme:alice",
        DEFAULT_PLAN,
        "acme",
        None,
    )


TENANTS = issuer_settings(tenant_claim="tid", tenants={"blue": "", "red": "our-red"})


@pytest.mark.parametrize(
    ("claim", "tenant"), [("blue", "acme/blue"), ("red", "our-red"), ("green", "REFUSED"), ("*", "REFUSED")]
)
def test_a_tenant_is_qualified_or_mapped_or_refused(claim: str, tenant: str) -> None:
    if tenant == "REFUSED":
        with pytest.raises(Unauthorized) as caught:
            principal_of({**GOOD, "tid": claim}, TENANTS)
        assert caught.value.reason == "tenant"
    else:
        assert principal_of({**GOOD, "tid": claim}, TENANTS).tenant == tenant


def test_every_tenant_may_be_allowed() -> None:
    anyone = issuer_settings(tenant_claim="tid", tenants={"*": "", "red": "our-red"})
    assert principal_of({**GOOD, "tid": "x/y:z"}, anyone).tenant == "acme/x/y:z"
    assert principal_of({**GOOD, "tid": "red"}, anyone).tenant == "our-red"
    assert principal_of(GOOD, anyone).tenant == "acme:alice"


@pytest.mark.parametrize("value", ["", None, 1, ["blue"], "a\n"])
def test_a_tenant_of_a_wrong_type_is_refused_not_left_out(value: object) -> None:
    with pytest.raises(Unauthorized) as caught:
        principal_of({**GOOD, "tid": value}, TENANTS)
    assert caught.value.reason == "claims"


@pytest.mark.parametrize(
    ("claim", "granted"),
    [
        ("inference models admin usage x", {"inference", "models"}),
        ("", set()),
        ("Inference  inferenc", set()),
        (["models", "admin"], {"models"}),
        ([], set()),
        ("admin", set()),
        ("inference\tmodels", set()),
    ],
)
def test_scopes_that_are_not_listed_are_dropped(claim: object, granted: set[str]) -> None:
    assert {scope.value for scope in principal_of({**GOOD, "scope": claim}, ISSUER).scopes} == granted


def test_no_scope_claim_is_no_scope() -> None:
    claims = {key: value for key, value in GOOD.items() if key != "scope"}
    assert principal_of(claims, ISSUER).scopes == frozenset()


@pytest.mark.parametrize("value", [None, 1, {"inference": 1}, [1], [["models"]]])
def test_scopes_of_a_wrong_type_refuse_the_token(value: object) -> None:
    with pytest.raises(Unauthorized) as caught:
        principal_of({**GOOD, "scope": value}, ISSUER)
    assert caught.value.reason == "claims"


def test_admin_is_granted_only_where_it_is_listed() -> None:
    generous = issuer_settings(scopes=("admin", "usage"), scope_claim="roles")
    who = principal_of({**GOOD, "roles": ["admin", "inference"]}, generous)
    assert who.scopes == {Scope.ADMIN}


def test_a_plan_is_listed_or_the_default_or_refused() -> None:
    issuer = issuer_settings(plan_claim="plan", plans=("gold",), default_plan="free")
    assert principal_of(GOOD, issuer).plan == "free"
    assert principal_of({**GOOD, "plan": "gold"}, issuer).plan == "gold"
    assert principal_of({**GOOD, "plan": "free"}, issuer).plan == "free"
    for value, expected in (("silver", "plan"), ("", "claims"), (None, "claims"), (["gold"], "claims")):
        with pytest.raises(Unauthorized) as caught:
            principal_of({**GOOD, "plan": value}, issuer)
        assert caught.value.reason == expected


def test_models_are_what_the_claim_lists_and_without_it_none() -> None:
    issuer = issuer_settings(models_claim="models")
    assert principal_of({**GOOD, "models": ["a", "b"]}, issuer).models == frozenset({"a", "b"})
    assert principal_of(GOOD, issuer).models == frozenset()
    for value in ("a", None, [1], ["a"] * 65):
        with pytest.raises(Unauthorized):
            principal_of({**GOOD, "models": value}, issuer)


NAMES = ["alice", "a:b", "a/b", "acme:alice", "key:KID", "local", "user:alice", ":", "/", " ", "x" * 256, "é", "*"]


def test_equal_names_of_different_issuers_and_of_keys_never_meet() -> None:
    """Buckets, caches, usage and deny-list are keyed by these two, so equal ones would be shared."""
    tenants: dict[str, Any] = {"tenant_claim": "tid", "tenants": {"*": ""}}
    issuers = [
        issuer_settings(name=name, issuer=f"https://{name}/", **tenants) for name in ("acme", "acme-a", "other", "a")
    ]
    found = [
        principal_of({**GOOD, "iss": issuer.issuer, "sub": name, **extra}, issuer)
        for issuer in issuers
        for name in NAMES
        for extra in ({}, {"tid": name})
    ]
    ids = {(who.key_id, who.id) for who in found}
    assert len(ids) == len({id_ for _, id_ in ids}) == len(issuers) * len(NAMES)
    assert len({who.tenant for who in found}) == len(found)
    keys = {f"key:{name}" for name in NAMES} | {LOCAL.id} | {f"user:{name}" for name in NAMES}
    assert keys.isdisjoint({who.id for who in found} | {who.tenant for who in found})
    own_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # what a key's tenant may be called
    assert not [who.tenant for who in found if own_name.fullmatch(who.tenant)]


def test_a_mapped_subject_is_one_user_whichever_issuer_speaks_for_it() -> None:
    first = issuer_settings(subjects={"u1": "alice"})
    second = issuer_settings(name="other", issuer="o", subjects={"77": "alice"})
    one, two = principal_of({**GOOD, "sub": "u1"}, first), principal_of({**GOOD, "sub": "77"}, second)
    assert (one.id, one.tenant) == (two.id, two.tenant) == ("user:alice", "user:alice")
    assert principal_of({**GOOD, "sub": "alice"}, first).id == "acme:alice"
