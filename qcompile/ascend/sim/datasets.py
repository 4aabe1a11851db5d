"""Data sets and data buffers: what a model's inputs and outputs are bound with."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataBuffer:
    """An address with a size."""

    address: int
    size_bytes: int


@dataclass
class Dataset:
    """Handles of data buffers, in the order of a model's inputs or outputs, and the gear chosen for them (-1: none)."""

    buffers: list[int] = field(default_factory=list)
    gear: int = -1
