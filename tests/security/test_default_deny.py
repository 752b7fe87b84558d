"""Closed by default: every route of the real application, every kind of credential, every kind of method."""

import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI

from service.auth.principal import Scope
from service.settings import Settings
from tests.architecture import mounted_routes, required_scopes
from tests.serving import Served, bearer, make_key

METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PROPFIND", "BREW")
"""The last is none that HTTP knows, the one before it none that we do."""

PUBLIC = {("HEAD", "/")} | {(method, path) for method in ("GET", "HEAD") for path in ("/health", "/livez", "/readyz")}
UNKNOWN = (
    *("/nowhere", "/v1", "/v1/", "/admin", "/docs/oauth2-redirect", "/redoc"),
    *("/metrics/x", "/%2e%2e/metrics", "/;", "/health/x"),
)
WITHOUT_BODY = {"/admin/drain"}
"""Posted to as it is; undone at the end of the test."""
MUST_BE_THERE = {
    *("/", "/health", "/generate", "/v1/chat/completions"),
    *("/metrics", "/docs", "/openapi.json", "/admin/keys", "/v1/usage", "/admin/usage"),
}


@dataclass
class Place:
    """One path, with the methods it answers and the scope it needs (None: it is public, or there is nothing)."""

    path: str
    methods: frozenset[str]
    scope: Scope | None


def places(app: FastAPI, kid: str) -> Iterator[Place]:
    """What is mounted, however it was mounted."""
    methods: dict[str, set[str]] = defaultdict(set)
    scopes: dict[str, set[Scope]] = defaultdict(set)
    for route in mounted_routes(app.routes):
        methods[route.path] |= route.methods
        scopes[route.path] |= set(required_scopes(route.dependant))
    assert methods.keys() >= MUST_BE_THERE
    for path, found in methods.items():
        assert len(scopes[path]) <= 1, "one scope for all that is at a path"
        concrete = path.replace("{kid}", kid).replace("{model_id:path}", "default")
        assert "{" not in concrete, "a new kind of parameter"
        yield Place(concrete, frozenset(found), next(iter(scopes[path]), None))
    for path in UNKNOWN:
        yield Place(path, frozenset(), None)


def outcome(place: Place, method: str, credential: str) -> int:
    """The status that is right."""
    rules = (
        (method == "BREW", 400),  # from the parser
        ((method, place.path) in PUBLIC, 200),
        (credential in ("none", "malformed"), 401),
        (not place.methods, 404),
        (method not in place.methods, 405),
        (credential == "wrong", 403),
        (method == "POST" and place.path not in WITHOUT_BODY, 415),  # there is no body
        (True, 200),
    )
    return next(status for holds, status in rules if holds)


def test_nothing_answers_a_stranger_but_the_probes(
    guarded: Served, guarded_settings: Settings, master_key: str
) -> None:
    others = {scope: make_key(guarded_settings, *(set(Scope) - {scope})).text for scope in Scope}
    asked = 0
    with httpx.Client(base_url=guarded.url) as client:
        for place in places(guarded.app.asgi, kid=master_key.split("_")[2]):
            credentials = {
                "none": {},
                "malformed": {"authorization": "Bearer mlxd_live_nonsense"},
                "wrong": bearer(others[place.scope or Scope.INFERENCE]),
                "right": bearer(master_key),
            }
            for credential, headers in credentials.items():
                for method in METHODS:
                    answer = client.request(method, place.path, headers=headers)
                    assert answer.status_code == outcome(place, method, credential), (place, method, credential)
                    asked += 1
        assert client.delete("/admin/drain", headers=bearer(master_key)).json()["state"] == "ready"
    print(f"default deny: {asked} requests, each answered as it must be")


def test_every_401_is_the_same(guarded: Served, guarded_settings: Settings, master_key: str) -> None:
    """For what is unknown, wrong, over, malformed or mistyped; on every path, in every dialect."""
    then = time.time() - 1000
    expired = make_key(guarded_settings, *Scope, now=lambda: then, expires_at=then + 10)
    early = make_key(guarded_settings, *Scope, not_before=time.time() + 1000)
    elsewhere = make_key(guarded_settings, *Scope, networks=["203.0.113.0/24"])
    revoked = make_key(guarded_settings, *Scope)
    wrong_secret = swap(master_key, "secret")
    sent = {
        "unknown": bearer(swap(master_key, "kid")),
        "wrong secret": bearer(wrong_secret),
        "bad checksum": bearer(master_key[:-1] + ("a" if master_key[-1] != "a" else "b")),
        "expired": bearer(expired),
        "not yet valid": bearer(early),
        "from elsewhere": bearer(elsewhere),
        "revoked": bearer(revoked),
        "malformed": bearer("mlxd_"),
        "another scheme": {"authorization": f"Basic {master_key}"},
        "another kind": {"x-api-key": "sk-ant-0000"},
        "a token": bearer("eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.x"),
        "none": {},
    }
    seen = set()
    with httpx.Client(base_url=guarded.url) as client:
        gone = client.delete(f"/admin/keys/{revoked.record.kid}", headers=bearer(master_key))
        assert gone.json()["status"] == "revoked"
        for path in ("/v1/models", "/generate", "/admin/keys", "/nowhere"):
            for why, headers in sent.items():
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401, why
                varying = ("x-request-id", "date")
                kept = tuple((name, value) for name, value in answer.headers.items() if name not in varying)
                seen.add((answer.content, kept))
    assert len(seen) == 1


def swap(key: str, part: str) -> str:
    """The same key with another secret or id, and a checksum that is right."""
    from service.auth.key_format import checksum

    brand, env, kid, secret, _ = key.split("_")
    if part == "secret":
        secret = secret[1:] + secret[0]
    else:
        kid = kid[::-1]
    body = f"{brand}_{env}_{kid}_{secret}"
    return f"{body}_{checksum(body)}"


SQL = b"' OR 1=1; DROP TABLE keys; --"
HOSTILE = {
    "sql": (b"Authorization: Bearer " + SQL, {401}),
    "sql as a key": (b"x-api-key: mlxd_live_" + SQL, {401}),
    "nul": (b"Authorization: Bearer mlxd_\x00", {400}),
    "control characters": (b"Authorization: Bearer \x01\x02\x7f", {400, 401}),
    "a second header line": (b"Authorization: Bearer x\r\nX-Api-Key: y", {401}),
    "a bare carriage return": (b"Authorization: Bearer x\ry", {400}),
    "a bare line feed": (b"Authorization: Bearer x\ny", {400}),
    "folded": (b"Authorization: Bearer\r\n x", {400, 401}),
    "utf-8": ("Authorization: Bearer kлюч😀".encode(), {401}),
    "latin-1": (b"Authorization: Bearer \xe9\xff\xa0", {401}),
    "not utf-8": (b"x-api-key: \xc3\x28\xf0\x9f", {401}),
    "a megabyte": (b"Authorization: Bearer " + b"A" * 1_000_000, {431}),
    "as long as a head may be": (b"Authorization: Bearer " + b"A" * 30_000, {401}),
    "dots of a megabyte": (b"x-api-key: " + b"." * 1_000_000, {431}),
    "a thousand dots": (b"x-api-key: " + b"a." * 1000, {401}),
    "braces": (b"Authorization: Bearer {}{{}}%s%n$(id)`id`", {401}),
    "empty": (b"Authorization:", {401}),
    "sixty headers": (b"\r\n".join([b"x-api-key: a"] * 60), {401}),
    "a hundred headers": (b"\r\n".join([b"x-api-key: a"] * 100), {431}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_credential_is_a_refusal_and_never_a_fault(guarded: Served, master_key: str, name: str) -> None:
    line, expected = HOSTILE[name]
    url = httpx.URL(guarded.url)
    with socket.create_connection((url.host, url.port or 0), timeout=10) as wire:
        wire.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + line + b"\r\n\r\n")
        heard = b""
        while piece := wire.recv(65536):
            heard += piece
    status = int(heard.split(b" ", 2)[1])
    assert status in expected
    metrics = httpx.get(f"{guarded.url}/metrics", headers=bearer(master_key)).text
    assert 'mlxd_internal_errors_total{where="request"}' not in metrics
