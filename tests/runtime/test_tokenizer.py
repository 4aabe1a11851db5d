"""Text to ids: special tokens, BOS, and files that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.runtime.errors import ManifestError, RequestError, TokenizerError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, sha256_of
from qcompile.runtime.tokenizer import Tokenizer, read_json_file
from tests.tiny_checkpoints import build_tokenizer


def load(directory: Path) -> Tokenizer:
    return Tokenizer(directory, Manifest.load(directory))


def rewrite(directory: Path, name: str, content: bytes | None) -> None:
    """Replace (or drop) an auxiliary file, with the manifest agreeing."""
    record = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    record["files"] = [entry for entry in record["files"] if entry["name"] != name]
    if content is not None:
        path = directory / name
        path.write_bytes(content)
        record["files"].append({"name": name, "size_bytes": len(content), "sha256": sha256_of(path)})
    (directory / MANIFEST_NAME).write_text(json.dumps(record), encoding="utf-8")


def edit_config(directory: Path, **changes: Any) -> None:
    record = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    record.update(changes)
    rewrite(directory, "tokenizer_config.json", json.dumps(record).encode())


def test_ids_are_hugging_faces(model: Path) -> None:
    tokenizer, reference = load(model), build_tokenizer()
    for text in ("Hello  world", "你好<|im_end|>\n", "<tool_call>{}</tool_call>", "a" * 500, " "):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.encode(text, lets_others_run=True) == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.vocab_size == 405
    assert tokenizer.longest_token == max(map(len, reference.get_vocab()))
    assert tokenizer.token_id("<|im_end|>") == 402
    assert tokenizer.token_id("<|nothing|>") is None
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def test_special_tokens_leave_no_text_but_tool_tags_do(model: Path) -> None:
    tokenizer = load(model)
    ids = tokenizer.encode("a<|im_end|><tool_call>")
    assert tokenizer.decode(ids) == "a<tool_call>"


def test_the_bytes_of_a_token(model: Path) -> None:
    tokenizer = load(model)
    ids = tokenizer.encode("é你🎉 x<|im_end|>")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "é你🎉 x<|im_end|>".encode()
    assert tokenizer.token_bytes(1 << 20) == b""


def test_bos_is_put_once_where_the_model_wants_it(own_model: Path) -> None:
    edit_config(own_model, bos_token={"content": "<|endoftext|>", "special": True}, add_bos_token=True)
    tokenizer = load(own_model)
    assert tokenizer.encode("hi") == [400, *build_tokenizer().encode("hi").ids]
    assert tokenizer.encode("hi", add_special_tokens=False) == build_tokenizer().encode("hi").ids
    assert tokenizer.encode("<|endoftext|>hi") == tokenizer.encode("hi")


def test_stray_bytes_are_refused(model: Path) -> None:
    with pytest.raises(RequestError, match="not valid UTF-8: character 2 is the stray byte or surrogate 0xdcff"):
        load(model).encode("ab\udcff")


def test_no_tokenizer(own_model: Path) -> None:
    rewrite(own_model, "tokenizer.json", None)
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        load(own_model)


def test_missing_file(own_model: Path) -> None:
    (own_model / "tokenizer.json").unlink()
    with pytest.raises(ManifestError, match=r"tokenizer\.json: missing"):
        load(own_model)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_tokenizer_that_is_none(own_model: Path, content: bytes) -> None:
    rewrite(own_model, "tokenizer.json", content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        load(own_model)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none(own_model: Path, content: bytes) -> None:
    rewrite(own_model, "tokenizer_config.json", content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: "):
        load(own_model)


def test_a_missing_config_is_an_empty_one(own_model: Path) -> None:
    rewrite(own_model, "tokenizer_config.json", None)
    tokenizer = load(own_model)
    assert tokenizer.special_tokens == {}
    assert not tokenizer.has_chat_template
    assert read_json_file(own_model, Manifest.load(own_model), "tokenizer_config.json") == {}
    with pytest.raises(TokenizerError, match=r"no chat template .a base model"):
        _ = tokenizer.chat_template


def test_where_the_chat_template_comes_from(own_model: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]
    edit_config(own_model, chat_template=named)
    assert load(own_model).chat_template.render([{"role": "user", "content": "x"}]) == "named"
    rewrite(own_model, "chat_template.jinja", b"file")
    assert load(own_model).chat_template.render([{"role": "user", "content": "x"}]) == "file"
    rewrite(own_model, "chat_template.jinja", b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: cannot be read"):
        load(own_model)
