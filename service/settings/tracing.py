"""Where spans and gen_ai metrics go, if anywhere; and no other telemetry than this group's."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field, model_validator

from service.settings.base import Group, SecretFile
from service.settings.private import ConfigurationError, read_private

_HEADER = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*([\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?)[ \t]*")
"""A field of RFC 9110, 5.5, without its obsolete parts."""

_OUTSIDE = ("OTEL_", "FASTAPI_OTEL_")


def _base_url(url: str) -> str:
    if not url:
        return url
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or not url.isascii() or not url.isprintable():
        raise ValueError("must be an http or https URL")
    if parts.username is not None or parts.query or parts.fragment or " " in url:
        raise ValueError("must have neither a user, a query nor a fragment; a credential belongs into headers_file")
    _ = parts.port  # raises ValueError when it is none
    return url.rstrip("/")


def _stays_here(url: SplitResult) -> bool:
    try:
        return url.hostname == "localhost" or ipaddress.ip_address(url.hostname or "").is_loopback
    except ValueError:
        return False


class TracingSettings(Group):
    endpoint: Annotated[str, AfterValidator(_base_url)] = Field(
        "", description="Base URL of an OTLP/HTTP collector, such as `http://127.0.0.1:4318`; empty: no traces."
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="Share of the traces that begin here; a caller's own decision holds for its trace."
    )
    headers_file: SecretFile = Field(
        None, description="File (0600) of headers for the collector, one `name: value` a line; needs https or loopback."
    )
    metrics: bool = Field(False, description="Send OpenTelemetry's gen_ai metrics to the same collector.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        url = urlsplit(self.endpoint)
        if not self.endpoint and (self.metrics or self.headers_file is not None):
            raise ValueError("metrics and headers_file need an endpoint")
        if self.headers_file is not None and url.scheme != "https" and not _stays_here(url):
            raise ValueError("headers_file: a credential leaves this machine by https only")
        return self

    def headers(self) -> Mapping[str, str]:
        """What `headers_file` holds, names in lower case. Raises ConfigurationError, which repeats no value."""
        if self.headers_file is None:
            return {}
        try:
            lines = read_private(self.headers_file).decode("ascii").splitlines()
        except FileNotFoundError:
            raise ConfigurationError(f"tracing.headers_file: {self.headers_file}: there is no such file") from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"tracing.headers_file: {self.headers_file}: must be ASCII") from None
        found: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _HEADER.fullmatch(line)
            if match is None or match[1].lower() in found:
                raise ConfigurationError(f"tracing.headers_file: line {number} is no new header `name: value`")
            found[match[1].lower()] = match[2]
        return found


def forget_outside_telemetry() -> None:
    """Take `OTEL_*` and `FASTAPI_OTEL_*` out of the environment; call before fastapi is first imported.

    Dozens of them are read by OpenTelemetry's packages, some at import and some whatever is passed: they would send
    telemetry elsewhere, add headers, switch the SDK off, or (`OTEL_PROPAGATORS`) keep fastapi from being imported.
    """
    for name in [name for name in os.environ if name.upper().startswith(_OUTSIDE)]:
        del os.environ[name]
