"""A contest package's folder without a model: settings only, and a ladder that opens what a test says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.evaluate.asking import CASE_TYPES
from qcompile.evaluate.templates import Templates
from qcompile.package.contest import ladder
from qcompile.package.contest.contest import Contest
from qcompile.package.contest.settings import SETTINGS_NAME, ContestSettings, Rung


def settings(**changes: Any) -> ContestSettings:
    texts: dict[str, dict[str, str]] = {}
    for (case_type, language), text in Templates.load().texts.items():
        texts.setdefault(case_type, {})[language] = text
    values: dict[str, Any] = {
        "total_parameters": 14_000_000,
        "ladder": (Rung("acl", "model"), Rung("onnxruntime", "model_cpu")),
        "max_new_tokens": dict.fromkeys(CASE_TYPES, 64),
        "templates": texts,
        "batch_size": 4,
    }
    return ContestSettings(**{**values, **changes})


@pytest.fixture
def contest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contest]:
    """Make a contest whose rungs are opened by the functions given, by kind; a missing one cannot be opened."""

    def make(rungs: dict[str, Callable[[], Any]], clock: Callable[[], float] | None = None, **changes: Any) -> Contest:
        def open_rung(path: Path, rung: Rung, known: ContestSettings) -> Any:
            if rung.kind not in rungs:
                raise FileNotFoundError(f"{path / 'decode.om'}: missing")
            return rungs[rung.kind]()

        monkeypatch.setattr(ladder, "open_rung", open_rung)
        (tmp_path / SETTINGS_NAME).write_text(settings(**changes).dump(), encoding="utf-8")
        return Contest(tmp_path, clock) if clock is not None else Contest(tmp_path)

    return make
