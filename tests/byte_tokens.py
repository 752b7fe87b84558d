"""The tokenizer of the tests' models: it needs neither mlx nor transformers, which take seconds to import."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer() -> Tokenizer:
    """One token a byte, after the control tokens: every text and every split of a character can occur."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index + len(CONTROL_TOKENS) for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab={**dict(zip(CONTROL_TOKENS, range(3), strict=True)), **vocab}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
