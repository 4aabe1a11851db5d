"""Read an ONNX model from an untrusted file: graph in memory, weights left on disk as MappedTensors."""

import logging
import os
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompile.errors import GraphError
from qcompile.soundness import check_graph, check_tensor, check_texts, tensors_of
from qcompile.tensors import DataFile, MappedTensor

# It warns of values that nothing gives; here they are an error.
logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)
_MAX_GRAPH_BYTES = 2 << 30
_MAX_ATTRIBUTE_BYTES = 64 << 20


def load_model(path: Path) -> ir.Model:
    """Read an .onnx file; external initializers stay on disk.

    Every reference to external data is checked before anything is read: it must stay inside the model's
    directory (symbolic links followed), the file must exist, and offset and length must lie within it.

    Raises:
        GraphError: The file is missing or not ONNX, or a reference to external data breaks these rules.
    """
    graph_bytes = _read_graph(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(graph_bytes)
    except DecodeError:
        raise _not_onnx(path, "its bytes are not a protobuf message") from None
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise _not_onnx(path, "it has no graph")
    if not proto.opset_import:
        raise _not_onnx(path, "it imports no operator set")
    check_texts(proto, path)
    try:
        for tensor in tensors_of(proto):
            _check_entries(tensor, path)
            check_tensor(tensor, path)
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise GraphError(f"{path}: the graph is malformed: {_first_line(error)}; export it again") from error
    check_graph(model, path)
    _Binder(path).bind(model)
    return model


def external_files(path: Path) -> set[str]:
    """Return the files of external data that an .onnx file names, as it names them; none if it is no such file."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(_read_graph(path))
    except (GraphError, DecodeError):
        return set()
    entries = (entry for tensor in tensors_of(proto) for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location" and "\0" not in entry.value}


def _read_graph(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes >= _MAX_GRAPH_BYTES:
            raise GraphError(f"{path}: {size_bytes} bytes, ONNX files end at 2 GiB; keep the weights in external data")
        return path.read_bytes()
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise GraphError(f"{path}: is a directory, an .onnx file is expected") from None
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror or error}") from error


def _not_onnx(path: Path, reason: str) -> GraphError:
    return GraphError(f"{path}: is not an ONNX model: {reason}")


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_entries(tensor: onnx.TensorProto, path: Path) -> None:
    for entry in tensor.external_data:
        is_number = entry.value.isascii() and entry.value.isdigit() and len(entry.value) < 20
        if entry.key in {"offset", "length"} and not is_number:
            raise GraphError(
                f"{path}: initializer '{tensor.name}' has external data with {entry.key} "
                f"{entry.value!r}; a number of "
                "bytes is expected"
            )


class _Binder:
    """Turns the external tensors of one model into MappedTensors."""

    def __init__(self, model_path: Path) -> None:
        self.model_path = model_path
        # a hub cache holds links to a directory of blobs: what the model file is linked to counts as inside
        self.allowed = {Path(os.path.realpath(model_path.parent)), Path(os.path.realpath(model_path)).parent}
        self.files: dict[str, DataFile] = {}

    def bind(self, model: ir.Model) -> None:
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value = self.mapped(value.const_value)
        for graph_or_function in (*model.graphs(), *model.functions.values()):
            for node in graph_or_function:
                self._bind_attributes(node)

    def _bind_attributes(self, node: ir.Node) -> None:
        for attribute in list(node.attributes.values()):
            if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
                continue
            if not isinstance(attribute.value, ir.ExternalTensor):
                continue
            tensor = self.mapped(attribute.value)
            if tensor.nbytes > _MAX_ATTRIBUTE_BYTES:
                raise GraphError(
                    f"{self.model_path}: node '{node.name}' holds {tensor.nbytes} bytes of external "
                    "data in attribute "
                    f"'{attribute.name}'; weights of this size must be initializers"
                )
            copied = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, copied)

    def mapped(self, tensor: ir.ExternalTensor) -> MappedTensor:
        """Return the checked, mapped form of an external tensor."""
        where = f"{self.model_path}: initializer '{tensor.name}'"
        if any(not isinstance(dim, int) or dim < 0 for dim in tensor.shape):
            raise GraphError(f"{where} has shape {tensor.shape}; weights have fixed, non-negative dimensions")
        if tensor.dtype in {ir.DataType.STRING, ir.DataType.UNDEFINED}:
            raise GraphError(f"{where} has type {tensor.dtype}, which cannot be external data")
        file = self._file(str(tensor.location), where)
        bound = MappedTensor(file, tensor.offset or 0, tensor.dtype, tensor.shape, tensor.name)
        if tensor.length is not None and tensor.length != bound.length:
            raise GraphError(
                f"{where} has {tensor.length} bytes of external data, its type {tensor.dtype} and shape "
                f"{tensor.shape} need {bound.length}"
            )
        offset, length = bound.offset or 0, bound.length or 0
        if offset < 0 or offset + length > file.size_bytes:
            raise GraphError(
                f"{where} lies at bytes {offset} to {offset + length} of {file.path}, which has "
                f"{file.size_bytes}; "
                "the data file is truncated or belongs to another model"
            )
        bound.doc_string = tensor.doc_string
        bound.metadata_props.update(tensor.metadata_props)
        return bound

    def _file(self, location: str, where: str) -> DataFile:
        if location in self.files:
            return self.files[location]
        path = self.model_path.parent / location
        if not location or os.path.isabs(location) or "\0" in location or ".." in Path(location).parts:
            raise GraphError(f"{where} refers to '{location}'; external data must lie in the model's own directory")
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(directory) for directory in self.allowed):
            raise GraphError(f"{where} refers to '{location}', a link that leaves the model's directory; copy the file")
        try:
            self.files[location] = DataFile(path)
        except FileNotFoundError:
            raise GraphError(f"{where}: its data file {path} is missing; copy it next to the model") from None
        except OSError as error:
            raise GraphError(f"{where}: its data file cannot be opened: {error}") from error
        return self.files[location]
