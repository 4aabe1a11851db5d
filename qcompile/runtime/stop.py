"""What ends a text: the model's end tokens, and stop strings, found even when they straddle tokens."""

from typing import Any, List, Mapping, Optional, Sequence, Tuple

from .tokenizer import Tokenizer


class StopChecker:
    """Watches the text of one sequence.

    Text that could be the beginning of a stop string is held back until it is known not to be one.

    Args:
        stops: The strings that end generation.
        include_stop: Keep the stop string at the end of the text (the contest needs `</answer>` there).
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> Tuple[str, Optional[str]]:
        """Take new text; return what may be shown, and the stop string if one is complete.

        Of several stop strings the one that begins first counts, of those the longest.
        """
        if not self._stops:
            return text, None
        window = self._held + text
        found = [(window.find(stop), -len(stop), stop) for stop in self._stops if stop in window]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return window[: start + len(stop) if self._include_stop else start], stop
        keep = self._longest_beginning(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """Return what was held back: the sequence ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, window: str) -> int:
        """Return the length of the longest tail of `window` that begins some stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(window)), 0, -1):
            tail = window[len(window) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def end_ids(configs: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> List[int]:
    """Return the ids that end a text: of the first config with `eos_token_id`, else the tokenizer's own."""
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(token_id, int) for token_id in ids):
            return list(ids)
    text = tokenizer.special_tokens.get("eos_token")
    token_id = tokenizer.token_id(text) if text else None
    return [] if token_id is None else [token_id]
