"""The sections of the configuration: every key, its default, its bounds and one line of meaning."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.settings.base import FilePath, Group, Network, OptionalFile, Secret, SecretFile
from service.settings.issuers import IssuerSettings

MAX_PORT = 65535


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServerSettings(Group):
    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback with `auth` and TLS or a proxy.")
    port: int = Field(8000, ge=0, le=MAX_PORT, description="TCP port; 0 takes a free one.")
    backlog: int = Field(1024, ge=1, le=65535, description="Connections the kernel may hold before they are accepted.")
    max_connections: int = Field(
        2048, ge=1, description="Most open connections; fewer where the process may not open as many files."
    )
    allowed_hosts: tuple[str, ...] = Field(
        ("127.0.0.1", "localhost", "[::1]"), description="Host headers that are answered; `*` allows any."
    )
    state_dir: FilePath = Field(
        Path("~/.local/state/mlxd"), description="Models, compiled kernels, keys, the audit log."
    )
    tls_certificate: OptionalFile = Field(None, description="PEM file of the certificate chain; TLS 1.2 or newer.")
    tls_key: Annotated[OptionalFile, Secret(enforced=False)] = Field(
        None, description="PEM file of the certificate's private key."
    )
    trusted_proxies: tuple[Network, ...] = Field(
        (), description="Networks (CIDR) of proxies in front: X-Forwarded-For is believed from there only."
    )

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key need each other")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


class OpsSettings(Group):
    bind: str = Field(
        "127.0.0.1:8001",
        description="ADDRESS:PORT of a second listener, for operators; port 0 takes a free one, empty: none.",
    )

    @field_validator("bind")
    @classmethod
    def _is_an_address(cls, bind: str) -> str:
        if bind and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:\s]+):[0-9]{1,5}", bind):
            raise ValueError("must be ADDRESS:PORT, as 127.0.0.1:8001 or [::1]:8001")
        if bind and int(bind.rpartition(":")[2]) > MAX_PORT:
            raise ValueError(f"the port must be at most {MAX_PORT}")
        return bind

    @property
    def address(self) -> tuple[str, int] | None:
        """Host (an IPv6 address without brackets) and port; None without a second listener."""
        host, _, port = self.bind.rpartition(":")
        return (host.strip("[]"), int(port)) if self.bind else None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.address is None or is_loopback(self.address[0])


class HttpSettings(Group):
    max_body_bytes: int = Field(2 * 1024 * 1024, ge=1024, description="Largest request body, in bytes.")
    max_header_bytes: int = Field(32 * 1024, ge=1024, description="Largest request head, in bytes.")
    max_headers: int = Field(64, ge=8, description="Most header lines in one request.")
    head_timeout: float = Field(10.0, gt=0, description="Seconds a client may take to send a request's head.")
    body_timeout: float = Field(30.0, gt=0, description="Seconds a client may take to send a request's body.")
    idle_timeout: float = Field(75.0, gt=0, description="Seconds an idle keep-alive connection is kept.")
    write_timeout: float = Field(
        15.0, gt=0, description="Seconds one write to a client may stall before it is dropped."
    )
    stream_keepalive: float = Field(
        10.0, gt=0, description="Seconds without a token after which a stream sends an SSE comment."
    )


class ModelSettings(Group):
    reference: str = Field(
        "mlx-community/Llama-3.2-1B-Instruct-4bit",
        min_length=1,
        description="A hub id, a local MLX folder, or `demo` for the embedded SmolLM2-135M-Instruct.",
    )
    aliases: tuple[str, ...] = Field(("default",), description="Further names under which the model is served.")
    offline: bool = Field(False, description="Never ask the hub or the package index.")
    dequantize_on_cpu: bool = Field(
        True, description="On mlx's CPU backend, keep the weights as dense float32 (2x to 9x faster, 8x larger)."
    )


class EngineSettings(Group):
    max_rows: int = Field(32, ge=1, le=512, description="Most requests decoded in one batch.")
    max_queue: int = Field(256, ge=0, description="Most requests waiting; beyond it 503.")
    step_target: float = Field(0.25, gt=0, description="Seconds one engine step should last at most.")
    delivery_interval: float = Field(
        0.01,
        ge=0,
        description="Least seconds between pieces of a stream, twice as many from 32 streams on; 0: one piece a step.",
    )
    max_prefill_chunk: int = Field(2048, ge=16, description="Most prompt tokens (rows x tokens) prefilled in one step.")
    max_prefill_rows: int = Field(8, ge=1, description="Most short prompts prefilled together.")
    context_length: int = Field(0, ge=0, description="Tokens of prompt and output; 0 means the model's own limit.")
    default_max_tokens: int = Field(1024, ge=1, description="max_tokens of a request that names none (`/v1`).")
    max_output_tokens: int = Field(16384, ge=1, description="Largest max_tokens a request may ask for.")
    max_choices: int = Field(8, ge=1, le=128, description="Largest `n` of a request.")
    request_timeout: float = Field(600.0, gt=0, description="Seconds a request may take in queue, prefill and decode.")
    drain_timeout: float = Field(30.0, ge=0, description="Seconds running requests may go on after a stop signal.")
    memory_budget: int = Field(
        0, ge=0, description="Bytes for KV caches, prefix cache and activations; 0 takes it from the device."
    )
    memory_budget_share: float = Field(
        1.0, gt=0, le=1, description="Share of that budget that is used; safe mode halves it."
    )
    prefix_cache_fraction: float = Field(
        0.25, ge=0, le=0.9, description="Share of the memory budget that finished prompts may keep; 0 turns it off."
    )
    wired_limit: int = Field(0, ge=0, description="Bytes for Metal's wired limit; 0 leaves it alone (mlx #3186).")
    buffer_cache_limit: int = Field(
        0, ge=0, description="Bytes of freed buffers that mlx may keep for reuse; 0 takes it from the device."
    )


class WatchdogSettings(Group):
    stall_timeout: float = Field(
        120.0, ge=0, description="Seconds of work without a token or a piece of prompt after which it exits; 0: never."
    )
    start_timeout: float = Field(
        900.0,
        ge=0,
        description="The same while the model is fetched, loaded and warmed, between two reports; 0: never.",
    )
    loop_timeout: float = Field(
        60.0, ge=0, description="Seconds for which the event loop, or the interpreter, may stand still; 0: for ever."
    )
    canary_interval: float = Field(
        0.0, ge=0, description="Seconds without work after which the engine generates a token for itself; 0: never."
    )

    @property
    def suspect_after(self) -> float:
        """Seconds without progress after which the service is not ready, though the engine may yet go on; 0: never."""
        return self.stall_timeout / 4


class LogSettings(Group):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="`json` lines, `console` colours, or `auto`: console on a terminal."
    )
    file: OptionalFile = Field(
        None, description="File of the log, made 0600; opened anew at SIGHUP. Empty: standard error."
    )
    queue_lines: int = Field(
        4096, ge=1, le=2**20, description="Most lines that wait for a slow reader; beyond it the oldest are dropped."
    )


class MetricsSettings(Group):
    max_consumers: int = Field(
        200, ge=1, le=1000, description="Most keys with series of their own in `/metrics`; the others share one."
    )
    vllm_aliases: bool = Field(False, description="Show series also under vLLM's names, for dashboards made for it.")


class StorageSettings(Group):
    url: str = Field("", description="SQLAlchemy URL; empty means SQLite in the state directory.")
    url_file: SecretFile = Field(None, description="File (0600) that holds the URL when it contains a password.")
    busy_timeout: float = Field(2.0, gt=0, le=30, description="Seconds a write waits for another process's lock.")
    usage_days: int = Field(400, ge=32, le=3660, description="Days for which each request's usage is kept.")


class AuthSettings(Group):
    enabled: bool = Field(True, description="Ask for a key or a token. Off is possible on loopback only.")
    environment: str = Field(
        "live", pattern=r"\A[a-z][a-z0-9]{0,11}$", description="Part of every new key's text, to tell keys apart."
    )
    pepper_file: SecretFile = Field(
        None, description="File (0600) of the secrets that hash keys; made on first use in the state directory."
    )
    stale_for: float = Field(
        60.0, ge=0, le=3600, description="Seconds for which known keys stay valid while the store cannot be read."
    )
    development_key: bool = Field(
        False, description="Keep one key in clear in the state directory; loopback only, for `make serve`."
    )
    issuers: tuple[IssuerSettings, ...] = Field(
        (), description="Issuers of JWTs, each a table `[[auth.issuers]]`; docs/jwt.md has its keys."
    )

    @model_validator(mode="after")
    def _issuers_differ(self) -> Self:
        for key in ("name", "issuer"):
            if len({getattr(each, key) for each in self.issuers}) < len(self.issuers):
                raise ValueError(f"issuers: two of them have the same {key}")
        return self
