"""Turn token ids into text as they come, never emitting half a character.

A byte-level BPE token is a run of bytes, often not a whole number of UTF-8 characters: most Chinese
characters and all emoji are split somewhere. The pieces emitted for a sequence, joined, are exactly what
decoding it at once gives.
"""

import codecs
from typing import Callable, Dict, List, Optional, Protocol


def byte_alphabet() -> Dict[str, int]:
    """Return the GPT-2 alphabet: the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{chr(byte): byte for byte in shown}, **{chr(256 + i): byte for i, byte in enumerate(hidden)}}


_BYTE_OF = byte_alphabet()


class Detokenizer(Protocol):
    """Text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for bytes that never became a character."""


class ByteLevelDetokenizer:
    """Detokenizer of byte-level BPE: one table look-up and one decoder step per token.

    Args:
        piece_of: The vocabulary's string of an id, None where there is none (padded vocabularies).
        is_skipped: Whether the token leaves no text (special tokens).
    """

    def __init__(self, piece_of: Callable[[int], Optional[str]], is_skipped: Callable[[int], bool]) -> None:
        self._piece_of = piece_of
        self._is_skipped = is_skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if self._is_skipped(token_id):
            return ""
        return self._decoder.decode(piece_bytes(self._piece_of(token_id) or ""))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Detokenizer of any other kind: decodes a short window again for each token and emits what was added.

    Args:
        decode: Text of a list of ids.
    """

    def __init__(self, decode: Callable[[List[int]], str]) -> None:
        self._decode = decode
        self._window: List[int] = []
        self._num_read = 0  # ids of the window whose text is out

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        self._window.append(token_id)
        before, now = self._decode(self._window[: self._num_read]), self._decode(self._window)
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """See Detokenizer."""
        before, now = self._decode(self._window[: self._num_read]), self._decode(self._window)
        self._num_read = len(self._window)
        return now[len(before) :]


def piece_bytes(piece: str) -> bytes:
    """Return the bytes a byte-level entry stands for; an added token outside the alphabet is its text."""
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:
        return piece.encode("utf-8", errors="replace")
