"""Model references: the demo model, folders, the hub; and what is refused. No network, no mlx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engine import demo_model, models
from service.engine.models import ModelFiles, resolve
from service.errors import ModelUnavailable
from tests.progress import Recorder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def local(reference: object) -> ModelFiles:
    return resolve(str(reference), state_dir=Path("unused"), offline=True)


def test_demo_means_the_demo_model(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "ensure", lambda state_dir, *, offline, progress: model_folder)
    assert local("demo") == ModelFiles("SmolLM2-135M-Instruct", model_folder)


def test_a_path_may_be_absolute_or_start_with_a_dot_or_a_tilde(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ModelFiles("my-model", model_folder.resolve())
    monkeypatch.chdir(model_folder.parent)
    monkeypatch.setenv("HOME", str(model_folder.parent))
    for reference in (model_folder, "./my-model", "../" + model_folder.parent.name + "/my-model/", "~/my-model"):
        assert local(reference) == expected
    monkeypatch.chdir(model_folder)
    assert local(".") == expected


@pytest.mark.parametrize(
    "reference", ["", "demo2", "a/b/c", "org/../x", "org/.x", "http://x/y", "a b/c", "org/n\n", "-/x"]
)
def test_what_is_neither_is_refused_with_the_three_forms(reference: str) -> None:
    with pytest.raises(ModelUnavailable, match="use 'demo', a hub id like 'org/name', or a path") as caught:
        local(reference)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("reference", ["/no/such/folder", "./no-such", "~no-such-user-here/x", "/a\0b"])
def test_a_missing_or_odd_path_is_refused(reference: str) -> None:
    with pytest.raises(ModelUnavailable, match="check"):
        local(reference)


def test_a_folder_needs_a_config_and_safetensors_and_pickles_do_not_count(model_folder: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"lacks model\*.safetensors.*pickled"):
        local(model_folder)
    (model_folder / "config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        local(model_folder)


def test_a_missing_shard_is_named(model_folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelUnavailable, match=r"lacks model-00002-of-00002\.safetensors"):
        local(model_folder)


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(model_folder: Path, text: str) -> None:
    (model_folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelUnavailable, match="download the model again"):
        local(model_folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "llama", "model_file": "evil.py"}),
        ("config.json", {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", None]}),
    ],
)
def test_a_folder_that_wants_its_own_code_run_is_refused(
    model_folder: Path, file: str, content: dict[str, object]
) -> None:
    (model_folder / "evil.py").write_text("raise SystemExit('this must never run')")
    (model_folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelUnavailable, match="asks to run Python code of its own"):
        local(model_folder)


# --- the hub ---


def test_an_uncached_hub_id_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="org/name is not complete in the local hub cache: start once with"):
        local("org/name")


def hub(monkeypatch: pytest.MonkeyPatch, result: Path | BaseException, calls: list[dict[str, Any]]) -> None:
    import huggingface_hub

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository} | options)
        if isinstance(result, BaseException):
            raise result
        bar = options["tqdm_class"](total=10, desc="Downloading bytes: ", name="huggingface_hub.snapshot_download")
        bar.update(4)
        bar.refresh()
        bar.close()
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_hub_snapshot_never_fetches_code_or_pickles(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils._paths import filter_repo_objects

    calls: list[dict[str, Any]] = []
    hub(monkeypatch, model_folder, calls)
    recorder = Recorder()
    assert resolve("org/name", state_dir=Path("unused"), offline=False).path == model_folder
    files = resolve("org/name", state_dir=Path("unused"), offline=False, progress=recorder)
    assert files == ModelFiles("org/name", model_folder)
    assert ("Downloading bytes", 4, 10) in recorder.steps
    assert calls[0]["local_files_only"] is False
    wanted = ["config.json", "model-1-of-2.safetensors", "chat_template.jinja", "merges.txt", "tokenizer.model"]
    unwanted = ["modeling_x.py", "a/b.py", "pytorch_model.bin", "model.pt", "model.pth", "x.pkl", "x.ckpt"]
    assert list(filter_repo_objects(wanted + unwanted, allow_patterns=calls[0]["allow_patterns"])) == wanted
    assert capfd.readouterr() == ("", "")


def test_a_hub_model_with_its_own_code_is_refused_too(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_folder / "config.json").write_text('{"model_file": "evil.py"}')
    hub(monkeypatch, model_folder, [])
    with pytest.raises(ModelUnavailable, match="Python code of its own"):
        local("org/name")


def test_trouble_with_the_hub_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    response = httpx2.Response(401, request=httpx2.Request("GET", "https://hub.invalid/x"))
    troubles: list[tuple[BaseException, str]] = [
        (GatedRepoError("gated", response=response), "is gated: accept its terms"),
        (RepositoryNotFoundError("none", response=response), "has no model org/name, or it is private"),
        (LocalEntryNotFoundError("Got: ConnectError"), "check the connection to the hub"),
        (httpx2.ReadTimeout(""), r"could not be downloaded \(ReadTimeout\)"),
        (OSError("disk\nfull"), r"could not be downloaded \(disk\)"),
    ]
    for error, words in troubles:
        hub(monkeypatch, error, [])
        with pytest.raises(ModelUnavailable, match=words):
            resolve("org/name", state_dir=Path("unused"), offline=False)


def test_the_rich_bars_draw_on_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    with models.rich_progress() as progress:
        progress.advance("download", 1, 0)
        progress.advance("download", 5, 10)
        progress.advance("convert", 3, 3)
    out, err = capfd.readouterr()
    assert out == ""
    assert "download" in err
    assert "convert" in err
