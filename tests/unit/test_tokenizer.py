"""Tokenizer and text stream: whole characters, stop strings across tokens, and no forged control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from jinja2 import Environment, TemplateError

from service.engine.tokenizer import SHORT, TextStream, Tokenizer
from service.errors import InvalidRequest, ModelUnavailable
from tests.byte_tokens import CONTROL_TOKENS, byte_tokenizer
from tests.fakes import fake_tokenizer
from tests.tiny import write_tokenizer

TOKENIZER = fake_tokenizer()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer.load(folder)


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """Feed `text` byte by byte; returns (the pieces, whether it stopped)."""
    reader = TextStream(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text):
        piece, stopped = reader.add(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = reader.finish()
    return [*pieces, piece], stopped


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_pieces_are_the_text_and_no_piece_breaks_a_character(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == text
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


@given(
    st.text(alphabet="ab🙂é", max_size=30),
    st.lists(st.text(alphabet="ab🙂é", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_a_stop_string_cuts_at_its_first_occurrence(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(text, tuple(stops))
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    said = "".join(pieces)
    assert text.startswith(said)
    if not ends:
        assert said == text
    else:
        # The stream stops at the first stop string to be complete, which need not be the first to begin.
        assert not any(stop in said for stop in stops)
        assert len(said) >= min(ends)


@pytest.mark.parametrize(("text", "trimmed"), [(" a b", "a b"), ("  a", " a"), ("a b", "a b"), (" ", "")])
def test_one_leading_space_may_be_trimmed(text: str, trimmed: str) -> None:
    reader = TextStream(TOKENIZER, trim_space=True)
    assert "".join(reader.add(token)[0] for token in TOKENIZER.encode(text)) == trimmed


def test_text_that_only_begins_like_a_stop_string_is_held_back_and_then_delivered() -> None:
    pieces, stopped = stream("xEN END", ("END",))
    assert ("".join(pieces), stopped) == ("xEN ", True)
    assert "E" not in pieces[0] + pieces[1]


@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_a_control_token_in_a_content_is_plain_text(chat: Tokenizer, control: str) -> None:
    honest = chat.encode_chat([{"role": "user", "content": "hello"}])
    forged = chat.encode_chat([{"role": "user", "content": f"hel{control}lo"}])
    identifier = CONTROL_TOKENS.index(control)
    assert forged.count(identifier) == honest.count(identifier)
    assert f"hel{control}lo" in chat.decode(forged)


def test_a_raw_prompt_may_use_control_tokens() -> None:
    assert TOKENIZER.encode("<|im_start|>a")[0] == CONTROL_TOKENS.index("<|im_start|>")


def test_a_conversation_is_rendered_for_the_assistants_turn(chat: Tokenizer) -> None:
    tokens = chat.encode_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.decode(tokens) == expected


def test_the_first_conversation_does_not_wait_for_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled when the tokenizer is loaded: 3 to 5 ms, which were a quarter of a first token's time on a GPU."""
    compiled: list[object] = []
    compile_template = Environment.compile

    def watched(self: Environment, *args: Any, **options: Any) -> Any:
        compiled.append(args)
        return compile_template(self, *args, **options)

    monkeypatch.setattr(Environment, "compile", watched)
    write_tokenizer(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}" + tmp_path.name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert len(compiled) == 1
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert len(compiled) == 1


def test_the_first_long_text_does_not_wait_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is encoded when the tokenizer is loaded, with a template or without: the first took 1.6 times as long."""
    encoded: list[int] = []
    encode = Tokenizer.encode

    def watched(self: Tokenizer, text: str) -> list[int]:
        encoded.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    write_tokenizer(tmp_path, template=None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    Tokenizer.load(tmp_path)
    assert max(encoded) >= 8 * SHORT


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (None, InvalidRequest),
        ("{{ raise_exception('no conversation without a system') }}", InvalidRequest),
        ("{{ 1 + messages[0].content }}", TypeError),
        ("{% endfor %}", InvalidRequest),
    ],
)
def test_a_model_is_loaded_whatever_its_template_says(
    tmp_path: Path, template: str | None, error: type[Exception]
) -> None:
    write_tokenizer(tmp_path, template=template)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hello")
    with pytest.raises(error):
        tokenizer.encode_chat([{"role": "user", "content": "hello"}])


def test_a_model_without_a_template_refuses_conversations() -> None:
    assert not TOKENIZER.has_chat_template
    with pytest.raises(InvalidRequest, match="template"):
        TOKENIZER.encode_chat([{"role": "user", "content": "Hi"}])


def test_a_template_that_refuses_is_the_clients_error() -> None:
    class Strict:
        def apply_chat_template(self, conversation: list[dict[str, Any]], **_: Any) -> str:
            raise TemplateError("roles must alternate")

    tokenizer = Tokenizer(byte_tokenizer(), special=CONTROL_TOKENS, bos=None, template=Strict())
    with pytest.raises(InvalidRequest, match="alternate"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


def test_a_lower_bound_of_tokens_is_one() -> None:
    text = "hello world" * 10
    assert 0 < TOKENIZER.at_least(text) <= len(TOKENIZER.encode(text))


def test_a_folder_without_a_tokenizer_is_the_operators_problem(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="tokenizer"):
        Tokenizer.load(tmp_path)
