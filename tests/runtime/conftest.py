"""Compiled tiny models, built once per run."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcompile.runtime import Engine
from tests.runtime.prompts import LONG, PROMPTS
from tests.runtime.toy_compiler import compile_tiny


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that compiles a tiny model with these options, once each. Do not change its files."""
    done: dict[str, Path] = {}

    def compile_once(model_type: str = "qwen2", **options: object) -> Path:
        key = f"{model_type} {sorted(options.items())}"
        if key not in done:
            done[key] = compile_tiny(tmp_path_factory.mktemp("model"), model_type, **options)
        return done[key]

    return compile_once


@pytest.fixture(scope="session")
def model(compiled: Callable[..., Path]) -> Path:
    """A qwen2 with a shared cache."""
    return compiled()


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """Each prompt alone, whole, in a fresh cache."""
    with Engine(model, threads=1, max_batch_size=1, reuse_prefixes=False) as alone:
        return [alone.generate(prompt, LONG)[0].token_ids for prompt in PROMPTS]
