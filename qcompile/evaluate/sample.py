"""One text of a model, the verdict on it, and what all texts together took."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One text, exactly as the model wrote it.

    Attributes:
        text: Without special tokens, the stop string included.
        finish_reason: ``stop`` or ``length``.
        num_prompt_tokens: Tokens of the prompt.
        num_new_tokens: Tokens generated, the ending one included.
        ttft_s: Seconds from the request to its first token.
        duration_s: Seconds from the request to its last token.
    """

    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_new_tokens: int
    ttft_s: float
    duration_s: float

    @property
    def is_cut_off(self) -> bool:
        """Whether the token limit ended it."""
        return self.finish_reason == "length"

    def record(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Sample":
        """Read what `record` wrote.

        Raises:
            TypeError: A field is missing or of the wrong kind.
        """
        sample = cls(**{f.name: record.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]
        numbers = (sample.num_prompt_tokens, sample.num_new_tokens, sample.ttft_s, sample.duration_s)
        if not isinstance(sample.text, str) or sample.finish_reason not in ("stop", "length"):
            raise TypeError("text or finish_reason")
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
            raise TypeError("a number is missing")
        return sample


@dataclass(frozen=True)
class Judgement:
    """The verdict on one text, and how strong the sandbox was that ran its code.

    Attributes:
        is_correct: None when the case has no known answer.
        extracted: The text that was compared.
        reason: Why it is wrong; empty when right.
        isolation: The sandbox's layers; empty when no code was run.
    """

    is_correct: bool | None
    extracted: str
    reason: str = ""
    isolation: str = ""

    def record(self) -> dict[str, Any]:
        """The fields for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Judgement":
        """Read what `record` wrote.

        Raises:
            TypeError: A field is missing or of the wrong kind.
        """
        judgement = cls(**{f.name: record.get(f.name) for f in fields(cls)})  # type: ignore[arg-type]
        texts = (judgement.extracted, judgement.reason, judgement.isolation)
        if judgement.is_correct not in (True, False, None) or not all(isinstance(text, str) for text in texts):
            raise TypeError("is_correct or a text")
        return judgement


@dataclass(frozen=True)
class Generated:
    """What the journal holds in all: also texts that this run does not use (`--limit` after a whole run)."""

    tokens: int
    seconds: float
