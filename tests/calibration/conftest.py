"""Tiny exported models, fused and not, and a tokenizer, shared by the tests of calibration."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.artifact import load_model
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("calibration")
    plain = export_tiny(root, "qwen2", num_hidden_layers=3)
    optimize_tiny(plain, root / "fused", target="portable", verify="off")
    optimize_tiny(plain, root / "ort", target="ort", verify="off")
    qwen3 = export_tiny(root, "qwen3")
    half = export_tiny(root, "qwen2", dtype="bf16")
    return {"plain": plain, "fused": root / "fused", "ort": root / "ort", "qwen3": qwen3, "bf16": half}


@pytest.fixture
def models(directories):
    """Loaded afresh for each test, since a test may change one."""
    return {name: load_model(path / "model.onnx") for name, path in directories.items()}


@pytest.fixture(scope="session")
def tokenizer(directories) -> Tokenizer:
    return Tokenizer(directories["plain"], Manifest.load(directories["plain"]))
