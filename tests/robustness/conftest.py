from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from tests.optimized import export_tiny
from tests.robustness.edits import Edit


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("robust"))


@pytest.fixture
def edited(exported, tmp_path) -> Callable[..., Path]:
    def write(edit: Edit, *, config: bool = True) -> Path:
        proto = onnx.load(exported / "model.onnx")
        edit(proto)
        path = tmp_path / "in" / "model.onnx"
        path.parent.mkdir()
        onnx.save(proto, path)
        if config:
            text = (exported.parent / "qwen2-checkpoint" / "config.json").read_text()
            (path.parent / "config.json").write_text(text)
        return path

    return write
