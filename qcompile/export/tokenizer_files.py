"""The tokenizer's files of a Hugging Face directory, with the chat template in a file of its own."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qcompile.errors import ExportError
from qcompile.model_config import read_json_object

_MAX_TOKENIZER_BYTES = 64 << 20
TEMPLATE_NAME = "chat_template.jinja"


def tokenizer_files(directory: Path, notes: list[str], vocab_size: int | None = None) -> dict[str, bytes | Path]:
    """Return the files to put into the compiled-model directory, by name; what is missing is noted.

    Args:
        directory: Of the checkpoint.
        notes: What the user should know is added to it.
        vocab_size: The model's, if known: an end of text it does not reach is noted.

    Raises:
        ExportError: A file that exists is damaged.
    """
    files: dict[str, bytes | Path] = {}
    for name in ("tokenizer.json", "generation_config.json"):
        path = directory / name
        if path.is_file():
            record = read_json_object(path, max_bytes=_MAX_TOKENIZER_BYTES)
            if name == "tokenizer.json":
                _check_tokenizer(record, path)
            else:
                note_end_ids(_end_ids(record, path), vocab_size, str(path), notes)
            files[name] = path
    if "tokenizer.json" not in files:
        notes.append("no tokenizer.json: the result can be optimized and verified, `generate` and `chat` need it")
    tokenizer_config: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        tokenizer_config = read_json_object(directory / "tokenizer_config.json", max_bytes=_MAX_TOKENIZER_BYTES)
        files["tokenizer_config.json"] = directory / "tokenizer_config.json"
    template = _chat_template(directory, tokenizer_config)
    if template is not None:
        files[TEMPLATE_NAME] = template.encode()
    elif "tokenizer.json" in files:
        notes.append("no chat template: `chat` needs one, plain `generate` does not")
    return files


def _check_tokenizer(record: dict[str, Any], path: Path) -> None:
    """Refuse a file that holds no vocabulary; whether it can be used, the tokenizers package says later."""
    model = record.get("model")
    # an object, or for Unigram a list
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise ExportError(f"{path}: holds no tokenizer (no 'model' with a 'vocab'); download it again")


def _end_ids(record: dict[str, Any], path: Path) -> list[int]:
    value = record.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
        raise ExportError(
            f"{path}: 'eos_token_id' is {value!r:.100}; a token id or a list of them is expected; "
            "take the file from the original checkpoint"
        )
    return ids


def note_end_ids(ids: Iterable[int], vocab_size: int | None, where: str, notes: list[str]) -> None:
    """Note the ends of text that the model cannot write."""
    outside = [] if vocab_size is None else [token_id for token_id in ids if token_id >= vocab_size]
    if outside:
        notes.append(
            f"{where}: 'eos_token_id' has {', '.join(map(str, outside[:3]))}, beyond the model's {vocab_size} tokens: "
            "no text ends with it"
        )


def _chat_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    path = directory / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{path}: cannot be read: {error}") from None
    legacy = directory / "chat_template.json"
    template = tokenizer_config.get("chat_template")
    if template is None and legacy.is_file():
        template = read_json_object(legacy).get("chat_template")
    if isinstance(template, list):
        # several named templates: {"name": "default", "template": "..."}
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def as_json_bytes(record: Any, *, indent: int | None = 2) -> bytes:
    """Return UTF-8 JSON; without indent it is ten times faster, which a vocabulary feels."""
    return (json.dumps(record, indent=indent, ensure_ascii=False) + "\n").encode()
