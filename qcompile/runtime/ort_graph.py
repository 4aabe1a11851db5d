"""One ONNX graph loaded by ONNX Runtime: inputs and outputs by name, dtypes, errors in one line."""

import ctypes
import re
from pathlib import Path
from typing import Any, Dict, Tuple, Type

import numpy as np

from .attention_kernel import attention_kernel
from .errors import SessionError
from .huge_pages import huge_pages
from .manifest import GraphIO, ModelShape
from .ort_options import session_options

_FIRST_WITH_CHUNKS = (1, 20)  # before 1.20 GroupQueryAttention ignores the past when S > 1


class ElementType:
    """An element type: its number in ONNX and the NumPy dtype that holds its bits (uint16 for bfloat16)."""

    def __init__(self, onnx_type: int, dtype: Any) -> None:
        self.onnx_type = onnx_type
        self.dtype = np.dtype(dtype)

    @property
    def binding_type(self) -> Any:
        """What ONNX Runtime's I/O binding wants: a NumPy type, or the ONNX number where NumPy has none."""
        return self.onnx_type if self is BFLOAT16 else self.dtype.type

    def to_float32(self, array: np.ndarray) -> np.ndarray:
        """Return the numbers as float32; no copy if they are already."""
        if self is BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(array, dtype=np.float32)


FLOAT = ElementType(1, np.float32)
FLOAT16 = ElementType(10, np.float16)
BFLOAT16 = ElementType(16, np.uint16)
INT8 = ElementType(3, np.int8)  # a KV cache whose scales are in the graph
_ELEMENT_TYPES = {
    "tensor(float)": FLOAT,
    "tensor(float16)": FLOAT16,
    "tensor(bfloat16)": BFLOAT16,
    "tensor(int8)": INT8,
}


class OrtGraph:
    """An ONNX Runtime session on the CPU.

    Args:
        path: The model file; external data lies beside it.
        threads: Threads inside one operator.
        shape: Head counts and sizes that the cache inputs must have.
        io: The interface the manifest declares.

    Raises:
        SessionError: onnxruntime is missing, cannot load the graph, or the graph is not what the manifest
            says.
    """

    def __init__(self, path: Path, threads: int, shape: ModelShape, io: GraphIO) -> None:
        self.path = path
        self.ort, self._errors = _import_onnxruntime()
        self.shape = shape
        self.session = self._load(threads, io)
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.input_ranks = {name: len(value.shape) for name, value in inputs.items()}
        self._check_names(io)
        self.past = tuple(name for name in inputs if name.startswith("past_key_values."))
        self.present = tuple(name.replace("past_key_values.", "present.", 1) for name in self.past)
        self._check_cache(inputs)
        self.cache_type = self._element_type(inputs[self.past[0]])
        self.logits_type = self._element_type(outputs["logits"])

    @property
    def can_extend(self) -> bool:
        """Whether this ONNX Runtime's GroupQueryAttention takes several tokens behind a past."""
        return tuple(int(part) for part in re.findall(r"\d+", self.ort.__version__)[:2]) >= _FIRST_WITH_CHUNKS

    def run_bound(self, binding: Any) -> None:
        """Run with everything bound; a failure of ONNX Runtime becomes a SessionError."""
        try:
            self.session.run_with_iobinding(binding)
        except self._errors as error:
            raise SessionError(f"{self.path}: ONNX Runtime failed: {one_line(error)}") from None

    def run(self, feeds: Dict[str, Any]) -> Dict[str, Any]:
        """Run on OrtValues by input name; return the output OrtValues by name."""
        try:
            values = self.session.run_with_ort_values(list(self.outputs), feeds)
        except self._errors as error:
            raise SessionError(f"{self.path}: ONNX Runtime failed: {one_line(error)}") from None
        return dict(zip(self.outputs, values))

    def value(self, array: np.ndarray, element_type: ElementType) -> Any:
        """Wrap an array as an OrtValue of that type; it shares the array's memory."""
        if element_type is not BFLOAT16:
            return self.ort.OrtValue.ortvalue_from_numpy(array)
        if not hasattr(self.ort.OrtValue, "ortvalue_from_numpy_with_onnx_type"):
            raise SessionError(
                f"{self.path}: onnxruntime {self.ort.__version__} cannot be given bfloat16 tensors; "
                "install onnxruntime >= 1.20, or export with --dtype fp32"
            )
        return self.ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16.onnx_type)

    def _load(self, threads: int, io: GraphIO) -> Any:
        options = session_options(self.ort, threads)
        options.inter_op_num_threads = 1
        try:
            with huge_pages(), attention_kernel(io):
                return self.ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except self._errors as error:
            reason = one_line(error)
        if io.dtype == "bfloat16" and "Could not find an implementation" in reason:
            raise SessionError(
                f"{self.path}: ONNX Runtime's CPU has no bfloat16 kernel for this graph ({reason}); "
                "export and optimize with --dtype fp32 or fp16 to run it here"
            )
        raise SessionError(f"{self.path}: ONNX Runtime {self.ort.__version__} cannot load it: {reason}")

    def _check_names(self, io: GraphIO) -> None:
        for kind, seen, wanted in (("inputs", self.inputs, io.inputs), ("outputs", self.outputs, io.outputs)):
            if set(seen) != set(wanted):
                odd = ", ".join(sorted(set(seen) ^ set(wanted))[:4])
                raise SessionError(
                    f"{self.path}: its {kind} differ from the manifest's ({odd}); compile the model again"
                )
        if "input_ids" not in self.inputs or "logits" not in self.outputs:
            raise SessionError(f"{self.path}: a decoder needs an input 'input_ids' and an output 'logits'")

    def _check_cache(self, inputs: Dict[str, Any]) -> None:
        layers, heads, size = (
            self.shape.num_hidden_layers,
            self.shape.num_key_value_heads,
            self.shape.head_dim,
        )
        if len(self.past) != 2 * layers or set(self.present) - set(self.outputs):
            raise SessionError(
                f"{self.path}: {len(self.past)} past_key_values inputs and their present outputs, "
                f"wanted {2 * layers} for {layers} layers; compile the model again"
            )
        for name in self.past:
            dims = inputs[name].shape
            if len(dims) != 4 or any(isinstance(d, int) and d != w for d, w in ((dims[1], heads), (dims[3], size))):
                raise SessionError(f"{self.path}: '{name}' has shape {dims}, wanted [B, {heads}, T, {size}]")

    def _element_type(self, value: Any) -> ElementType:
        if value.type not in _ELEMENT_TYPES:
            raise SessionError(
                f"{self.path}: '{value.name}' is {value.type}, wanted one of {', '.join(_ELEMENT_TYPES)}"
            )
        return _ELEMENT_TYPES[value.type]


def view(value: Any, element_type: ElementType) -> np.ndarray:
    """Return the memory of an OrtValue on the CPU as an array, not copied; the OrtValue must outlive it."""
    shape = tuple(value.shape())
    size_bytes = int(np.prod(shape, dtype=np.int64)) * element_type.dtype.itemsize
    if size_bytes == 0:
        return np.empty(shape, element_type.dtype)
    memory = (ctypes.c_char * size_bytes).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype=element_type.dtype).reshape(shape)


def one_line(error: BaseException) -> str:
    """Return the essence of an ONNX Runtime error: one line, without prefixes and C++ source paths."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"^Error in execution: ", "", text)
    text = re.sub(r"/\S*onnxruntime\S*\.(cc|h|cpp):\d+ ", "", text)
    return text[:400] or type(error).__name__


def _import_onnxruntime() -> Tuple[Any, Tuple[Type[BaseException], ...]]:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise SessionError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from None
    own = [c for c in vars(state).values() if isinstance(c, type) and issubclass(c, Exception)]
    return onnxruntime, (RuntimeError, ValueError, *own)
