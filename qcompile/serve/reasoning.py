"""Split what a reasoning model writes into its thinking and its answer, while it is being written."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
_ANSWER_TAGS = ("<answer>", "</answer>")


class ReasoningSplitter:
    """Takes text piece by piece; gives (reasoning, content) pieces.

    A tag may arrive in parts: what could be the beginning of one is held back. White space next to a tag belongs
    to neither side. However the text is cut, the pieces join to the same two texts.

    Args:
        style: ``none``, ``think`` or ``think-answer`` (see ServeSettings).
        is_open: The prompt already ends with <think> (templates of DeepSeek-R1 do that).
    """

    def __init__(self, style: str, is_open: bool = False) -> None:
        self._is_plain = style == "none"
        self._answer_tags = _ANSWER_TAGS if style == "think-answer" else ()
        self._is_thinking = is_open
        self._may_open = not is_open  # only what begins with <think> has thinking
        self._at_start = True  # white space is dropped here
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take more text."""
        if self._is_plain:
            return "", text
        window = self._open(self._held + text)
        self._held = window
        if self._may_open:
            return "", ""
        out = ["", ""]
        while True:
            tags = (CLOSE,) if self._is_thinking else self._answer_tags
            found = min(((window.find(tag), tag) for tag in tags if tag in window), default=None)
            if found is None:
                break
            start, tag = found
            self._emit(out, window[:start].rstrip())
            window = window[start + len(tag) :]
            self._is_thinking = False
            self._at_start = True
        keep = _unsure(window, tags)
        self._emit(out, window[: len(window) - keep])
        self._held = window[len(window) - keep :]
        return out[0], out[1]

    def flush(self) -> tuple[str, str]:
        """Return what was held back, at the end of the text."""
        out = ["", ""]
        self._emit(out, self._held)
        self._held = ""
        return out[0], out[1]

    def _open(self, window: str) -> str:
        """Pass the opening tag, once it is known whether there is one."""
        if not self._may_open:
            return window
        begun = window.lstrip()
        if OPEN.startswith(begun) and begun != OPEN:
            return window
        self._may_open = False
        if not begun.startswith(OPEN):
            return window
        self._is_thinking = True
        return begun[len(OPEN) :]

    def _emit(self, out: list[str], text: str) -> None:
        if self._at_start:
            text = text.lstrip()
        if text:
            self._at_start = False
            out[0 if self._is_thinking else 1] += text


def _unsure(window: str, tags: tuple[str, ...]) -> int:
    """Return the length of the tail that may be white space before a tag, or the beginning of one."""
    if not tags:
        return 0
    cut = len(window)
    for length in range(min(max(map(len, tags)) - 1, len(window)), 0, -1):
        if any(tag.startswith(window[-length:]) for tag in tags):
            cut -= length
            break
    return len(window) - len(window[:cut].rstrip())
