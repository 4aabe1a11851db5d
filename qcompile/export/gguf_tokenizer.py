"""tokenizer.json, tokenizer_config.json, chat template and generation config out of GGUF metadata.

Only Qwen's byte-level BPE is known (tokenizer.ggml.model gpt2, tokenizer.ggml.pre qwen2): normalizer NFC,
the split expression below, no merges across it. Control and user-defined tokens become added tokens; the
padding that fills the embedding up to a round size (type UNUSED) is left out.
"""

from pathlib import Path
from typing import Any

from gguf.constants import TokenType

from qcompile.errors import ExportError
from qcompile.export.tokenizer_files import TEMPLATE_NAME, as_json_bytes
from qcompile.model_config import ModelConfig

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# DeepSeek-R1-Distill-Qwen splits as Qwen2 does
_SPLITS = {"qwen2": QWEN2_SPLIT, "deepseek-r1-qwen": QWEN2_SPLIT}
# chat models end a turn with one of these whatever eos_token_id says
_END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<｜end▁of▁sentence｜>")


def gguf_tokenizer_files(
    fields: dict[str, Any], config: ModelConfig, where: str, notes: list[str]
) -> dict[str, bytes | Path]:
    """Return the tokenizer's files by name; a file without a tokenizer gives none, and a note.

    Raises:
        ExportError: The tokenizer is of another kind, or its lists do not fit together.
    """
    if "tokenizer.ggml.tokens" not in fields:
        notes.append("the file holds no tokenizer: `generate` and `chat` will not work on the result")
        return {}
    vocabulary = _Vocabulary(fields, where)
    if len(vocabulary.tokens) > config.vocab_size:
        raise ExportError(
            f"{where}: {len(vocabulary.tokens)} tokens for an embedding of {config.vocab_size} rows; "
            "the file is damaged"
        )
    stop_ids = vocabulary.stop_ids()
    files: dict[str, bytes | Path] = {
        "tokenizer.json": as_json_bytes(vocabulary.tokenizer_json(), indent=None),
        "tokenizer_config.json": as_json_bytes(vocabulary.tokenizer_config(config.max_position_embeddings)),
        "generation_config.json": as_json_bytes(
            {
                "bos_token_id": vocabulary.token_id("bos"),
                "eos_token_id": stop_ids,
                "pad_token_id": vocabulary.token_id("padding"),
            }
        ),
    }
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[TEMPLATE_NAME] = template.encode()
    else:
        notes.append("no chat template: `chat` needs one, plain `generate` does not")
    return files


class _Vocabulary:
    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where
        model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
        if model != "gpt2" or not isinstance(pre, str) or pre not in _SPLITS:
            raise ExportError(
                f"{where}: tokenizer {model!r} with pre-tokenizer {pre!r} is not known; gpt2 with one of "
                f"{', '.join(_SPLITS)} is"
            )
        self.split = _SPLITS[pre]
        self.tokens = self._strings("tokenizer.ggml.tokens")
        self.merges = self._strings("tokenizer.ggml.merges")
        types = fields.get("tokenizer.ggml.token_type")
        if not isinstance(types, list) or len(types) != len(self.tokens):
            raise ExportError(f"{where}: 'tokenizer.ggml.token_type' does not have one entry per token")
        self.types: list[int] = types

    def _strings(self, key: str) -> list[str]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ExportError(f"{self.where}: metadata key '{key}' is missing or not a list of strings")
        return value

    def token_id(self, role: str) -> int | None:
        """Return the id of a role (bos, eos, eot, padding), or None."""
        value = self.fields.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def stop_ids(self) -> list[int]:
        """Return eos first, then the other tokens that end a turn."""
        ids = [self.token_id("eos"), self.token_id("eot")]
        ids += [i for i, text in enumerate(self.tokens) if text in _END_TEXTS and self._is_added(i)]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def _is_added(self, token_id: int) -> bool:
        return self.types[token_id] in {TokenType.CONTROL, TokenType.USER_DEFINED}

    def added_tokens(self) -> list[dict[str, Any]]:
        """Return tokenizer.json's added_tokens."""
        return [
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": self.types[token_id] == TokenType.CONTROL,
            }
            for token_id, text in enumerate(self.tokens)
            if self._is_added(token_id)
        ]

    def tokenizer_json(self) -> dict[str, Any]:
        """Return the whole of tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        split = {"type": "Split", "pattern": {"Regex": self.split}, "behavior": "Isolated", "invert": False}
        vocab = {text: i for i, text in enumerate(self.tokens) if self.types[i] == TokenType.NORMAL}
        pairs = [merge.split(" ") for merge in self.merges]
        if any(len(pair) != 2 for pair in pairs):
            raise ExportError(f"{self.where}: 'tokenizer.ggml.merges' has an entry that is not two tokens")
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added_tokens(),
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": self._post_processor(byte_level),
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": pairs,
            },
        }

    def _post_processor(self, byte_level: dict[str, Any]) -> dict[str, Any]:
        """Return the byte-level processor, with a bos token put in front where the model wants one."""
        bos_id = self.token_id("bos")
        if not self.fields.get("tokenizer.ggml.add_bos_token") or bos_id is None:
            return byte_level
        text = self.tokens[bos_id]
        bos = {"SpecialToken": {"id": text, "type_id": 0}}
        first, second = ({"Sequence": {"id": letter, "type_id": i}} for i, letter in enumerate("AB"))
        template = {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {text: {"id": text, "ids": [bos_id], "tokens": [text]}},
        }
        return {"type": "Sequence", "processors": [byte_level, template]}

    def tokenizer_config(self, max_length: int) -> dict[str, Any]:
        """Return tokenizer_config.json."""
        added = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in self.added_tokens()
        }
        record: dict[str, Any] = {
            "add_bos_token": bool(self.fields.get("tokenizer.ggml.add_bos_token", False)),
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        }
        for role, word in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
            token_id = self.token_id(role)
            record[word] = None if token_id is None else self.tokens[token_id]
        template = self.fields.get("tokenizer.chat_template")
        if isinstance(template, str):
            record["chat_template"] = template
        return record
