r"""The official format gate and the official per-type extraction.

The gate is ``^<think>(.*?)</think>\\s*<answer>(.*?)</answer>$`` with DOTALL, applied to the text exactly as the model
wrote it. Inside the answer one regular expression per type picks what is compared; where it finds nothing, the raw
text is compared, so a lost format is not by itself a lost answer. Nothing here repairs a model's text.
"""

import re
from dataclasses import dataclass

OFFICIAL_GATE = re.compile(r"^<think>(.*?)</think>\s*<answer>(.*?)</answer>$", re.DOTALL)
EXTRACTION = {
    "choice": re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D]*)\$?"),
    "code-generate": re.compile(r"```python\n(.*?)```", re.DOTALL),
    "generic-generate": re.compile(r"(?i)Answer\s*:\s*([^\n]+)"),
    "math": re.compile(r"(?i)Answer\s*:\s*\s*([^\n]+)"),
}
_OPEN, _CLOSE = "<think>", "</answer>"
_SEPARATOR = re.compile(r"</think>\s*<answer>")


@dataclass(frozen=True)
class ParsedContent:
    """A model's text seen through the gate.

    Attributes:
        is_format_ok: The official gate matches.
        thinking: What stands between the think tags; empty when the gate does not match.
        answer: What stands between the answer tags; the whole text when the gate does not match.
    """

    is_format_ok: bool
    thinking: str
    answer: str


def parse_content(content: str) -> ParsedContent:
    """Apply the official gate in linear time.

    The lazy groups of the official expression backtrack quadratically on text full of tags; an equal decision needs
    only the first separator and the end of the text (a test holds the two against each other).
    """
    body = content[:-1] if content.endswith("\n") else content  # `$` also matches before one last newline
    separator = _SEPARATOR.search(content, len(_OPEN)) if content.startswith(_OPEN) else None
    end = len(body) - len(_CLOSE)
    if separator is None or not body.endswith(_CLOSE) or separator.end() > end:
        return ParsedContent(is_format_ok=False, thinking="", answer=content)
    return ParsedContent(True, content[len(_OPEN) : separator.start()], content[separator.end() : end])


def extract_answer(case_type: str, content: str) -> tuple[str, bool]:
    """The text that is compared with the expected answer, and whether the per-type expression found it.

    Args:
        case_type: choice, math, generic-generate or code-generate.
        content: The model's text, unchanged.
    """
    answer = parse_content(content).answer
    match = EXTRACTION[case_type].search(answer)
    if match is None:
        return answer, False
    return match.group(1), True
