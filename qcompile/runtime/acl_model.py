"""One .om on the device: its inputs and outputs by name, and the buffers bound to them."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import numpy as np

from .acl_device import AclDevice
from .errors import SessionError
from .manifest import GraphEntry

# ACL's numbers of element types; bfloat16 has no NumPy type, its bits are uint16
_DTYPES = {
    0: np.float32,
    1: np.float16,
    2: np.int8,
    3: np.int32,
    4: np.uint8,
    9: np.int64,
    10: np.uint64,
    27: np.uint16,
}
_BFLOAT16 = 27


@dataclass(frozen=True)
class AclPort:
    """An input or output: name as in the ONNX graph, size in bytes, ACL's number of its element type."""

    name: str
    size_bytes: int
    acl_type: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.size_bytes // np.dtype(_DTYPES[self.acl_type]).itemsize

    def array(self, raw: np.ndarray) -> np.ndarray:
        """Return bytes as elements; floating-point numbers as float32."""
        elements = raw[: self.size_bytes].view(_DTYPES[self.acl_type])
        if self.acl_type == _BFLOAT16:
            return (elements.astype(np.uint32) << 16).view(np.float32)
        return elements.astype(np.float32) if elements.dtype.kind == "f" else elements


class AclModel:
    """A loaded model with a data set for its inputs and one for its outputs.

    Args:
        device: Where.
        path: The .om, for messages.
        entry: What the manifest says of it.
        load: Loads it; returns its number.

    Raises:
        SessionError: It cannot be loaded, or is not what the manifest says; nothing of it is left on the device.
    """

    def __init__(self, device: AclDevice, path: Path, entry: GraphEntry, load: Callable[[], int]) -> None:
        self.device, self.path, self.entry = device, path, entry
        assert entry.bucket is not None
        self.batch, self.query_len, self.kv_len = entry.bucket
        self._open = ExitStack()
        self._bound: Dict[str, int] = {}
        self._buffers: Dict[str, int] = {}
        self._inputs = self._outputs = 0
        try:
            self._number = load()
            self._at_close("acl.mdl.unload", device.acl.mdl.unload, self._number)
            self._describe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unload; harmless when repeated."""
        self._open.close()

    def bind(self, addresses: Dict[str, int]) -> None:
        """Let inputs and outputs be at these addresses: all of them at first, then those that may have moved."""
        if not self._inputs:
            self._inputs = self._dataset(self.inputs, addresses)
            self._outputs = self._dataset(self.outputs, addresses)
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                code = self.device.acl.update_data_buffer(self._buffers[name], address, self.ports[name].size_bytes)
                self.device.call("acl.update_data_buffer", code)
                self._bound[name] = address

    def enqueue(self) -> None:
        """Put an execution on the stream."""
        mdl = self.device.acl.mdl
        code = mdl.execute_async(self._number, self._inputs, self._outputs, self.device.stream)
        if code != 0:
            raise SessionError(f"{self.path}: {self.device.failure('acl.mdl.execute_async', code)}")

    def _describe(self) -> None:
        mdl, device = self.device.acl.mdl, self.device
        description = mdl.create_desc()
        try:
            device.call("acl.mdl.get_desc", mdl.get_desc(description, self._number))
            self.inputs = [
                AclPort(
                    mdl.get_input_name_by_index(description, i),
                    mdl.get_input_size_by_index(description, i),
                    mdl.get_input_data_type(description, i),
                )
                for i in range(mdl.get_num_inputs(description))
            ]
            self.outputs = [
                AclPort(
                    # node:index:tensor
                    mdl.get_output_name_by_index(description, i).rsplit(":", 1)[-1],
                    mdl.get_output_size_by_index(description, i),
                    mdl.get_output_data_type(description, i),
                )
                for i in range(mdl.get_num_outputs(description))
            ]
        finally:
            mdl.destroy_desc(description)
        self.ports = {port.name: port for port in (*self.inputs, *self.outputs)}
        self._check(self.inputs, self.entry.io.inputs, "inputs")
        self._check(self.outputs, self.entry.io.outputs, "outputs")

    def _check(self, ports: Sequence[AclPort], wanted: Sequence[str], kind: str) -> None:
        seen = [port.name for port in ports]
        if sorted(seen) != sorted(wanted):
            odd = ", ".join(sorted(set(seen) ^ set(wanted))[:4])
            raise SessionError(f"{self.path}: its {kind} differ from the manifest's ({odd}); compile the model again")
        strange = [port for port in ports if port.acl_type not in _DTYPES or port.size_bytes <= 0]
        if strange:
            raise SessionError(
                f"{self.path}: '{strange[0].name}' has ACL's element type {strange[0].acl_type} and {strange[0].size_bytes} "
                "bytes; fixed shapes and known types are wanted"
            )

    def _dataset(self, ports: Sequence[AclPort], addresses: Dict[str, int]) -> int:
        """Return a data set with a buffer per input or output."""
        acl, device = self.device.acl, self.device
        dataset: int = acl.mdl.create_dataset()
        self._at_close("acl.mdl.destroy_dataset", acl.mdl.destroy_dataset, dataset)
        for port in ports:
            buffer: int = acl.create_data_buffer(addresses[port.name], port.size_bytes)
            self._at_close("acl.destroy_data_buffer", acl.destroy_data_buffer, buffer)
            _, code = acl.mdl.add_dataset_buffer(dataset, buffer)
            device.call("acl.mdl.add_dataset_buffer", code)
            self._buffers[port.name], self._bound[port.name] = buffer, addresses[port.name]
        return dataset

    def _at_close(self, name: str, function: Any, argument: int) -> None:
        self._open.callback(self.device.release, name, function, argument)
