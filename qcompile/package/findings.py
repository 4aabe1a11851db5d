"""What a check found: the file, what the judge would say, and the cure."""

from dataclasses import dataclass, field
from typing import Any

# the judge's own words, as users met them
NOT_EXIST = "The file competition_model.py is not exist"
UNZIP = "Unzip Error"
PIP = "Pip install error: Failed to install dependencies"
TIMEOUT = "Inference Error: inference Timeout"
NO_SUCCESS = "Inference Error: the number of successful inferences is 0"
INFERENCE = "Inference Error"


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        file: Where it is, by its name in the package.
        message: What is wrong: seen and wanted.
        cure: What to do.
        judge: What the judge's page would say; empty when it would not notice, or lose points only.
    """

    file: str
    message: str
    cure: str
    judge: str = ""

    def __str__(self) -> str:
        said = f" (the judge: '{self.judge}')" if self.judge else ""
        return f"{self.file}: {self.message}{said}. Cure: {self.cure}"

    def record(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {"file": self.file, "message": self.message, "cure": self.cure, "judge": self.judge}


@dataclass
class Report:
    """A whole check.

    Attributes:
        kind: What was checked: contest, modelarts or modelarts-engine.
        passed: The checks that were made and found nothing, in words.
        findings: The faults.
        notes: What could not be checked or isolated here, and figures worth knowing.
        figures: Seconds, format and the like, for JSON.
    """

    kind: str
    passed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def take(self, step: str, findings: list[Finding]) -> bool:
        """Add the outcome of one step; returns whether it found nothing. What two steps find is told once."""
        self.findings += [finding for finding in findings if finding not in self.findings]
        if not findings:
            self.passed.append(step)
        return not findings

    def record(self) -> dict[str, Any]:
        """The whole as JSON."""
        return {
            "kind": self.kind,
            "is_ok": self.is_ok,
            "passed": self.passed,
            "findings": [finding.record() for finding in self.findings],
            "notes": self.notes,
            "figures": self.figures,
        }
