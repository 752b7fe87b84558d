"""Ports, and the issuers of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from service.auth.jwks import MAX_BYTES, KeySetError, parse_key_set
from service.auth.key_sets import read_secret
from service.doctor.finding import Finding, fail, ok, skipped, warn
from service.doctor.surroundings import Surroundings, reachable
from service.settings import ConfigurationError, IssuerSettings


def ports(around: Surroundings) -> Iterator[Finding]:
    """Free for a service that is stopped, or held by the one that runs."""
    server, ops = around.settings.server, around.settings.ops.address
    yield _port(around, "port", server.host, server.port, "server.port")
    if ops is not None:
        yield _port(around, "operator's port", *ops, "ops.bind")


def _port(around: Surroundings, name: str, host: str, port: int, key: str) -> Finding:
    if port == 0:
        return skipped(name, f"{key}: a free one is taken at each start")
    try:
        taken = around.connects(reachable(host), port)
    except OSError as error:
        return fail(name, f"{host}:{port}: {error.strerror}", f"{key}: give an address of this machine")
    if not taken:
        return ok(name, f"{host}:{port} is free; nothing runs there")
    holder = around.holder(port)
    who = "another user's process" if holder is None else f"{holder.program}, pid {holder.pid}, of {holder.user}"
    readiness = around.readiness
    if readiness is None:
        return fail(name, f"{host}:{port} is held by {who}, which is no mlxd", f"end it, or choose another {key}")
    if readiness["ready"]:
        return ok(name, f"{host}:{port}: mlxd is ready ({who})")
    why = readiness.get("reasons")
    reasons = "; ".join(map(str, why)) if isinstance(why, list) else str(readiness["state"])
    return warn(name, f"{host}:{port}: mlxd runs ({who}) and is not ready: {reasons}", "see docs/runbook.md, NotReady")


def issuers(around: Surroundings) -> Iterator[Finding]:
    """Whether the keys of each issuer can be had, and any of them used."""
    found = around.settings.auth.issuers
    if not found:
        yield skipped("issuers", "no issuer of tokens is configured")
    for issuer in found:
        yield _issuer(around, f"issuer: {issuer.name}", issuer)


def _issuer(around: Surroundings, name: str, issuer: IssuerSettings) -> Finding:
    if issuer.secret_file is not None:
        return _secret(name, issuer)
    where = issuer.jwks_url or str(issuer.jwks_file)
    try:
        if issuer.jwks_file is not None:
            with issuer.jwks_file.open("rb") as file:
                document = file.read(MAX_BYTES)
        else:
            answer = around.key_sets[issuer.name]
            if answer.problem:
                return fail(name, f"{where}: {answer.problem}", "check the address, its certificate and the network")
            document = answer.document
        keys = parse_key_set(document, issuer.algorithms)
    except OSError as error:
        return fail(name, f"{where}: {error.strerror}", "put the key set there, readable for the service")
    except KeySetError as error:
        return fail(name, f"{where}: {error}", "it must be a JSON Web Key Set (RFC 7517)")
    left_out = f", {sum(keys.skipped.values())} left out ({', '.join(keys.skipped)})" if keys.skipped else ""
    if not keys.keys:
        return fail(name, f"{where}: no usable key{left_out}", f"it needs one for {', '.join(issuer.algorithms)}")
    return ok(name, f"{where}: {len(keys.keys)} usable keys{left_out}")


def _secret(name: str, issuer: IssuerSettings) -> Finding:
    try:
        read_secret(issuer)
    except ConfigurationError as error:
        return fail(name, str(error), "docs/jwt.md, Shared secrets")
    return ok(name, "its shared secret is long enough")
