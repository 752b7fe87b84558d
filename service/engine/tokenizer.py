"""Text to tokens and back: chat template, encode, incremental detokeniser, stop strings across deltas.

`Tokenizer` is immutable after construction and may be used from any thread; a `TextStream` belongs to the
generation thread. Nothing here imports mlx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from service.errors import InvalidRequest, ModelUnavailable

SHORT = 1024
"""Characters of a prompt up to which it may be encoded on the event loop: a quarter of a millisecond."""


class ChatTemplate(Protocol):
    """What a conversation is rendered with; transformers' tokenizers have it."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


class Tokenizer:
    """A model's tokenizer with its chat template.

    `fast` does the work; `special` are the texts of its control tokens, `bos` the start token's text (if
    any), `template` renders conversations (None: the model has no chat template).
    """

    def __init__(
        self, fast: FastTokenizer, *, special: Sequence[str], bos: str | None, template: ChatTemplate | None
    ) -> None:
        self.fast = fast
        self._bos = bos
        self._template = template
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._plain = FastTokenizer.from_str(fast.to_str())
        self._plain.encode_special_tokens = True
        self.byte_level = str(fast.decoder).startswith("ByteLevel(")
        self.longest_token = max((len(token) for token in fast.get_vocab()), default=1)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read the tokenizer of an MLX model folder, without remote code. Raises ModelUnavailable."""
        from transformers import AutoTokenizer  # noqa: PLC0415  seconds to import, and only the engine needs it

        try:
            loaded: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{folder}: the tokenizer cannot be loaded: {error}") from error
        fast = getattr(loaded, "backend_tokenizer", None)
        if fast is None:
            raise ModelUnavailable(f"{folder}: needs a fast tokenizer (tokenizer.json)")
        tokenizer = cls(
            fast,
            special=loaded.all_special_tokens
            + [t.content for t in fast.get_added_tokens_decoder().values() if t.special],
            bos=loaded.bos_token,
            template=loaded if loaded.chat_template else None,
        )
        # The first use compiles the template, 5 ms, and the first long text has memory to get, 1 ms or 2: no request is
        # to wait for that. The template may want another conversation.
        tokenizer.encode("made up " * SHORT)
        with suppress(InvalidRequest, TypeError, ValueError, LookupError, AttributeError):
            tokenizer.encode_chat([{"role": "user", "content": "?"}])
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Tokens of a raw prompt, with the start token where the model's tokenizer adds one.

        Control tokens written in the text count as such: a raw prompt is entirely the client's own.
        May take seconds for a megabyte: call it off the event loop unless the text is `SHORT`.
        """
        return _encoded(self.fast, text, add_special=self._bos is None or not text.startswith(self._bos))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation rendered by the model's template, ready for the assistant's turn.

        Each message is {"role": str, "content": str}. Control tokens written inside a content stay plain
        text, so a client cannot forge a role. Raises InvalidRequest when there is no template or it refuses.
        """
        if self._template is None:
            raise InvalidRequest("This model has no chat template; send a raw prompt.", param="messages")
        shielded: list[str] = []

        def shield(match: re.Match[str]) -> str:
            shielded.append(match[0])
            return f"\0{len(shielded) - 1}\0"

        # NUL cannot occur in a request (service/api/body.py refuses it), so it marks the spots safely.
        conversation = [{**m, "content": self._special.sub(shield, m["content"])} for m in messages]
        try:
            rendered = self._template.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return self._encode_shielded(rendered, shielded)

    def _encode_shielded(self, rendered: str, shielded: Sequence[str]) -> list[int]:
        """Encode template text with control tokens, and the shielded spots without."""
        tokens: list[int] = []
        for index, piece in enumerate(rendered.split("\0")):
            fast, text = (self._plain, shielded[int(piece)]) if index % 2 else (self.fast, piece)
            if text:
                tokens += _encoded(fast, text, add_special=False)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a whole sequence, control tokens included."""
        return self.fast.decode(list(tokens), skip_special_tokens=False)

    def at_least(self, text: str) -> int:
        """A lower bound of the tokens of `text`, in constant time."""
        return len(text) // self.longest_token


class TextStream:
    """One row's tokens as text: whole characters only, cut at the first stop string.

    What could be the beginning of a stop string is held back until it is known not to be one.
    `trim_space` drops one space that a byte-level text begins with, as mlx-lm's `generate` does.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, trim_space: bool = False) -> None:
        self._tokenizer = tokenizer
        self._trim = trim_space and tokenizer.byte_level
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._undecoded: list[int] = []
        self._held = ""
        self._stop = tuple(filter(None, stop))

    def add(self, token: int) -> tuple[str, bool]:
        """Take one token; returns (text now certain, whether a stop string was reached)."""
        self._undecoded.append(token)
        chunk = self._decoder.step(self._tokenizer.fast, token)
        if chunk is None:
            return "", False
        self._undecoded.clear()
        return self._filter(chunk)

    def finish(self) -> tuple[str, bool]:
        """No token follows; returns (the rest of the text, whether a stop string was reached in it)."""
        rest = self._tokenizer.decode(self._undecoded) if self._undecoded else ""
        self._undecoded.clear()
        text, stopped = self._filter(rest)
        held, self._held = self._held, ""
        return text + held, stopped

    def _filter(self, chunk: str) -> tuple[str, bool]:
        if self._trim and chunk:
            chunk, self._trim = chunk.removeprefix(" "), False
        if not self._stop:
            return chunk, False
        text = self._held + chunk
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _encoded(fast: FastTokenizer, text: str, *, add_special: bool) -> list[int]:
    """Tokens of a text. A batch lets others have the interpreter, and then may wait for it longer than it encodes."""
    if len(text) <= 2 * SHORT:  # a short prompt in its template
        return list(fast.encode(text, add_special_tokens=add_special).ids)
    return list(fast.encode_batch([text], add_special_tokens=add_special)[0].ids)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
