"""Models compiled once per run by the stand-in for ATC."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ascend_sim.simulated import compile_simulated


@pytest.fixture(scope="session")
def compiled_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function that gives the fused and the compiled directory of a tiny model. Do not change their files."""
    done: dict[str, tuple[Path, Path]] = {}

    def compile_once(model_type: str = "qwen2") -> tuple[Path, Path]:
        if model_type not in done:
            done[model_type] = compile_simulated(tmp_path_factory.mktemp("simulated"), model_type)
        return done[model_type]

    return compile_once


@pytest.fixture(scope="session")
def compiled_om(compiled_pair: Callable[[str], tuple[Path, Path]]) -> Path:
    """A tiny qwen2 compiled by the stand-in."""
    return compiled_pair("qwen2")[1]
