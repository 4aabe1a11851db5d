"""The contest's result file, and JSON files that are whole or not there."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import EvaluateError
from qcompile.evaluate.asking import MAX_SUBMITTED_SAMPLES
from qcompile.evaluate.scoreboard import CaseResult
from qcompile.weights_writer import write_failure


def submission(results: Sequence[CaseResult], samples: int) -> dict[str, Any]:
    """The contest's form: `content` is the model's text, or for code with several samples a list of up to three.

    A case without any text (its prompt is longer than the context) stands there with an empty one.
    """
    return {"result": {"results": [{"id": r.case.id, "content": _content(r, samples)} for r in results]}}


def _content(result: CaseResult, samples: int) -> str | list[str]:
    texts = [attempt.sample.text for attempt in result.attempts] or [""]
    if result.case.type == "code-generate" and samples > 1:
        return texts[:MAX_SUBMITTED_SAMPLES]
    return texts[0]


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename; a link stays one, and what it names is written.

    Raises:
        EvaluateError: The file cannot be written; an older one is left as it was.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise EvaluateError(write_failure(path, error)) from None


def write_json(path: Path, record: dict[str, Any], *, indent: int | None = None) -> None:
    """Write a record as JSON in UTF-8.

    Raises:
        EvaluateError: The file cannot be written; an older one is left as it was.
    """
    write_text(path, json.dumps(record, ensure_ascii=False, indent=indent) + "\n")
