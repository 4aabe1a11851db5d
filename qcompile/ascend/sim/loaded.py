"""The models that are loaded, and those that were."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnxruntime as ort

from qcompile.ascend.sim.model_file import SimulatedFile
from qcompile.ascend.sim.streams import Stream


@dataclass
class LoadedModel:
    """A model on the device.

    Attributes:
        file: Its file.
        session: What runs it.
        work: Address and size of its work space.
        owned: Addresses of memory that goes with it.
    """

    file: SimulatedFile
    session: ort.InferenceSession
    work: tuple[int, int]
    owned: list[int]


@dataclass
class LoadedModels:
    """Models by number, numbers that were unloaded, and the stream each ran on last."""

    models: dict[int, LoadedModel] = field(default_factory=dict)
    unloaded: set[int] = field(default_factory=set)
    stream_of: dict[int, Stream] = field(default_factory=dict)
    _next: int = 1

    def add(self, model: LoadedModel) -> int:
        """Return a number for a model."""
        number, self._next = self._next, self._next + 1
        self.models[number] = model
        return number
