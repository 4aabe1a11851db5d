"""What the package was made with: `contest_settings.json`, written by `qcompile package`, read when it runs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

SETTINGS_NAME = "contest_settings.json"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Rung:
    """One way to run the model.

    Attributes:
        kind: ``acl`` (.om on the NPU), ``torch_npu`` (transformers on the NPU) or ``onnxruntime`` (CPU).
        path: Folder in the package.
    """

    kind: str
    path: str


@dataclass(frozen=True)
class ContestSettings:
    """How questions are asked and how long it may take.

    Attributes:
        total_parameters: Of the model as it was trained.
        ladder: The ways to run it, best first.
        max_new_tokens: The most tokens of one answer, by case type.
        templates: The user message, by case type and language.
        system: The system message; an empty one is not sent.
        budget_s: Seconds that all calls of `get_results` together may take.
        grace_s: How much longer a step that hangs is waited for before its answers are given up.
        expected_questions: Questions of all test files together; decides the share of each file.
        batch_size: Texts computed together.
        samples: Texts per code question, for pass@3.
        temperature: Of each question's first text; 0 is greedy.
        sample_temperature: Of a code question's further texts when the first is greedy.
        top_p: For drawn texts.
        seed: Of every draw.
        max_model_len: The most tokens of prompt and answer; None for the model's own limit.
        threads: Computing threads; None for every physical core.
        template_arguments: Variables for the chat template.
    """

    total_parameters: int
    ladder: Tuple[Rung, ...]
    max_new_tokens: Mapping[str, int]
    templates: Mapping[str, Mapping[str, str]]
    system: str = ""
    budget_s: float = 3300.0
    grace_s: float = 60.0
    expected_questions: int = 200
    batch_size: int = 32
    samples: int = 3
    temperature: float = 0.0
    sample_temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    max_model_len: Optional[int] = None
    threads: Optional[int] = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Union[str, Path]) -> "ContestSettings":
        """Read the file of a package.

        Raises:
            OSError: It cannot be read.
            ValueError: It is not what `dump` writes.
        """
        record = json.loads((Path(root) / SETTINGS_NAME).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.pop("schema_version", None) != _SCHEMA_VERSION:
            raise ValueError(f"{SETTINGS_NAME}: schema_version {_SCHEMA_VERSION} is wanted")
        rungs: List[Dict[str, str]] = record.pop("ladder")
        return cls(ladder=tuple(Rung(**rung) for rung in rungs), **record)

    def dump(self) -> str:
        """The text of the file."""
        return json.dumps({"schema_version": _SCHEMA_VERSION, **asdict(self)}, ensure_ascii=False, indent=1) + "\n"

    def temperature_of(self, sample: int) -> float:
        """The temperature of the text with that number, from 0."""
        return self.sample_temperature if self.temperature == 0 and sample > 0 else self.temperature
