"""One issuer of JWTs: which of its tokens are believed, and the most that they may grant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from service.settings.base import Group, OptionalFile, SecretFile

Algorithm = Literal["HS256", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512"]
GrantedScope = Literal["inference", "models", "metrics", "usage", "admin"]

RESERVED = frozenset({"key", "local", "user"})
"""What identities from elsewhere begin with: `key:KID`, `local`, `user:NAME` of a mapped subject."""


def _not_reserved(name: str) -> str:
    if name in RESERVED:
        raise ValueError("is reserved")
    return name


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable")
    return text


def _https(url: str) -> str:
    if not url:
        return url
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("must be an https URL")
    if parts.username is not None or parts.fragment:
        raise ValueError("must have neither a user nor a fragment")
    _ = parts.port  # raises ValueError when it is none
    return url


Text = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_printable)]
ClaimName = Annotated[str, StringConstraints(max_length=128), AfterValidator(_printable)]
OwnName = Annotated[
    str, StringConstraints(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"), AfterValidator(_not_reserved)
]
PlanName = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9-]{1,32}$")]
IssuerName = Annotated[str, StringConstraints(pattern=r"\A[a-z0-9-]{1,32}$"), AfterValidator(_not_reserved)]


class IssuerSettings(Group):
    name: IssuerName = Field(description="Short and unique, of `a-z 0-9 -`: begins the ids and tenants of its tokens.")
    issuer: Text = Field(description="The exact `iss`.")
    audience: Text = Field(description="What `aud` must be or contain.")
    algorithms: tuple[Algorithm, ...] = Field(
        min_length=1, description="Allowed `alg`. An RSA key of a set that names none gets the first RSA one."
    )
    token_types: tuple[Literal["JWT", "at+jwt", ""], ...] = Field(
        ("JWT", "at+jwt"), min_length=1, description='Allowed `typ`; `""` stands for a token without one.'
    )
    leeway: int = Field(30, ge=0, le=60, description="Seconds that clocks may differ.")
    max_lifetime: int = Field(86_400, gt=0, le=2_592_000, description="Most seconds from `iat` to `exp`.")
    jwks_file: OptionalFile = Field(None, description="The key set, as a file; looked at every second.")
    jwks_url: Annotated[str, AfterValidator(_https)] = Field("", description="The key set, from an https address.")
    secret_file: SecretFile = Field(
        None, description="File (0600) of 32 bytes or more; a newline at its end does not count. HS256 only."
    )
    jwks_ttl: int = Field(
        600, ge=60, le=43_200, description="Seconds until a key set from an address is asked for anew."
    )
    jwks_ca_file: OptionalFile = Field(None, description="PEM file of the authorities that vouch for `jwks_url`.")
    allow_private_addresses: bool = Field(False, description="Let `jwks_url` be on a private or loopback address.")
    scope_claim: ClaimName = Field("scope", min_length=1, description="Claim of scopes: text with spaces, or a list.")
    tenant_claim: ClaimName = Field("", description="Claim of the tenant; empty: each subject is its own.")
    plan_claim: ClaimName = Field("", description="Claim of the plan; empty: always `default_plan`.")
    models_claim: ClaimName = Field("", description="Claim of a list of models; empty: all. A token without it: none.")
    scopes: tuple[GrantedScope, ...] = Field(("inference", "models"), description="May be granted; others are dropped.")
    plans: tuple[PlanName, ...] = Field((), description="May be granted beside `default_plan`; others are refused.")
    default_plan: PlanName = Field("default", description="The plan of a token that names none.")
    tenants: Mapping[Text, OwnName | Literal[""]] = Field(
        {}, description='Tenants by claim; `""` keeps the name, qualified; `"*"` allows all. Others are refused.'
    )
    subjects: Mapping[Text, OwnName] = Field({}, description="Subjects that have an identity `user:NAME` of ours.")

    @property
    def symmetric(self) -> bool:
        """Whether tokens are signed with a shared secret."""
        return self.secret_file is not None

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        sources = [self.jwks_file is not None, bool(self.jwks_url), self.secret_file is not None]
        if sum(sources) != 1:
            raise ValueError("give exactly one of jwks_file, jwks_url and secret_file")
        if self.symmetric and self.algorithms != ("HS256",):
            raise ValueError("algorithms: secret_file is for HS256 alone")
        if not self.symmetric and "HS256" in self.algorithms:
            raise ValueError("algorithms: HS256 needs secret_file, and never stands beside others")
        if len(set(self.algorithms)) < len(self.algorithms):
            raise ValueError("algorithms: one is given twice")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        for option, needed in (("jwks_ca_file", "jwks_url"), ("allow_private_addresses", "jwks_url")):
            if getattr(self, option) and not getattr(self, needed):
                raise ValueError(f"{option} needs {needed}")
        for values, claim in (("tenants", "tenant_claim"), ("plans", "plan_claim")):
            if bool(getattr(self, values)) != bool(getattr(self, claim)):
                raise ValueError(f"{values} and {claim} need each other")
        if self.tenants.get("*"):
            raise ValueError('tenants: "*" cannot be given one name')
        return self
