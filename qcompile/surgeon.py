"""Run a user's onnx-graphsurgeon function as a pass, with the weights left on disk.

    def drop_second_output(graph: gs.Graph) -> gs.Graph: ...      # in edit.py
    model = apply_surgery(model, "edit.py:drop_second_output")

The function sees every weight as a `gs.Constant` whose `values` are read when asked for. What it does not ask
for, or asks for and leaves as it was, stays where it is: memory follows what it touches. What graphsurgeon
would lose on the way (metadata, functions the user did not change) is put back.
"""

from __future__ import annotations

import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues

from qcompile.errors import PassError
from qcompile.tensors import Array

# Initializers above this size travel as references; smaller ones are cheaper inside the graph.
_INLINE_BYTES = 1024
_LOCATION = "qcompile:weight"
_LOST_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.TENSORS,
        ir.AttributeType.GRAPHS,
        ir.AttributeType.SPARSE_TENSOR,
        ir.AttributeType.SPARSE_TENSORS,
        ir.AttributeType.TYPE_PROTO,
        ir.AttributeType.TYPE_PROTOS,
    }
)

Surgery = Callable[[gs.Graph], gs.Graph]


def apply_surgery(model: ir.Model, spec: str) -> ir.Model:
    """Return what the function `spec` names makes of `model`; `model` itself is left as it was.

    Args:
        model: Any model; its weights may be of any tensor class and are not read.
        spec: `file.py:function`; the function takes a `gs.Graph` and returns one.

    Raises:
        PassError: There is no such file or function, it raised, or what it returned is not a valid graph.
    """
    path, name = _split(spec)
    with _importable(path.parent):
        function = _load_function(path, name)
        shelf = _Shelf()
        functions = {}
        with _quiet_surgeon(), _refusing(spec, "onnx-graphsurgeon cannot read the graph"):
            _refuse_what_would_be_lost(model, spec)
            graph = gs.import_onnx(shelf.without_weights(model))
            shelf.hand_out(graph)
            functions = {f.unique_id: _exported(f) for f in graph.functions}
        result = _call(function, graph, spec, path)
    with _quiet_surgeon(), _refusing(spec, "the graph it returned cannot be written"):
        shelf.take_back(result)
        changed: ir.Model = ir.from_proto(gs.export_onnx(result))
        shelf.put_back(changed)
        _restore_functions(model, changed, result, functions)
    _restore_metadata(model, changed)
    _check(changed, spec)
    return changed


def _split(spec: str) -> tuple[Path, str]:
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise PassError(f"--surgery '{spec}': write it as file.py:function")
    path = Path(file)
    if not path.is_file():
        raise PassError(f"--surgery '{spec}': no file {path}")
    return path.resolve(), name


def _load_function(path: Path, name: str) -> Surgery:
    module = types.ModuleType(f"qcompile_surgery_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise PassError(f"{path}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise PassError(f"{_where(error, path)}: {_what(error)}, while the file was loaded") from error
    function = getattr(module, name, None)
    if not callable(function):
        there_are = [n for n, v in vars(module).items() if isinstance(v, types.FunctionType)]
        raise PassError(f"{path}: has no function '{name}'; there are: {', '.join(there_are) or 'none'}")
    surgery: Surgery = function
    return surgery


def _call(function: Surgery, graph: gs.Graph, spec: str, path: Path) -> gs.Graph:
    try:
        result = function(graph)
    except (Exception, SystemExit) as error:
        raise PassError(f"{_where(error, path)}: {_what(error)}, raised by --surgery '{spec}'") from error
    if not isinstance(result, gs.Graph):
        raise PassError(
            f"--surgery '{spec}': returned {type(result).__name__}, a gs.Graph is expected; "
            "end the function with `return graph`"
        )
    return result


def _where(error: BaseException, path: Path) -> str:
    """Return file and line of the deepest frame in the user's file."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}:{frames[-1].lineno}" if frames else str(path)


def _what(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _DiskValues(LazyValues):  # type: ignore[misc]
    """Values of a `gs.Constant` that are read from the tensor they stand for when asked for."""

    def __init__(self, tensor: onnx.TensorProto, source: ir.TensorProtocol) -> None:
        super().__init__(tensor)
        self.source = source

    def load(self) -> Array:
        """Return a copy, so that the user may change it in place."""
        return np.array(self.source.numpy())


class _Shelf:
    """Keeps the large tensors while references to them go through graphsurgeon."""

    def __init__(self) -> None:
        self.tensors: list[ir.TensorProtocol] = []
        self.handed_out: dict[int, tuple[gs.Constant, ir.TensorProtocol]] = {}

    def without_weights(self, model: ir.Model) -> onnx.ModelProto:
        """Return the model as a proto whose large initializers are references to this shelf."""
        kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
        try:
            for graph in model.graphs():
                for value in graph.initializers.values():
                    tensor = value.const_value
                    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= _INLINE_BYTES:
                        continue
                    kept.append((value, tensor))
                    value.const_value = self._reference(tensor, value.name or "")
            proto: onnx.ModelProto = ir.to_proto(model)
            return proto
        finally:
            for value, tensor in kept:
                value.const_value = tensor

    def hand_out(self, graph: gs.Graph) -> None:
        """Make the references in `graph` readable."""
        for constant in _constants(graph):
            proto = constant._values.tensor
            place = _place(proto) if isinstance(proto, onnx.TensorProto) else None
            if place is not None:
                constant._values = _DiskValues(proto, self.tensors[place])
                constant.data_location = None
                self.handed_out[id(constant)] = constant, self.tensors[place]

    def take_back(self, graph: gs.Graph) -> None:
        """Turn every large constant of `graph` into a reference again, one proto each."""
        for constant in _constants(graph):
            values = constant._values
            if isinstance(values, _DiskValues):
                tensor = values.source
            elif (
                isinstance(values, np.ndarray)
                and values.nbytes > _INLINE_BYTES
                and constant.export_dtype == values.dtype
            ):
                tensor = self._unchanged(constant, values) or ir.Tensor(values, name=constant.name)
            else:
                continue
            reference = self._reference(tensor, constant.name)
            constant._values = LazyValues(ir.serde.serialize_tensor(reference))

    def put_back(self, model: ir.Model) -> None:
        """Give the initializers of `model` the tensors their references stand for."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == _LOCATION:
                    value.const_value = self.tensors[tensor.offset or 0]

    def _unchanged(self, constant: gs.Constant, values: Array) -> ir.TensorProtocol | None:
        _, source = self.handed_out.get(id(constant), (None, None))
        if source is None or source.dtype.numpy() != values.dtype:
            return None
        stored = source.numpy()
        same = stored.shape == values.shape and stored.tobytes() == values.tobytes()
        return source if same else None

    def _reference(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        self.tensors.append(tensor)
        return ir.ExternalTensor(
            _LOCATION,
            len(self.tensors) - 1,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )


def _place(proto: onnx.TensorProto) -> int | None:
    entries = {entry.key: entry.value for entry in proto.external_data}
    return int(entries["offset"]) if entries.get("location") == _LOCATION else None


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for part in (graph, *graph.subgraphs(recursive=True)):
        for tensor in part.tensors().values():
            if isinstance(tensor, gs.Constant):
                yield tensor


def _refuse_what_would_be_lost(model: ir.Model, spec: str) -> None:
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type in _LOST_ATTRIBUTES:
                raise PassError(
                    f"--surgery '{spec}': node '{node.name}' has attribute '{attribute.name}' of type "
                    f"{attribute.type.name}, which onnx-graphsurgeon would drop"
                )


def _exported(function: gs.Function) -> bytes:
    exported: bytes = gs.exporters.onnx_exporter.OnnxExporter.export_function(function).SerializeToString()
    return exported


def _restore_functions(before: ir.Model, after: ir.Model, graph: gs.Graph, imported: dict[object, bytes]) -> None:
    """Keep the original of every function the user did not change: graphsurgeon's copy lost its metadata."""
    for function in graph.functions:
        identifier = (function.domain or "", function.name, "")
        original = before.functions.get(identifier)
        if original is not None and imported.get(function.unique_id) == _exported(function):
            after.functions[identifier] = original.clone()


def _restore_metadata(before: ir.Model, after: ir.Model) -> None:
    after.metadata_props.update(before.metadata_props)
    after.graph.metadata_props.update(before.graph.metadata_props)
    after.doc_string = before.doc_string
    nodes = {node.name: node for node in before.graph.all_nodes() if node.name}
    for node in after.graph.all_nodes():
        original = nodes.get(node.name or "")
        if original is not None and original.op_identifier() == node.op_identifier():
            node.metadata_props.update(original.metadata_props)
            node.doc_string = original.doc_string


def _check(model: ir.Model, spec: str) -> None:
    """Sort the graph and make sure that everything it reads is produced somewhere."""
    for value in model.graph.outputs:
        if value.producer() is None and not _is_given(value):
            raise PassError(f"--surgery '{spec}': nothing produces graph output '{value.name}'")
    for node in model.graph.all_nodes():
        for read in node.inputs:
            if read is not None and read.producer() is None and not _is_given(read):
                raise PassError(
                    f"--surgery '{spec}': node '{node.name}' ({node.op_type}) reads '{read.name}', "
                    "which nothing produces"
                )
    try:
        model.graph.sort()
    except ValueError as error:
        raise PassError(f"--surgery '{spec}': the graph it returned has a cycle: {error}") from error


def _is_given(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_initializer()


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """Let the user's file import what lies beside it, as a script could."""
    sys.path.insert(0, str(directory))
    known = set(sys.modules)
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in set(sys.modules) - known:
            if name.startswith("qcompile_surgery_"):
                del sys.modules[name]


@contextmanager
def _quiet_surgeon() -> Iterator[None]:
    """Keep graphsurgeon's global logger from printing at every dtype it does not know."""
    severity = gs.logger.G_LOGGER.severity
    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    try:
        yield
    finally:
        gs.logger.G_LOGGER.severity = severity


@contextmanager
def _refusing(spec: str, what: str) -> Iterator[None]:
    """Turn whatever graphsurgeon raises (its classes share no base) into one line."""
    try:
        yield
    except PassError:
        raise
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise PassError(f"--surgery '{spec}': {what}: {_what(error)}") from error
