"""The operators of a kernels folder: which there are, and what they are called in their README."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import KernelError
from qcompile.kernels.tile_table import ROOT, KernelTable, read_tables
from qcompile.text_file import decode_utf8, read_bounded

_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Operator:
    """A folder with kernel.py and tiles.toml.

    Attributes:
        name: Of the folder.
        folder: The folder.
        kernels: The tile table of each @triton.jit function.
        summary: First line of the README under its title that says something; "" without a README.
    """

    name: str
    folder: Path
    kernels: tuple[KernelTable, ...]
    summary: str

    @property
    def source(self) -> Path:
        """The file with the Triton functions."""
        return self.folder / "kernel.py"


def read_operators(folder: Path | None = None, names: tuple[str, ...] = ()) -> tuple[Operator, ...]:
    """Read the operators of a folder, by default qcompile's own, all or those named.

    Raises:
        KernelError: There is no such operator, or a tile table is wrong; says where and what.
    """
    folder = ROOT if folder is None else folder
    there = sorted(path.parent.name for path in folder.glob("*/tiles.toml"))
    if not there and (folder / "tiles.toml").is_file():
        raise KernelError(
            f"{folder}: is an operator itself; give the folder that it lies in, {folder.resolve().parent}"
        )
    if not there:
        raise KernelError(f"{folder}: no operator found; one is a folder with kernel.py and tiles.toml")
    for name in names:
        if name not in there:
            raise KernelError(f"{folder}: no operator '{name}'; there are {', '.join(there)}")
    return tuple(_operator(folder / name) for name in there if not names or name in names)


def _operator(folder: Path) -> Operator:
    kernels = read_tables(folder)
    if not (folder / "kernel.py").is_file():
        raise KernelError(f"{folder}: kernel.py is missing; it holds the functions that tiles.toml names")
    return Operator(folder.name, folder, kernels, _summary(folder / "README.md"))


def _summary(readme: Path) -> str:
    if not readme.is_file():
        return ""
    text = decode_utf8(read_bounded(readme, _LIMIT_BYTES, "too long to list", KernelError), str(readme), KernelError)
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    first = re.sub(r"\s+=", " =", first)  # formulas are laid out in columns, and their = below each other
    return ", ".join(re.split(r"\s{3,}", first))
