"""How a question is asked: the case types, the template's blanks, stop string, sampling and seeds.

The contest package carries a copy of this file, so it is written for Python 3.9 and imports the standard library only.
What `qcompile eval` measures and what the judge gets are therefore the same texts.
"""

import hashlib
import re
from typing import Any, Dict, Mapping

CASE_TYPES = ("choice", "math", "generic-generate", "code-generate")
LANGUAGES = ("en", "zh")
STOP = "</answer>"
MAX_SUBMITTED_SAMPLES = 3
_SEED_BITS = 63
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_BLANK = re.compile(r"\{(prompt|choices)\}")


def language_of(text: str) -> str:
    """`zh` when the text holds a Chinese character, else `en`."""
    return "zh" if _CHINESE.search(text) else "en"


def fill(template: str, prompt: str, choices: Mapping[str, str]) -> str:
    """The user message: the template with the question (and the choices, one a line) put in."""
    lines = "\n".join(f"{letter}. {text}" for letter, text in choices.items())
    values = {"prompt": prompt.strip(), "choices": lines}
    return _BLANK.sub(lambda match: values[match[1]], template)


def seed_of(seed: int, case_id: str, sample: int) -> int:
    """The seed of one text: its own, so neither batch, order nor resumption changes what is drawn."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{case_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def sampling_options(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> Dict[str, Any]:
    """What decides one text besides its prompt, in the words of `SamplingParams`; at temperature 0 it is greedy."""
    options: Dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": [STOP],
        "include_stop": True,
        "temperature": temperature,
    }
    if temperature > 0:
        options.update(top_p=top_p, seed=seed)
    return options
