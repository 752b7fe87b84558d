"""The section `supervised`, and where the state of a configuration is that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import ConfigurationError, ServerSettings, Settings
from service.supervision.starts import KEPT


@pytest.mark.parametrize("given", ["auto", "off", "/var/lock/mlxd/engine.lock"])
def test_the_host_lock_is_a_word_or_a_path(given: str) -> None:
    assert Settings.load(None, {"supervised.host_lock": given}).supervised.host_lock == given


@pytest.mark.parametrize("given", ["", "on", "engine.lock", "./engine.lock"])
def test_anything_else_is_refused(given: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^supervised\.host_lock: must be auto, off, or an absolute path$"):
        Settings.load(None, {"supervised.host_lock": given})


def test_as_many_starts_are_kept_as_may_be_asked_for() -> None:
    Settings.load(None, {"supervised.max_failed_starts": 30, "supervised.safe_mode_deaths": 30})
    assert KEPT >= 30
    with pytest.raises(ConfigurationError):
        Settings.load(None, {"supervised.max_failed_starts": 31})


DEFAULT = ServerSettings().state_dir


@pytest.mark.parametrize(
    ("file", "found"),
    [
        ("[server]\nstate_dir = 'state'\nport = 'x'\n", "state"),
        ("[server]\nstate_dir = 'state'\n[sever]\nport = 1\n", "state"),
        ("[server]\nport = 'x'\n", "below"),
        ("[server]\nstate_dir = 5\n", None),
        ("server = 1\n", "below"),
        ("[server\n", "below"),
        (None, "below"),
    ],
)
def test_it_is_where_the_layers_that_can_be_read_say(tmp_path: Path, file: str | None, found: str | None) -> None:
    (tmp_path / "default.toml").write_text("[server]\nstate_dir = 'below'\n")
    if file is not None:
        (tmp_path / "mine.toml").write_text(file)
    expected = DEFAULT if found is None else tmp_path.resolve() / found
    assert Settings.state_dir_of(tmp_path / "mine.toml") == expected


def test_the_environment_is_stronger_and_without_any_layer_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.state_dir_of() == DEFAULT
    monkeypatch.setenv("MLXD_SERVER__STATE_DIR", str(tmp_path))
    monkeypatch.setenv("MLXD_SERVER__PORT", "x")
    assert Settings.state_dir_of() == tmp_path.resolve()
    monkeypatch.setenv("MLXD_SEVER__PORT", "1")
    assert Settings.state_dir_of() == DEFAULT, "an environment that cannot be read counts as absent"
