"""The models that are loaded, and those that were."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnxruntime as ort

from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.sim.execution import port_bytes
from qcompile.ascend.sim.gears import SELECTOR, Variant
from qcompile.ascend.sim.model_file import SimulatedFile
from qcompile.ascend.sim.streams import Stream


@dataclass
class LoadedModel:
    """A model on the device.

    Attributes:
        file: Its file.
        session: What runs it.
        variants: Inputs and outputs of every gear; one where there are none.
        work: Address and size of its work space.
        owned: Addresses of memory that goes with it.
        current: The gear chosen last, or -1.
    """

    file: SimulatedFile
    session: ort.InferenceSession
    variants: tuple[Variant, ...]
    work: tuple[int, int]
    owned: list[int]
    current: int = -1

    @property
    def has_gears(self) -> bool:
        """Whether it was compiled for several shapes."""
        return bool(self.file.model.gears)

    @property
    def largest(self) -> int:
        """The gear with most input bytes: what runs unless another is chosen."""
        return max(range(len(self.variants)), key=lambda i: sum(port_bytes(port) for port in self.variants[i].inputs))

    @property
    def inputs(self) -> tuple[OmPort, ...]:
        """Inputs as a program must provide for them: those of the largest gear, and the one that selects."""
        ports = self.variants[self.largest].inputs
        if not self.has_gears:
            return ports
        num_open = sum(size < 0 for port in self.file.model.inputs for size in port.shape)
        return (*ports, OmPort(SELECTOR, "i32", (num_open,), "ND"))

    @property
    def outputs(self) -> tuple[OmPort, ...]:
        """Outputs of the largest gear."""
        return self.variants[self.largest].outputs


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
