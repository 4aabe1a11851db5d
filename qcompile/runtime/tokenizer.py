"""The tokenizer of a compiled model: tokenizer.json, special tokens, and the chat template."""

import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set

from .chat_template import ChatTemplate
from .detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, piece_bytes
from .errors import RequestError, TokenizerError
from .manifest import Manifest, check_file, find_file

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_JSON_BYTES = 256 << 20


class Tokenizer:
    """Text to ids and back.

    Args:
        directory: The compiled-model directory.
        manifest: Its manifest; only files it lists are read.

    Raises:
        ManifestError: A listed file is missing or was changed.
        TokenizerError: tokenizer.json is not listed or cannot be used.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        entry = find_file(manifest, "tokenizer.json")
        if entry is None:
            raise TokenizerError(
                f"{directory}: no tokenizer.json; export the model again from a checkpoint that has one"
            )
        path = check_file(directory, entry)
        self._tokenizer = _load(path)
        self.config = read_json_file(directory, manifest, "tokenizer_config.json")
        self.special_tokens = _special_tokens(self.config)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids: Set[int] = {token_id for token_id, token in added.items() if token.special}
        self._is_byte_level = _is_byte_level(self._tokenizer)
        self._chat_source = _chat_source(directory, manifest, self.config)
        self._chat_template: Optional[ChatTemplate] = None
        self._longest_token: Optional[int] = None

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a chat template (instruct models do, base models often do not)."""
        return self._chat_source is not None

    @property
    def chat_template(self) -> ChatTemplate:
        """The chat template, compiled on first use.

        Raises:
            TokenizerError: There is none, or it is not a template.
        """
        if self._chat_template is None:
            if self._chat_source is None:
                raise TokenizerError("the model has no chat template (a base model?): give it the raw prompt instead")
            text, origin = self._chat_source
            self._chat_template = ChatTemplate(text, self.special_tokens, origin)
        return self._chat_template

    def token_id(self, text: str) -> Optional[int]:
        """Return the id of a token given by its exact text, or None."""
        found: Optional[int] = self._tokenizer.token_to_id(text)
        return found

    @property
    def longest_token(self) -> int:
        """Bytes of the longest token (characters, if the vocabulary is not byte-level)."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        return self._longest_token

    def encode(self, text: str, add_special_tokens: bool = True, lets_others_run: bool = False) -> List[int]:
        """Return the ids of a text.

        Args:
            text: The prompt. Special tokens written out in it are recognised, as Hugging Face does.
            add_special_tokens: Put the model's BOS before it, if the model uses one and the text does not
                start with it. False for text that a chat template made: it holds its special tokens already.
            lets_others_run: Release Python's lock meanwhile: a megabyte takes seconds. A server wants that; a process
                that forks later may not, as the tokenizers library then warns of its threads.

        Raises:
            RequestError: The text holds lone surrogates (bytes that were not valid UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt is not valid UTF-8: character {error.start} is the stray byte or surrogate "
                f"{ord(text[error.start]):#x}"
            ) from None
        bos = self.special_tokens.get("bos_token")
        if add_special_tokens and bos and text.startswith(bos):
            add_special_tokens = False
        if lets_others_run:  # of the library's two ways only this one releases the lock
            ids: List[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        else:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and bos and self.config.get("add_bos_token") is True:
            bos_id = self.token_id(bos)
            if bos_id is not None and ids[:1] != [bos_id]:
                ids.insert(0, bos_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that form no character become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for: often not a whole number of characters. Special ones count."""
        if self._is_byte_level:
            return piece_bytes(self._tokenizer.id_to_token(token_id) or "")
        return self.decode([token_id], skip_special_tokens=False).encode("utf-8")

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a new incremental decoder."""
        if self._is_byte_level:
            skipped = self._special_ids if skip_special_tokens else frozenset()
            return ByteLevelDetokenizer(self._tokenizer.id_to_token, skipped.__contains__)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens))


def read_json_file(directory: Path, manifest: Manifest, name: str) -> Dict[str, Any]:
    """Return the JSON object in an auxiliary file; empty when the manifest does not list it.

    Raises:
        TokenizerError: It is not a JSON object.
    """
    entry = find_file(manifest, name)
    if entry is None:
        return {}
    path = check_file(directory, entry)
    if entry.size_bytes > _MAX_JSON_BYTES:
        raise TokenizerError(f"{path}: {entry.size_bytes} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise TokenizerError(f"{path}: a JSON object is expected, got {type(record).__name__}")
    return record


def _load(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise TokenizerError(f"tokenizers cannot be imported ({error}); pip install tokenizers") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path}: not a tokenizer this tokenizers version reads: {error}") from None


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether decoding is joining the bytes of the pieces: asked of the decoder itself."""
    return tokenizer.decoder is not None and tokenizer.decoder.decode(["Ġa", "ä½", "ł", "Ġ", "é"]) == " a你 \ufffd"


def _special_tokens(config: Mapping[str, Any]) -> Dict[str, str]:
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _chat_source(directory: Path, manifest: Manifest, config: Mapping[str, Any]) -> Optional[Any]:
    """Return (text, origin) of the chat template: its own file first, then tokenizer_config.json."""
    entry = find_file(manifest, "chat_template.jinja")
    if entry is not None:
        path = check_file(directory, entry)
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return template, str(directory / "tokenizer_config.json")
    return None
