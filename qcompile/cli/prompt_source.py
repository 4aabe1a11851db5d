"""Where prompts come from: arguments, files, stdin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qcompile.runtime.errors import RequestError
from qcompile.text_file import decode_utf8, json_lines, read_bounded

MAX_PROMPT_BYTES = 64 << 20

Conversation = list[dict[str, Any]]
PromptText = str | Conversation


def read_prompts(arguments: tuple[str, ...], files: tuple[Path, ...]) -> list[PromptText]:
    """Return every prompt that was given, in order; stdin when none was and it is not a terminal.

    Args:
        arguments: Texts; `-` is stdin.
        files: Text files, one prompt each (without its last line break), or .jsonl with one prompt per line.

    Raises:
        RequestError: A file cannot be read, is not UTF-8, or a .jsonl line is not a prompt.
        click.UsageError: There is no prompt at all.
    """
    if not arguments and not files:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give a text, --prompt-file FILE, or '-' for stdin")
        arguments = ("-",)
    prompts: list[PromptText] = [_stdin() if text == "-" else text for text in arguments]
    for path in files:
        content = read_bounded(path, MAX_PROMPT_BYTES, "that is no prompt", RequestError)
        text = decode_utf8(content, str(path), RequestError)
        if path.suffix.lower() == ".jsonl":
            prompts += _jsonl_prompts(text, path)
        else:
            prompts.append(_without_last_break(text))
    return prompts


def _stdin() -> str:
    content = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(content) > MAX_PROMPT_BYTES:
        raise RequestError(f"stdin: more than {MAX_PROMPT_BYTES} bytes; that is no prompt")
    return _without_last_break(decode_utf8(content, "stdin", RequestError))


def _jsonl_prompts(text: str, path: Path) -> list[PromptText]:
    prompts = [_jsonl_prompt(record, where) for where, record in json_lines(text, path, RequestError)]
    if not prompts:
        raise RequestError(f"{path}: no prompt in it")
    return prompts


def _jsonl_prompt(record: Any, where: str) -> PromptText:
    if isinstance(record, dict):
        record = record.get("prompt", record.get("messages"))
    is_conversation = isinstance(record, list) and all(isinstance(message, dict) for message in record)
    if isinstance(record, str) or (is_conversation and record):
        return record
    raise RequestError(f'{where}: a string, {{"prompt": text}} or {{"messages": [...]}} is wanted')


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
