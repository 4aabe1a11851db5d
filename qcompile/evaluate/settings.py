"""What a run of `qcompile eval` asks of the model, and the seeds that make it repeatable."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompile.errors import EvaluateError
from qcompile.evaluate.asking import CASE_TYPES, MAX_SUBMITTED_SAMPLES, sampling_options, seed_of
from qcompile.evaluate.cases import Case
from qcompile.evaluate.sandbox import Limits


@dataclass(frozen=True)
class EvalSettings:
    """Everything that decides which texts come out and how they are judged; batch size and threads do not.

    Attributes:
        max_new_tokens: The most tokens of one answer, by case type.
        samples: Texts per code case; every other type gets one.
        temperature: 0: the first text of every case is greedy. Above 0: every text is drawn.
        sample_temperature: For the second and later texts of a code case when the first is greedy.
        top_p: For drawn texts.
        seed: Of every draw.
        is_raw: Prompts go in as they are, without the chat template.
        template_arguments: Variables for the chat template.
        max_model_len: The most tokens of prompt and answer; None for the model's own limit.
        limits: Of the sandbox that runs code.
    """

    max_new_tokens: Mapping[str, int]
    samples: int = MAX_SUBMITTED_SAMPLES
    temperature: float = 0.0
    sample_temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    is_raw: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    max_model_len: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def is_first_greedy(self) -> bool:
        """Whether the first text of every case is the greedy one."""
        return self.temperature == 0

    def num_samples(self, case: Case) -> int:
        """Texts wanted for a case."""
        return self.samples if case.type == "code-generate" else 1

    def temperature_of(self, sample: int) -> float:
        """The temperature of the text with that number, from 0."""
        return self.sample_temperature if self.is_first_greedy and sample > 0 else self.temperature

    def sampling(self, case: Case, sample: int) -> dict[str, Any]:
        """What decides one text, besides the prompt, in the words of `SamplingParams`."""
        temperature, seed = self.temperature_of(sample), seed_of(self.seed, case.id, sample)
        return sampling_options(self.max_new_tokens[case.type], temperature, self.top_p, seed)

    def shared(self) -> dict[str, Any]:
        """The part that holds for every text: a change of it starts a new journal."""
        return {
            "max_new_tokens": {name: self.max_new_tokens[name] for name in CASE_TYPES},
            "temperature": self.temperature,
            "sample_temperature": self.sample_temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "raw": self.is_raw,
            "template_arguments": dict(self.template_arguments),
            "max_model_len": self.max_model_len,
        }


def digest_of(*parts: Any) -> str:
    """A hex digest of JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def token_limits(entries: tuple[str, ...], default: int) -> dict[str, int]:
    """Limits by case type out of `N` (all types) and `TYPE=N` entries; the particular ones win.

    Raises:
        EvaluateError: An entry names no type, or no positive number.
    """
    every, particular = default, {}
    for entry in entries:
        name, equals, number = entry.rpartition("=")
        if equals and name not in CASE_TYPES:
            raise EvaluateError(f"--max-new-tokens {entry}: {name!r} is no case type; one of {', '.join(CASE_TYPES)}")
        if not (number.isascii() and number.isdigit()) or not 0 < int(number) <= 1 << 20:
            raise EvaluateError(f"--max-new-tokens {entry}: {number!r} is not a number of tokens from 1 to {1 << 20}")
        if equals:
            particular[name] = int(number)
        else:
            every = int(number)
    return {name: particular.get(name, every) for name in CASE_TYPES}
