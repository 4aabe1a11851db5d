"""Streaming text: the pieces, joined, are what decoding at once gives, and no piece is half a character."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models

from qcompile.runtime.detokenizer import (
    ByteLevelDetokenizer,
    Detokenizer,
    WindowDetokenizer,
    byte_alphabet,
    piece_bytes,
)
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer
from tests.tiny_checkpoints import build_tokenizer

TOKENIZER = build_tokenizer()
TEXTS = ["Hello, world!", "你好，世界！", "🙂👩‍👩‍👧 ok", "a\u0301b", "\n\n\t x", "Ünïcödé"]


def byte_level() -> Detokenizer:
    return ByteLevelDetokenizer(TOKENIZER.id_to_token, frozenset({400, 401, 402}).__contains__)


def test_the_byte_alphabet() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["Ġ"] == ord(" ")
    assert alphabet["Ċ"] == ord("\n")


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text: str) -> None:
    detokenizer = byte_level()
    pieces = [detokenizer.push(token_id) for token_id in TOKENIZER.encode(text).ids]
    assert "".join(pieces) + detokenizer.flush() == text.replace("a\u0301", "á")
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 420), max_size=40))
def test_any_ids_stream_as_they_decode(ids: list[int]) -> None:
    detokenizer = byte_level()
    streamed = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    assert streamed == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 420), max_size=40))
def test_the_window_agrees_on_valid_text(ids: list[int]) -> None:
    """The general decoder gives the same text; where bytes are broken it may differ only in U+FFFD."""
    window = WindowDetokenizer(lambda part: TOKENIZER.decode(part, skip_special_tokens=True))
    streamed = "".join(window.push(token_id) for token_id in ids) + window.flush()
    assert streamed.replace("\ufffd", "") == TOKENIZER.decode(ids).replace("\ufffd", "")


@pytest.mark.parametrize("text", TEXTS)
def test_the_window_never_shows_half_a_character(text: str) -> None:
    window = WindowDetokenizer(TOKENIZER.decode)
    pieces = [window.push(token_id) for token_id in TOKENIZER.encode(text).ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + window.flush() == text.replace("a\u0301", "á")


def test_an_unfinished_character_is_held_then_marked() -> None:
    ids = TOKENIZER.encode("🙂").ids
    assert len(ids) > 1
    detokenizer = byte_level()
    assert [detokenizer.push(token_id) for token_id in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_and_ids_without_a_token_leave_no_text() -> None:
    detokenizer = byte_level()
    assert "".join(detokenizer.push(token_id) for token_id in (401, 402, 511)) == ""
    shown = ByteLevelDetokenizer(TOKENIZER.id_to_token, frozenset().__contains__)
    assert shown.push(401) == "<|im_start|>"


def test_added_tokens_outside_the_alphabet_are_their_own_text() -> None:
    assert piece_bytes("<｜end▁of▁sentence｜>") == "<｜end▁of▁sentence｜>".encode()
    assert piece_bytes("<think>") == b"<think>"


def test_the_tokenizer_picks_by_its_decoder(model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model, Manifest.load(model))
    assert isinstance(tokenizer.detokenizer(), ByteLevelDetokenizer)
    other = HfTokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    other.decoder = decoders.Metaspace()
    from qcompile.runtime.tokenizer import _is_byte_level

    assert not _is_byte_level(other)
    other.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert _is_byte_level(other)
