"""The tokenizer's files of a Hugging Face directory, with the chat template in a file of its own."""

import json
from pathlib import Path
from typing import Any

from qcompile.errors import ExportError
from qcompile.model_config import read_json_object

_MAX_TOKENIZER_BYTES = 64 << 20
TEMPLATE_NAME = "chat_template.jinja"


def tokenizer_files(directory: Path, notes: list[str]) -> dict[str, bytes | Path]:
    """Return the files to put into the compiled-model directory, by name; what is missing is noted.

    Raises:
        ExportError: A file that exists is damaged.
    """
    files: dict[str, bytes | Path] = {}
    for name in ("tokenizer.json", "generation_config.json"):
        if (directory / name).is_file():
            read_json_object(directory / name, max_bytes=_MAX_TOKENIZER_BYTES)
            files[name] = directory / name
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
