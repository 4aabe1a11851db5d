"""The texts that models are compared on: the built-in set, or a file of the user's.

A file is UTF-8 text (one document) or .jsonl with one document a line: a string, or an object with

    text      plain text
    prompt    plain text too; an `answer` or `completion` beside it is appended
    messages  a conversation, rendered through the model's chat template
    ids       token ids as they are

and optionally `group` (or `type`, `kind`), by which the report also sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qcompile.errors import QualityError, RuntimeFault
from qcompile.text_file import DOCUMENT_FORMS, decode_utf8, is_json_lines, json_lines, read_bounded

MAX_FILE_BYTES = 64 << 20
_GROUP_KEYS = ("group", "type", "kind")
_TAIL_KEYS = ("answer", "completion")
BUILT_IN = ("english", "chinese", "code", "arithmetic")
# Questions whose answers are compared token by token: one of each kind, in the words of a user.
PROMPTS = (
    ("english", "Explain in three sentences why the sky is blue at noon and red in the evening."),
    ("chinese", "请用三句话介绍一下什么是编译器，并举一个例子。"),
    ("code", "Write a Python function that returns the n-th Fibonacci number without recursion."),
    (
        "arithmetic",
        "A train leaves at 9:25 and travels 3 hours and 50 minutes. When does it arrive? Think step by step.",
    ),
)


@dataclass(frozen=True)
class Document:
    """One text before it is tokenized; exactly one of `text`, `messages`, `ids` is set.

    Attributes:
        group: What the report sums it up under.
        where: File and line, for messages.
    """

    group: str
    where: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenizedDocument:
    """One text as token ids."""

    group: str
    ids: tuple[int, ...]


def built_in_documents() -> list[Document]:
    """Return the four texts of the package: English, Chinese, code, arithmetic."""
    directory = resources.files("qcompile.quality") / "texts"
    return [
        Document(name, f"built-in {name}", text=(directory / f"{name}.txt").read_text(encoding="utf-8"))
        for name in BUILT_IN
    ]


def read_documents(path: Path, *, with_answers: bool = True) -> list[Document]:
    """Read a file of the user's.

    Args:
        path: Text or .jsonl.
        with_answers: Append an `answer` to its `prompt`.

    Raises:
        QualityError: It cannot be read, is empty, too large, not UTF-8 or named .json, or a line of a .jsonl is no document.
    """
    content = read_bounded(path, MAX_FILE_BYTES, "cut a sample from it", QualityError)
    text = decode_utf8(content, str(path), QualityError)
    if not text.strip():
        raise QualityError(f"{path}: is empty; give a text, or .jsonl with one document per line")
    if not is_json_lines(path, QualityError):
        return [Document(path.name, str(path), text=text)]
    return [
        _document(record, path.name, where, with_answers=with_answers)
        for where, record in json_lines(text, path, QualityError)
    ]


def tokenize(
    documents: Sequence[Document],
    encode: Callable[[str], Sequence[int]],
    render_chat: Callable[[Sequence[dict[str, Any]]], Sequence[int]],
    vocab_size: int,
    minimum: int = 2,
) -> list[TokenizedDocument]:
    """Turn documents into token ids.

    Args:
        documents: What was read.
        encode: Text to ids.
        render_chat: A conversation to ids, through the chat template.
        vocab_size: Ids must lie below.
        minimum: Tokens that at least one document must have.

    Raises:
        QualityError: No document has that many tokens, or an id is not of this vocabulary.
    """
    tokenized = []
    for document in documents:
        if document.ids is not None:
            ids = document.ids
        elif document.messages is not None:
            ids = tuple(_told(document.where, render_chat, document.messages))
        else:
            ids = tuple(_told(document.where, encode, document.text or ""))
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise QualityError(
                f"{document.where}: token id {wrong}, the models have {vocab_size}; the tokenizer is not theirs"
            )
        tokenized.append(TokenizedDocument(document.group, ids))
    if not any(len(d.ids) >= minimum for d in tokenized):
        raise QualityError(f"{documents[0].where}: less than {minimum} tokens; give more text")
    return tokenized


def _told(where: str, function: Callable[[Any], Sequence[int]], content: Any) -> Sequence[int]:
    """Call a tokenizer; what it refuses is told with the place it came from."""
    try:
        return function(content)
    except RuntimeFault as error:
        raise QualityError(f"{where}: {error}") from error


def _document(record: Any, default_group: str, where: str, *, with_answers: bool) -> Document:
    if isinstance(record, str):
        return Document(default_group, where, text=record)
    if not isinstance(record, dict):
        raise QualityError(f'{where}: a string or an object like {{"text": ...}} is wanted')
    group = next((record[k] for k in _GROUP_KEYS if isinstance(record.get(k), str)), default_group)
    if isinstance(record.get("text"), str):
        return Document(group, where, text=record["text"])
    if isinstance(record.get("prompt"), str):
        tail = next((record[k] for k in _TAIL_KEYS if with_answers and isinstance(record.get(k), str)), "")
        return Document(group, where, text=f"{record['prompt']}\n{tail}" if tail else record["prompt"])
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return Document(group, where, messages=tuple(messages))
    ids = record.get("ids")
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        return Document(group, where, ids=tuple(ids))
    wrong = next((key for key in DOCUMENT_FORMS if key in record), None)
    if wrong is not None:
        raise QualityError(f"{where}: '{wrong}' is not {DOCUMENT_FORMS[wrong]}")
    raise QualityError(f"{where}: no 'text', 'prompt', 'messages' or 'ids' in it")
