"""Tiny fused decoders, made once: tied (qwen2) and untied (qwen3)."""

from pathlib import Path

import pytest

from qcompile.artifact import load_model
from qcompile.passes.base import PassContext
from qcompile.passes.proof import Prover
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("exported")
    return {kind: export_tiny(directory, kind) for kind in ("qwen2", "qwen3")}


@pytest.fixture(scope="session")
def fused(exported, tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("fused")
    for kind, source in exported.items():
        optimize_tiny(source, directory / kind, target="portable")
    return {kind: directory / kind for kind in exported}


@pytest.fixture
def context(fused) -> PassContext:
    return PassContext(load_model(fused["qwen2"] / "model.onnx"), Prover())


@pytest.fixture
def untied(fused) -> PassContext:
    return PassContext(load_model(fused["qwen3"] / "model.onnx"), Prover())
