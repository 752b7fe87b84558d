"""Configuration: frozen groups, read once, in layers. The only reader (and writer) of `os.environ`.

Precedence, strongest first: command line, environment (`MLXD_SECTION__KEY`), the file given by `--config`,
`default.toml` beside it, the defaults below (a test keeps `config/default.toml` equal to them).
An unknown key anywhere is an error. A relative path in a file is relative to that file's folder, elsewhere to
the working directory.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from service.settings.base import Group, SecretSetting, secret_settings
from service.settings.cuda import prefer_for_cuda
from service.settings.groups import (
    AuthSettings,
    EngineSettings,
    HttpSettings,
    LogSettings,
    MetricsSettings,
    ModelSettings,
    OpsSettings,
    ServerSettings,
    StorageSettings,
    WatchdogSettings,
    is_loopback,
)
from service.settings.issuers import IssuerSettings
from service.settings.plans import LimitsSettings, PlanError, PlanSettings
from service.settings.private import ConfigurationError, private_tmpdir, read_private, write_private
from service.settings.supervised import SupervisedSettings
from service.settings.tracing import TracingSettings, forget_outside_telemetry

__all__ = [
    "AuthSettings",
    "ConfigurationError",
    "EngineSettings",
    "Group",
    "HttpSettings",
    "IssuerSettings",
    "LimitsSettings",
    "LogSettings",
    "MetricsSettings",
    "ModelSettings",
    "OpsSettings",
    "PlanError",
    "PlanSettings",
    "SecretSetting",
    "ServerSettings",
    "Settings",
    "StorageSettings",
    "SupervisedSettings",
    "TracingSettings",
    "WatchdogSettings",
    "forget_outside_telemetry",
    "is_loopback",
    "prefer_for_cuda",
    "private_tmpdir",
    "read_private",
    "secret_settings",
    "write_private",
]

ENV_PREFIX = "MLXD_"


class Settings(BaseSettings):
    """The whole configuration. Immutable; built by `load`, passed down, never global."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_nested_delimiter="__", protected_namespaces=()
    )

    server: ServerSettings = Field(default_factory=ServerSettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    watchdog: WatchdogSettings = Field(default_factory=WatchdogSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)
    limits: LimitsSettings = Field(default_factory=LimitsSettings)
    ops: OpsSettings = Field(default_factory=OpsSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
    tracing: TracingSettings = Field(default_factory=TracingSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    supervised: SupervisedSettings = Field(default_factory=SupervisedSettings)

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        for key, loopback in (("server.host", self.server.loopback), ("ops.bind", self.ops.loopback)):
            if loopback:
                continue
            if not self.auth.enabled:
                raise ValueError(f"{key}: beyond loopback auth.enabled must be true")
            if self.auth.development_key:
                raise ValueError("auth.development_key: for loopback addresses only")
            if self.server.tls_certificate is None and not self.server.trusted_proxies:
                raise ValueError(
                    f"{key}: beyond loopback give server.tls_certificate and server.tls_key, or "
                    "server.trusted_proxies when a proxy in front has them"
                )
        return self

    @model_validator(mode="after")
    def _two_addresses(self) -> Self:
        if self.server.port and self.ops.address == (self.server.host, self.server.port):
            raise ValueError("ops.bind: is the address of server.host and server.port; give it another port")
        return self

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

    @classmethod
    def state_dir_of(cls, config: Path | None = None) -> Path:
        """`server.state_dir` of layers that need not be usable otherwise: where to tell that they are not.

        What cannot be read at all counts as absent, so that the default may be the answer. Raises nothing.
        """
        found: object = None
        files = [] if config is None else [config.with_name("default.toml"), config]
        for read in (*(partial(_read_toml, file) for file in files), partial(_environment, cls)):
            with contextlib.suppress(ConfigurationError):
                server = read().get("server")
                found = server.get("state_dir", found) if isinstance(server, Mapping) else found
        try:
            return ServerSettings.model_validate({} if found is None else {"state_dir": found}).state_dir
        except ValidationError:
            return ServerSettings().state_dir


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
    for name, group in sections().items():
        _anchor(data.get(name), group, path.parent)
    return data


def _anchor(section: object, group: type[Group], folder: Path) -> None:
    """Make the paths of a section absolute in place; `model.reference` only when it can be nothing else.

    A list of tables, such as `[[auth.issuers]]`, is a list of sections.
    """
    if not isinstance(section, dict):
        return
    for key, field in group.model_fields.items():
        value = section.get(key)
        if isinstance(value, list):
            for inner in (each for each in get_args(field.annotation) if isinstance(each, type)):
                for table in value if issubclass(inner, Group) else ():
                    _anchor(table, inner, folder)
        if not isinstance(value, str) or not value:
            continue
        if "Path" in str(field.annotation) or (key == "reference" and value.startswith(("./", "../", "~/"))):
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
        message = problem["msg"].removeprefix("Value error, ")
        if not problem["loc"]:  # a rule between sections names its key itself
            lines.append(message)
            continue
        key = ".".join(map(str, problem["loc"]))
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
        if any(name.startswith(f"{section}.") for name in values):
            lines.append(f"\n[{section}]")
        for key, field in group.model_fields.items():
            if (name := f"{section}.{key}") in values:
                lines += [f"# {field.description}", f"{key} = {_toml_value(values[name])}"]
    return "\n".join(lines).lstrip() + "\n"


def _toml_value(value: object) -> str:
    """TOML's basic strings, numbers and booleans are spelled as in JSON; it has no null, so None is empty."""
    if value is None:
        return '""'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)
