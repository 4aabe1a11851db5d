"""What a model is calibrated on: a file, or the built-in texts, cut into rows of tokens.

A file is UTF-8: plain text (one document), or .jsonl with one document a line, a string or an object with

    text      plain text
    prompt    a question, put through the model's chat template; an `answer` or `completion` beside it is the reply
    messages  a conversation, put through the chat template
    ids       token numbers as they are

What is longer than a row goes on in the next row; a conversation longer than the model's context is cut there first. When
there is more than was asked for, rows are taken evenly from the whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import QCompileError, QuantError
from qcompile.runtime.tokenizer import Tokenizer
from qcompile.text_file import DOCUMENT_FORMS, decode_utf8, is_json_lines, json_lines, read_bounded

BUILT_IN = "builtin"
MAX_FILE_BYTES = 256 << 20
_CHARS_PER_TOKEN = 8
_FORMS = '"text", "prompt", "messages" or "ids"'


@dataclass(frozen=True)
class CalibrationText:
    """One document; exactly one of `text`, `messages` and `ids` is set.

    Attributes:
        where: File and line, for messages.
    """

    where: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens to run a model on.

    Attributes:
        rows: int64 [S] each.
        source: Where they came from, for the record.
        notes: What was not as asked.
    """

    rows: tuple[npt.NDArray[np.int64], ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(row) for row in self.rows)


def read_texts(path: Path) -> list[CalibrationText]:
    """Read a calibration file.

    Raises:
        QuantError: It cannot be read, is empty, too large, not UTF-8 or named .json, or a line of a .jsonl is no document.
    """
    content = read_bounded(path, MAX_FILE_BYTES, "give a part of it", QuantError)
    text = decode_utf8(content, str(path), QuantError)
    if not text.strip():
        raise QuantError(f"{path}: the calibration file is empty; give a text, or .jsonl with one prompt per line")
    if not is_json_lines(path, QuantError):
        return [CalibrationText(str(path), text=text)]
    return [_document(record, where) for where, record in json_lines(text, path, QuantError)]


def built_in_texts() -> list[CalibrationText]:
    """Return the texts of the package: English, Chinese, code, and arithmetic with its reasoning, in turn."""
    text = (resources.files("qcompile.calibration") / "texts.jsonl").read_text(encoding="utf-8")
    return [_document(json.loads(line), f"built-in text {number}") for number, line in enumerate(text.splitlines(), 1)]


def token_rows(
    texts: Sequence[CalibrationText],
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    row_length: int,
    vocab_size: int,
    context: int,
    source: str,
) -> TokenRows:
    """Tokenize texts and cut them into rows.

    Args:
        texts: What was read.
        tokenizer: The model's.
        num_tokens: Tokens to take, at most.
        row_length: Longest row.
        vocab_size: Token numbers must lie below.
        context: Positions the model has.
        source: Where the texts came from, for the record; fewer tokens than asked for is worth a note unless built in.

    Raises:
        QuantError: A text cannot be tokenized, a token number is not of this vocabulary, or there are no tokens.
    """
    length = min(row_length, context)
    rows: list[list[int]] = []
    num_cut = 0
    for text in texts:
        limit = _CHARS_PER_TOKEN * max(num_tokens, length)
        for tokens in _tokenized(text, tokenizer, limit, length):
            ids = tokens
            wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
            if wrong is not None:
                raise QuantError(f"{text.where}: token {wrong} is not of the model, which has 0 to {vocab_size - 1}")
            if text.text is None and len(ids) > context:
                num_cut += 1
                ids = ids[:context]
            rows += [ids[start : start + length] for start in range(0, len(ids), length)]
    rows = [row for row in rows if row]
    total = sum(map(len, rows))
    if total == 0:
        raise QuantError(f"{source}: there is not one token in the calibration texts")
    notes = []
    if num_cut:
        notes.append(f"{num_cut} conversations longer than the context of {context} tokens were cut there")
    if total < num_tokens and source != BUILT_IN:
        notes.append(f"{source}: {total} tokens, {num_tokens} were asked for; all of them are used")
    taken = tuple(np.array(row, dtype=np.int64) for row in _spread(rows, num_tokens))
    return TokenRows(taken, source, tuple(notes))


def _spread(rows: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Return rows evenly from the whole, until there are as many tokens as asked for; the last one may be cut."""
    total = sum(map(len, rows))
    count = len(rows) if total <= num_tokens else max(1, round(len(rows) * num_tokens / total))
    evenly = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    taken = []
    left = num_tokens
    for index in dict.fromkeys([*evenly, *range(len(rows))]):
        row = rows[index][:left]
        if row:
            taken.append(row)
        left -= len(row)
    return taken


def _tokenized(text: CalibrationText, tokenizer: Tokenizer, limit: int, length: int) -> list[list[int]]:
    """Return the tokens of a document; a text far longer than needed gives pieces from all over it."""
    if text.ids is not None:
        return [list(text.ids)]
    try:
        if text.messages is not None:
            opens_turn = text.messages[-1].get("role") != "assistant"
            rendered = tokenizer.chat_template.render(text.messages, add_generation_prompt=opens_turn)
            return [tokenizer.encode(rendered, add_special_tokens=False)]
        return [tokenizer.encode(piece) for piece in _pieces(text.text or "", limit, length)]
    except QCompileError as error:
        raise QuantError(f"{text.where}: {error}") from error


def _pieces(text: str, limit: int, length: int) -> list[str]:
    if len(text) <= limit:
        return [text]
    size = _CHARS_PER_TOKEN * length
    starts = np.linspace(0, len(text) - size, max(1, limit // size)).astype(int)
    return [text[_line_start(text, start) :][:size] for start in starts]


def _line_start(text: str, start: int) -> int:
    """Return the start of the next line, if one comes soon: a row should not begin inside a word."""
    after = text.find("\n", start, start + 400)
    return start if start == 0 or after < 0 else after + 1


def _document(record: Any, where: str) -> CalibrationText:
    if isinstance(record, str):
        return CalibrationText(where, text=record)
    if not isinstance(record, dict):
        raise QuantError(f"{where}: a text or an object with {_FORMS} is wanted, got {type(record).__name__}")
    if isinstance(record.get("text"), str):
        return CalibrationText(where, text=record["text"])
    if isinstance(record.get("prompt"), str):
        return CalibrationText(where, messages=_exchange(record))
    messages, ids = record.get("messages"), record.get("ids")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return CalibrationText(where, messages=tuple(messages))
    if isinstance(ids, list) and ids and all(type(i) is int for i in ids):
        return CalibrationText(where, ids=tuple(ids))
    wrong = next((key for key in DOCUMENT_FORMS if key in record), None)
    if wrong is not None:
        raise QuantError(f'{where}: "{wrong}" is not {DOCUMENT_FORMS[wrong]}')
    raise QuantError(f"{where}: an object with {_FORMS} is wanted, got {', '.join(map(str, record)) or 'an empty one'}")


def _exchange(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    question: dict[str, Any] = {"role": "user", "content": record["prompt"]}
    reply = next((record[key] for key in ("answer", "completion") if isinstance(record.get(key), str)), None)
    return (question,) if reply is None else (question, {"role": "assistant", "content": reply})
