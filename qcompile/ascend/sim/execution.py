"""Run a simulated .om: its lowered graph through the definitions of its operators, on ONNX Runtime.

Weights are widened to float32 once and shared by all models as mapped files in a scratch directory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.reference import WideWeights, reference_model
from qcompile.ascend.sim.gears import Variant, with_shapes
from qcompile.ascend.sim.model_file import SimulatedFile
from qcompile.errors import GraphError
from qcompile.runtime.ort_options import session_options
from qcompile.tensors import MappedTensor, pieces_of

_NUMPY: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i64": np.int64, "i32": np.int32, "i8": np.int8,
    "u8": np.uint8, "u64": np.uint64, "bool": np.bool_, "i16": np.int16, "u32": np.uint32, "f64": np.float64,
}  # fmt: skip
_HALVES = {"f16", "bf16"}
_SMALL_BYTES = 1024


def element_type(port: OmPort) -> np.dtype[Any]:
    """Return the NumPy type of an input or output."""
    dtype: np.dtype[Any] = np.dtype(_NUMPY[port.dtype])
    return dtype


def port_bytes(port: OmPort) -> int:
    """Return its size."""
    return int(np.prod(port.shape, dtype=np.int64)) * element_type(port).itemsize


class Workshop:
    """The scratch directory where models become runnable.

    Args:
        threads: Computing threads of a model.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._scratch = tempfile.TemporaryDirectory(prefix="qcompile-simulated-")
        self._shared: WideWeights = {}
        self._files: dict[object, tuple[str, ir.TensorProtocol]] = {}  # the tensors are kept: their ids stay taken
        self._count = 0

    def close(self) -> None:
        """Delete the scratch directory."""
        self._scratch.cleanup()

    def prepare(self, file: SimulatedFile) -> ort.InferenceSession:
        """Return a session over the definitions of a file's operators.

        Raises:
            GraphError: ONNX Runtime refuses it.
            OSError: There is no room for the widened weights.
        """
        twin = reference_model(file.graph, shared=self._shared)
        for value in twin.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _SMALL_BYTES:
                value.const_value = ir.ExternalTensor(
                    self._place(tensor),
                    0,
                    tensor.nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                )
        self._count += 1
        path = Path(self._scratch.name) / f"{self._count}.onnx"
        path.write_bytes(ir.to_proto(twin).SerializeToString())
        options = session_options(ort, self._threads)
        options.add_session_config_entry("session.disable_prepacking", "1")  # a second copy of the weights per model
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise GraphError(f"{file.path}: cannot be run by its definitions: {error}") from None

    def _place(self, tensor: ir.TensorProtocol) -> str:
        is_mapped = isinstance(tensor, MappedTensor)
        key = (str(tensor.file.path), tensor.offset, tensor.length) if is_mapped else id(tensor)  # type: ignore[attr-defined]
        if key not in self._files:
            name = f"weight{len(self._files)}.data"
            with (Path(self._scratch.name) / name).open("wb") as stream:
                for _, piece in pieces_of(tensor):
                    stream.write(piece().data)
            self._files[key] = name, tensor
        return self._files[key][0]


def run_once(
    session: ort.InferenceSession, path: Path, variant: Variant, inputs: Mapping[str, npt.NDArray[np.uint8]]
) -> list[npt.NDArray[np.uint8]]:
    """Run a model on the bytes of its inputs; returns the bytes of its outputs, in order.

    Raises:
        GraphError: It fails.
    """
    made = []
    for port, output in zip(variant.outputs, _outputs(session, path, variant, inputs), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            typed = np.ascontiguousarray(output.astype(element_type(port), copy=False))
        made.append(typed.reshape(-1).view(np.uint8))
    return made


def variants_of(session: ort.InferenceSession, file: SimulatedFile) -> tuple[Variant, ...]:
    """Return what goes in and out in every gear; open shapes of outputs are found by running each once, on zeros.

    Raises:
        GraphError: A gear cannot be run.
    """
    model = file.model
    if not model.gears and all(size >= 0 for port in model.outputs for size in port.shape):
        return (Variant(model.inputs, model.outputs),)
    found = []
    for shapes in model.gears or [tuple(port.shape for port in model.inputs)]:
        variant = Variant(with_shapes(model.inputs, shapes), model.outputs)
        zeros = {port.name: np.zeros(port_bytes(port), np.uint8) for port in variant.inputs}
        outputs = _outputs(session, file.path, variant, zeros)
        found.append(Variant(variant.inputs, with_shapes(model.outputs, [output.shape for output in outputs])))
    return tuple(found)


def _outputs(
    session: ort.InferenceSession, path: Path, variant: Variant, inputs: Mapping[str, npt.NDArray[np.uint8]]
) -> list[npt.NDArray[Any]]:
    known = {value.name for value in session.get_inputs()}
    feeds = {}
    for port in variant.inputs:
        array = inputs[port.name].view(element_type(port)).reshape(port.shape)
        if port.name in known:
            feeds[port.name] = array.astype(np.float32) if port.dtype in _HALVES else array
    names = [port.name.rsplit(":", 1)[-1] for port in variant.outputs]
    try:
        return [np.asarray(output) for output in session.run(names, feeds)]
    except Exception as error:
        raise GraphError(f"{path}: failed while it ran: {error}") from None
