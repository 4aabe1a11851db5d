"""The types of paths on a command line: none is empty, and no output takes the place of what is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from qcompile.errors import ArtifactError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest

CHARTS = (".html", ".svg")
_RESULTS = (*CHARTS, ".zip")
_SEEN = "qcompile.given_paths"


class GivenPath(click.Path):
    """A path to read, or a folder to write; the arguments are those of `click.Path`."""

    is_output = False

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path.

        Raises:
            ArtifactError: It is empty, or an output would take the place of a file that is read.
        """
        if not os.fsdecode(value):  # pathlib would make the current folder of it
            name = param.get_error_hint(ctx) if param is not None and ctx is not None else "a path"
            raise ArtifactError(f"{name}: the path is empty; name a file or a folder ('.' is this one)")
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if ctx is not None:
            self._compare(path, ctx)
        return path

    def _compare(self, path: Path, ctx: click.Context) -> None:
        """Keep outputs and inputs apart; options come in any order, so each is compared with those before it."""
        seen: list[tuple[Path, bool]] = ctx.meta.setdefault(_SEEN, [])
        for other, is_output in seen:
            if self.is_output and not is_output:
                refuse_to_overwrite(path, other)
            elif is_output and not self.is_output:
                refuse_to_overwrite(other, path)
        seen.append((path, self.is_output))


class OutputPath(GivenPath):
    """A file to write, or a folder."""

    is_output = True


def refuse_to_overwrite(output: Path, source: Path) -> None:
    """Refuse an output that is `source`, or a file of the model or the folder that `source` is.

    A model is what its manifest lists, so an earlier result may stand beside its files, or a graph with its external data. In
    another folder (a checkpoint, an unpacked package) every file counts but charts and zips.

    Raises:
        ArtifactError: It is one.
    """
    place, read = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if place == read or (output.exists() and source.exists() and output.samefile(source)):
        raise ArtifactError(f"{output}: is what is read, and would be overwritten; name another file to write")
    folder = read if read.is_dir() else read.parent
    if not place.is_relative_to(folder):
        return
    if (folder / MANIFEST_NAME).is_file():
        is_part = place.relative_to(folder).as_posix() in _files_of(folder)
    elif read.suffix.lower() == ".onnx" and place.is_file():
        is_part = any(place == Path(os.path.realpath(folder / name)) for name in _data_of(read))
    else:
        is_part = read.is_dir() and place.is_file() and place.suffix.lower() not in _RESULTS
    if is_part:
        raise ArtifactError(f"{output}: is a file of {folder}, which is read; name a file that is not there yet")


def _data_of(graph: Path) -> set[str]:
    from qcompile.model_reader import external_files  # commands that read no graph start without onnx

    return external_files(graph)


def _files_of(model: Path) -> set[str]:
    manifest = Manifest.load(model)
    graphs = [file.name for entry in manifest.graphs for file in (entry.file, *entry.data)]
    return {MANIFEST_NAME, *graphs, *(file.name for file in manifest.files)}
