"""Ways in which a compiled-model directory is damaged, each with what every command that reads it must say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

BAD_MODELS: dict[str, Callable[[Path], str]] = {}


def damage(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """Register a damage to a compiled-model directory; it returns what must be said."""
    BAD_MODELS[make.__name__.replace("_", " ")] = make
    return make


def truncate(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@damage
def not_an_onnx_file(model: Path) -> str:
    (model / "model.onnx").write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    return r"model\.onnx"


@damage
def empty_file(model: Path) -> str:
    (model / "model.onnx").write_bytes(b"")
    return r"model\.onnx"


@damage
def truncated_graph(model: Path) -> str:
    truncate(model / "model.onnx", 5000)
    return r"model\.onnx"


@damage
def missing_data(model: Path) -> str:
    (model / "model.onnx.data").unlink()
    return r"model\.onnx\.data"


@damage
def truncated_data(model: Path) -> str:
    truncate(model / "model.onnx.data", 1000)
    return r"model\.onnx\.data"


def _relocate(model: Path, location: str) -> None:
    proto = onnx.load(model / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (model / "model.onnx").write_bytes(proto.SerializeToString())


@damage
def data_at_an_absolute_path(model: Path) -> str:
    secret = model.parent / "secret"
    shutil.copy(model / "model.onnx.data", secret)
    _relocate(model, str(secret))
    return "secret"


@damage
def data_above_the_directory(model: Path) -> str:
    shutil.copy(model / "model.onnx.data", model.parent / "secret")
    _relocate(model, "../secret")
    return r"\.\./secret"


@damage
def data_behind_a_link(model: Path) -> str:
    shutil.move(model / "model.onnx.data", model.parent / "secret")
    os.symlink(model.parent / "secret", model / "model.onnx.data")
    return r"model\.onnx\.data"


@damage
def no_graph(model: Path) -> str:
    (model / "model.onnx").unlink()
    return r"model\.onnx"
