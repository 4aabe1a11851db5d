"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from typing import Any

from qcompile.runtime import Completion, Tokenizer, TokenLogprob

_LOWEST = -9999.0  # what OpenAI sends for a token that cannot come; JSON has no infinity


def told(logprobs: tuple[TokenLogprob, ...], completion: Completion | None) -> tuple[TokenLogprob, ...]:
    """Leave out the end token: it is not part of the text."""
    ends = completion is not None and isinstance(completion.stop_reason, int)
    return logprobs[:-1] if ends else logprobs


def chat_logprobs(tokenizer: Tokenizer, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_bytes(token_id)
        return {"token": _shown(text), "logprob": max(logprob, _LOWEST), "bytes": list(text)}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in logprobs
    ]
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The `logprobs` objects of a text choice; offsets count characters from its beginning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = b""

    def take(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """Return the object for the next tokens."""
        texts, offsets = [], []
        for one in logprobs:
            text = self._tokenizer.token_bytes(one.token_id)
            offsets.append(len(self._bytes.decode("utf-8", errors="ignore")))
            texts.append(_shown(text))
            self._bytes += text
        return {
            "tokens": texts,
            "token_logprobs": [max(one.logprob, _LOWEST) for one in logprobs],
            "top_logprobs": [self._top(one) for one in logprobs] if any(one.top for one in logprobs) else None,
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The most likely tokens and the chosen one; of two that show alike the likelier stays."""
        found: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            found.setdefault(_shown(self._tokenizer.token_bytes(token_id)), max(logprob, _LOWEST))
        return found


def _shown(text: bytes) -> str:
    """A token's text; bytes that are no whole characters are written out, as OpenAI does."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
