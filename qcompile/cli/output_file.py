"""The type of options that name a file to write: looked at before the work, not after an hour of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from qcompile.cli.given_path import CHARTS, OutputPath
from qcompile.errors import ArtifactError

__all__ = ["CHARTS", "OutputFile"]

_MAX_NAME_BYTES = 200  # of 255: what stands beside the file, or for a moment in its place, has a longer name


class OutputFile(OutputPath):
    """A file that can be written, as far as that can be seen before.

    Args:
        endings: Those that its name may have; any without them.
    """

    def __init__(self, endings: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path.

        Raises:
            ArtifactError: Nothing can be written there, or its ending says that something else is wanted.
        """
        path = super().convert(value, param, ctx)
        if path.is_dir():
            raise ArtifactError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():  # what is written takes the file's place: /dev/null would be gone
            raise ArtifactError(f"{path}: is a device or a pipe; name a file")
        if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
            raise ArtifactError(f"{path.name[:40]}…: the file's name is too long; take a shorter one")
        if self.endings and path.suffix.lower() not in self.endings:
            raise ArtifactError(f"{path}: wanted a name that ends in {' or '.join(self.endings)}")
        if not path.parent.is_dir():
            raise ArtifactError(f"{path}: cannot be written: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK):
            raise ArtifactError(f"{path}: cannot be written: the folder {path.parent} is read-only; name another one")
        return path
