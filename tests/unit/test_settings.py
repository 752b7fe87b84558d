"""Layers, refusals and the private TMPDIR; and that the files under config/ say what the code says."""

import itertools
import os
import stat
import tempfile
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from service import settings as module
from service.settings import ConfigurationError, Settings, as_toml, keys, private_tmpdir, sections
from tests.conftest import ROOT

CONFIG = ROOT / "config"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text("[server]\nport = 1111\n\n[model]\naliases = ['a', 'b']\n")
    return path


def refusal(config: Path | None = None, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(config, overrides)
    return str(caught.value)


def test_each_layer_is_stronger_than_the_one_below(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.with_name("default.toml").write_text("[server]\nport = 2222\nbacklog = 77\n")
    assert Settings.load().server.port == 8000
    loaded = Settings.load(file)
    assert (loaded.server.port, loaded.server.backlog, loaded.model.aliases) == (1111, 77, ("a", "b"))
    monkeypatch.setenv("MLXD_SERVER__PORT", "3333")
    assert Settings.load(file).server.port == 3333
    assert Settings.load(file, {"server.port": 4444}).server.port == 4444
    assert Settings.load(file, {"server.port": 4444}).server.backlog == 77


def test_a_list_in_the_environment_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_MODEL__ALIASES", '["x", "y"]')
    assert Settings.load().model.aliases == ("x", "y")


def test_an_unknown_key_in_a_file_is_named_with_a_near_one(file: Path) -> None:
    file.write_text("[server]\nprot = 1\n")
    assert refusal(file) == "server.prot: unknown key; did you mean server.port?"


def test_an_unknown_key_like_no_other_is_named(file: Path) -> None:
    file.write_text("[http]\nzzz = 1\n")
    assert refusal(file) == "http.zzz: unknown key"


def test_an_unknown_section_in_a_file_is_named(file: Path) -> None:
    file.write_text("[sever]\nport = 1\n")
    assert refusal(file).startswith("sever: unknown key")


def test_a_section_that_is_no_table_is_named(file: Path) -> None:
    file.write_text("server = 3\n")
    assert refusal(file).startswith("server: ")


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_SERVER__PROT", "1")
    assert refusal() == "server.prot: unknown key; did you mean server.port?"
    monkeypatch.delenv("MLXD_SERVER__PROT")
    monkeypatch.setenv("MLXD_SEVER__PORT", "1")
    assert refusal() == "environment variable MLXD_SEVER__PORT: no such section"


def test_a_variable_that_cannot_be_parsed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXD_MODEL__ALIASES", "[")
    assert "aliases" in refusal() or "model" in refusal()


def test_every_problem_has_its_line_and_no_line_has_the_value() -> None:
    text = refusal(None, {"server.port": "hunter2", "engine.max_rows": 0, "http.head_timeout": float("inf")})
    assert sorted(line.split(":")[0] for line in text.splitlines()) == [
        "engine.max_rows",
        "http.head_timeout",
        "server.port",
    ]
    assert "hunter2" not in text


def test_bad_toml_is_refused_with_its_place(file: Path) -> None:
    file.write_text("[server\n")
    assert str(file) in refusal(file)
    assert "line 1" in refusal(file)


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refusal(file)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").endswith("cannot be read: No such file or directory")
    assert "cannot be read" in refusal(tmp_path)


def test_relative_paths_in_a_file_are_relative_to_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("[server]\nstate_dir = '../state'\n\n[model]\nreference = './weights'\n")
    monkeypatch.chdir("/")
    loaded = Settings.load(file)
    assert loaded.server.state_dir == file.parent.parent / "state"
    assert loaded.model.reference == str(file.parent / "weights")


def test_a_hub_id_in_a_file_is_no_path(file: Path) -> None:
    file.write_text("[model]\nreference = 'mlx-community/Some-Model'\n")
    assert Settings.load(file).model.reference == "mlx-community/Some-Model"


def test_home_is_expanded_everywhere(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings.load().server.state_dir == tmp_path / ".local/state/mlxd"
    file.write_text("[server]\nstate_dir = '~/mine'\n")
    assert Settings.load(file).server.state_dir == tmp_path / "mine"
    monkeypatch.setenv("MLXD_SERVER__STATE_DIR", "~/other")
    assert Settings.load(file).server.state_dir == tmp_path / "other"


def test_no_dot_env_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MLXD_SERVER__PORT=5555\n")
    monkeypatch.chdir(tmp_path)
    assert Settings.load().server.port == 8000


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_host_beyond_loopback_needs_authentication_and_tls_or_a_proxy(host: str, tmp_path: Path) -> None:
    tls = {"server.tls_certificate": tmp_path / "c", "server.tls_key": tmp_path / "k"}
    proxy = {"server.trusted_proxies": ["10.0.0.0/8"]}
    assert refusal(None, {"server.host": host}).startswith("server.host: beyond loopback give server.tls_certificate")
    for safe in (tls, proxy):
        assert Settings.load(None, {"server.host": host, **safe}).server.host == host
        assert "auth.enabled must be true" in refusal(None, {"server.host": host, "auth.enabled": False, **safe})
        text = refusal(None, {"server.host": host, "auth.development_key": True, **safe})
        assert text == "auth.development_key: for loopback addresses only"


def test_half_of_a_certificate_is_refused(tmp_path: Path) -> None:
    assert "need each other" in refusal(None, {"server.tls_certificate": tmp_path / "c"})


def test_a_proxy_network_must_be_one() -> None:
    assert refusal(None, {"server.trusted_proxies": ["10.0.0.1/8"]}).startswith("server.trusted_proxies.0: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_hosts_are_accepted(host: str) -> None:
    assert Settings.load(None, {"server.host": host}).server.host == host


def test_settings_cannot_be_changed() -> None:
    loaded = Settings.load()
    with pytest.raises(ValidationError):
        loaded.server.port = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        loaded.server = loaded.server  # type: ignore[misc]


def test_the_default_file_is_the_code_word_for_word() -> None:
    text = (CONFIG / "default.toml").read_text("utf-8")
    assert text.partition("\n\n")[2] == as_toml(keys()), "regenerate: as_toml(keys()) under the file's heading"
    assert Settings.load(CONFIG / "default.toml") == Settings.load()


def test_every_key_of_the_default_file_has_a_comment() -> None:
    lines = (CONFIG / "default.toml").read_text("utf-8").splitlines()
    bare = [line for before, line in itertools.pairwise(lines) if " = " in line and before[:2] != "# "]
    assert bare == []


@pytest.mark.parametrize("name", ["development", "production"])
def test_the_other_files_hold_differences_only(name: str) -> None:
    path = CONFIG / f"{name}.toml"
    Settings.load(path)
    given = tomllib.loads(path.read_text("utf-8"))
    differences = {f"{section}.{key}": value for section, group in given.items() for key, value in group.items()}
    assert {key: value for key, value in differences.items() if keys()[key] == value} == {}


def test_development_keeps_its_state_in_the_checkout() -> None:
    loaded = Settings.load(CONFIG / "development.toml")
    assert loaded.server.state_dir == ROOT / ".state"
    assert loaded.model.reference == "demo"


def test_the_documentation_has_every_key_with_its_default_and_meaning() -> None:
    documented = (ROOT / "docs/configuration.md").read_text("utf-8").splitlines()
    rows = [
        f"| `{section}.{key}` | `{module._toml_value(keys()[f'{section}.{key}'])}` | {field.description} |"
        for section, group in sections().items()
        for key, field in group.model_fields.items()
    ]
    assert [line for line in documented if line.startswith("| `") and "." in line.split("`")[1]] == rows


def test_what_is_shown_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(as_toml({"server.host": "::1", "model.aliases": ['a"\\é', "b"], "engine.step_target": 0.5}))
    loaded = Settings.load(path)
    assert (loaded.server.host, loaded.model.aliases, loaded.engine.step_target) == ("::1", ('a"\\é', "b"), 0.5)


@pytest.fixture
def _tmpdir_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())


pytestmark = pytest.mark.usefixtures("_tmpdir_restored")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tmpdir_becomes_a_private_folder_of_the_state_folder(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    folder = private_tmpdir(state)
    assert folder == state / "tmp"
    assert (mode(folder), mode(state)) == (0o700, 0o700)
    assert (os.environ["TMPDIR"], tempfile.gettempdir()) == (str(folder), str(folder))
    assert private_tmpdir(state) == folder


def test_a_tmpdir_that_is_too_open_is_closed(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir(mode=0o755)
    assert mode(private_tmpdir(tmp_path)) == 0o700


def test_a_tmpdir_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="private folder"):
        private_tmpdir(tmp_path)


def test_a_tmpdir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tmp").write_text("")
    with pytest.raises(ConfigurationError, match="private folder"):
        private_tmpdir(tmp_path)


def test_a_tmpdir_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigurationError, match="must belong to the user"):
        private_tmpdir(tmp_path)


def test_a_state_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigurationError, match="others may write here"):
        private_tmpdir(tmp_path)
    tmp_path.chmod(0o1777)
    private_tmpdir(tmp_path)
