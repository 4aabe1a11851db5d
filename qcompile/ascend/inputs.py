"""What `qcompile check` and `qcompile atc` work on: one .onnx file, or every graph of a compiled-model directory."""

from __future__ import annotations

from pathlib import Path

from qcompile.errors import GraphError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest


def onnx_graphs(path: Path) -> list[Path]:
    """Return the .onnx files meant by a path, in the order of the manifest or of their names.

    Raises:
        GraphError: There is none.
        ManifestError: The directory's manifest is damaged.
    """
    if not path.is_dir():
        return [path]
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.load(path)
        listed = [path / entry.file.name for entry in manifest.graphs if entry.file.name.endswith(".onnx")]
        if listed and all(Path(p.name).name == p.name and p.parent == path for p in listed):
            return listed
    found = sorted(path.glob("*.onnx"))
    if not found:
        raise GraphError(f"{path}: holds no .onnx file; name one, or a directory that `qcompile optimize` wrote")
    return found
