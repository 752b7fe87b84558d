"""Configuration: frozen groups, read once, in layers. The only reader (and writer) of `os.environ`.

Precedence, strongest first: command line, environment (`MLXD_SECTION__KEY`), the file given by `--config`,
`default.toml` beside it, the defaults below (a test keeps `config/default.toml` equal to them).
An unknown key anywhere is an error. A relative path in a file is relative to that file's folder, elsewhere to
the working directory.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import stat
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

ENV_PREFIX = "MLXD_"


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names the key and what is wrong with it."""


class Group(BaseModel):
    """A frozen section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()


class ServerSettings(Group):
    host: str = Field("127.0.0.1", description="Address to listen on; loopback only until there is authentication.")
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    backlog: int = Field(1024, ge=1, le=65535, description="Connections the kernel may hold before they are accepted.")
    allowed_hosts: tuple[str, ...] = Field(
        ("127.0.0.1", "localhost", "[::1]"), description="Host headers that are answered; `*` allows any."
    )
    state_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        Path("~/.local/state/mlxd"), description="Models, compiled kernels, later keys and usage."
    )

    @field_validator("host")
    @classmethod
    def _loopback_without_authentication(cls, host: str) -> str:
        if host != "localhost" and not _is_loopback(host):
            raise ValueError(f"{host} is not a loopback address, and this version has no authentication; use 127.0.0.1")
        return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    prefix_cache_fraction: float = Field(
        0.25, ge=0, le=0.9, description="Share of the memory budget that finished prompts may keep; 0 turns it off."
    )
    wired_limit: int = Field(0, ge=0, description="Bytes for Metal's wired limit; 0 leaves it alone (mlx #3186).")
    buffer_cache_limit: int = Field(
        512 * 1024 * 1024, ge=0, description="Bytes of freed buffers that mlx may keep for reuse."
    )


class LogSettings(Group):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level that is logged."
    )
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="`json` lines, `console` colours, or `auto`: console on a terminal."
    )


class Settings(BaseSettings):
    """The whole configuration. Immutable; built by `load`, passed down, never global."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__", protected_namespaces=()
    )

    server: ServerSettings = Field(default_factory=ServerSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    log: LogSettings = Field(default_factory=LogSettings)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` merged: no .env file is read, and the order of the layers stands in one place."""
        return (init_settings,)

    @classmethod
    def load(cls, config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
        """Read all layers. `overrides` are `section.key` -> value from the command line.

        Raises ConfigurationError with one line per wrong key.
        """
        merged: dict[str, Any] = {}
        if config is not None:
            default = config.with_name("default.toml")
            if default != config and default.is_file():
                _merge(merged, _read_toml(default))
            _merge(merged, _read_toml(config))
        _merge(merged, _environment(cls))
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            _merge(merged, {section: {key: value}})
        try:
            return cls(**merged)
        except ValidationError as error:
            raise ConfigurationError(_describe(error)) from None


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _read_toml(path: Path) -> dict[str, Any]:
    """One file's keys, with its relative paths made absolute against the file's own folder."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    _anchor(data.get("server"), "state_dir", path.parent, always=True)
    _anchor(data.get("model"), "reference", path.parent, always=False)
    return data


def _anchor(section: object, key: str, folder: Path, *, always: bool) -> None:
    """Make a path absolute in place. Unless `always`, only what cannot be anything else: `./x`, `../x`, `~/x`."""
    value = section.get(key) if isinstance(section, dict) else None
    if isinstance(section, dict) and isinstance(value, str) and (always or value.startswith(("./", "../", "~/"))):
        section[key] = str((folder / Path(value).expanduser()).resolve())


def _environment(cls: type[Settings]) -> dict[str, Any]:
    for name in os.environ:
        if not name.upper().startswith(ENV_PREFIX):
            continue
        section = name[len(ENV_PREFIX) :].partition("__")[0].lower()
        if section not in cls.model_fields:
            raise ConfigurationError(f"environment variable {name}: no such section")
    try:
        return EnvSettingsSource(cls)()
    except SettingsError as error:
        raise ConfigurationError(f"environment: {error}") from None


def _describe(error: ValidationError) -> str:
    """One line per problem, by dotted key; never the value, which may be a secret one day."""
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        key = ".".join(map(str, problem["loc"])) or "settings"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, keys(), n=1)
            message = "unknown key" + (f"; did you mean {near[0]}?" if near else "")
        lines.append(f"{key}: {message}")
    return "\n".join(lines)


def sections() -> dict[str, type[Group]]:
    """The groups by name, in the order of the documentation."""
    found = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {name: group for name, group in found.items() if isinstance(group, type) and issubclass(group, Group)}


def keys() -> dict[str, Any]:
    """Every dotted key with its default as it is written in a file."""
    return {f"{section}.{key}": field.default for section, group in sections().items()
            for key, field in group.model_fields.items()}  # fmt: skip


def as_toml(values: Mapping[str, Any]) -> str:
    """A TOML text of dotted key -> value, grouped by section, each key under its description."""
    lines = []
    for section, group in sections().items():
        lines.append(f"\n[{section}]")
        for key, field in group.model_fields.items():
            if (name := f"{section}.{key}") in values:
                lines += [f"# {field.description}", f"{key} = {_toml_value(values[name])}"]
    return "\n".join(lines).lstrip() + "\n"


def _toml_value(value: object) -> str:
    """TOML's basic strings, numbers, booleans and arrays of these are spelled as in JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)


def private_tmpdir(state_dir: Path) -> Path:
    """Point TMPDIR at a 0700 folder in `state_dir`; call before mlx is first imported.

    mlx loads the kernels it compiled from a predictable path below TMPDIR: in a shared /tmp another user
    could plant a library there. A private folder also keeps compiled kernels over restarts.
    Raises ConfigurationError when the folder is not ours alone.
    """
    folder = _absolute(state_dir) / "tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        # What was checked is what is changed: an open folder cannot be swapped for a link in between.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be used as a private folder: {error.strerror}") from None
    try:
        _make_private(folder, handle)
    finally:
        os.close(handle)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    return folder


def _make_private(folder: Path, handle: int) -> None:
    found, parent = os.fstat(handle), folder.parent.stat()
    if found.st_uid != os.geteuid():
        raise ConfigurationError(f"{folder}: must belong to the user that runs mlxd")
    if parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX:
        raise ConfigurationError(f"{folder.parent}: others may write here and replace {folder.name}; chmod go-w it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.fchmod(handle, 0o700)
