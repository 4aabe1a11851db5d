"""Rules about the model as a whole: files, operator sets, inputs, functions, ATC's own options."""

from __future__ import annotations

import re
from collections.abc import Iterator

from onnx import TensorShapeProto

from qcompile.ascend.chips import Cann
from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import SLOW, WRONG, Context, ModelRule, about_model, shape_text
from qcompile.ascend.legality.types import PARSED

_MAX_FILE_BYTES = 2 << 30
_EMPTY_DOMAIN_FREE = Cann(9, 2)  # "support empty onnx domain", 2026-07
_FILE_NAME = re.compile(r"[A-Za-z0-9_\-.\u4e00-\u9fff]+")
_QUANT = frozenset({"AscendQuant", "AscendDequant"})


def file_size(context: Context) -> Iterator[Finding]:
    """The protobuf file itself must stay below 2 GiB."""
    size = context.view.file.size_bytes
    if size >= _MAX_FILE_BYTES:
        yield about_model(
            "file-too-large",
            "E16004",
            seen=f"an .onnx file of {size} bytes",
            wanted="less than 2147483648 bytes",
            cure="save the weights as external data beside it (`qcompile export` and `qcompile optimize` do)",
        )


def file_name(context: Context) -> Iterator[Finding]:
    """ATC takes letters, digits, `_`, `-`, `.` and Chinese characters in paths."""
    name = context.view.file.path.name
    if not _FILE_NAME.fullmatch(name):
        yield about_model(
            "file-name",
            "E10001",
            seen=f"the file name {name!r}",
            wanted="letters, digits, _ - . and Chinese characters",
            cure="rename the file",
        )


def external_data_names(context: Context) -> Iterator[Finding]:
    """External data lies beside the model, under a plain name."""
    seen = set()
    for tensor in context.view.model.graph.initializer:
        location = next((e.value for e in tensor.external_data if e.key == "location"), "")
        if "/" in location and location not in seen:
            seen.add(location)
            yield about_model(
                "external-data-location",
                "E19999",
                name=tensor.name,
                certain=False,
                seen=f"external data in '{location}'",
                wanted="a plain file name beside the .onnx file",
                cure="move the data file next to the model and save it again",
            )


def has_graph(context: Context) -> Iterator[Finding]:
    """A model has a graph with inputs and outputs."""
    graph = context.view.model.graph
    if not context.view.model.HasField("graph") or not graph.node:
        yield about_model(
            "no-graph", "E16004", seen="a model without nodes", wanted="a graph", cure="export the model again"
        )
    elif not context.view.inputs or not graph.output:
        yield about_model(
            "no-input-or-output",
            "E16001",
            seen=f"{len(context.view.inputs)} inputs and {len(graph.output)} outputs",
            wanted="at least one of each",
            cure="declare the graph's inputs and outputs",
        )


def opset_imports(context: Context) -> Iterator[Finding]:
    """Before GE 9.2, nodes without a domain need exactly one opset_import."""
    imports = context.view.model.opset_import
    listed = ", ".join(f"'{o.domain}' {o.version}" for o in imports) or "none"
    if not imports:
        yield about_model(
            "opset-import-missing", "E19999", seen="no opset_import", wanted="one", cure='import domain "" at opset 16'
        )
        return
    names = [o.domain for o in imports]
    duplicates = len(set(names)) < len(names)
    has_empty = any(not node.proto.domain for node in context.view.nodes)
    if len(imports) > 1 and (duplicates or (has_empty and context.cann < _EMPTY_DOMAIN_FREE)):
        yield about_model(
            "opset-import-several",
            "E16005",
            seen=f"{len(imports)} opset_import entries ({listed})",
            wanted="exactly one, because nodes have an empty domain",
            cure='put every node into domain "" and import only "" at opset 16',
        )


def functions(context: Context) -> Iterator[Finding]:
    """ONNX functions are not inlined by the parser."""
    called = {(node.proto.domain, node.op) for node in context.view.nodes}
    for function in context.view.model.functions:
        if (function.domain, function.name) not in called:
            yield about_model(
                "function-left",
                "E16005",
                name=function.name,
                certain=False,
                seen=f"the function {function.domain}::{function.name}, which nothing calls",
                wanted="no functions",
                cure="remove it (`qcompile optimize` with an Ascend target does)",
            )


def sparse_initializers(context: Context) -> Iterator[Finding]:
    """Sparse initializers have no parser."""
    for tensor in context.view.model.graph.sparse_initializer:
        yield about_model(
            "sparse-initializer",
            "E19999",
            name=tensor.values.name,
            certain=False,
            seen="a sparse initializer",
            wanted="a dense one",
            cure="store the tensor densely",
        )


def input_shapes(context: Context) -> Iterator[Finding]:
    """Dimensions that are not numbers need --input_shape, or buckets."""
    for value in context.view.inputs:
        if context.options.has_gears and value.name in context.options.input_shapes:
            continue
        if value.dtype is None:
            yield about_model(
                "input-type",
                "E19999",
                name=value.name,
                seen=f"the input '{value.name}' is no tensor of a known type",
                wanted="a tensor",
                cure="sequences, optionals and strings stay on the host",
            )
        elif not value.is_static:
            yield about_model(
                "dynamic-dimension",
                "E10011",
                name=value.name,
                seen=f"the input '{value.name}' has shape {shape_text(value.shape)}",
                wanted="numbers only",
                cure="lower to buckets (`qcompile optimize --target ascend...`), or give the sizes with --input-shape",
            )
        elif any(d == 0 for d in value.shape or ()):
            yield about_model(
                "empty-dimension",
                "E10011",
                name=value.name,
                seen=f"the input '{value.name}' has shape {shape_text(value.shape)}",
                wanted="sizes of at least 1",
                cure="start from a cache of fixed length and mask what is not used yet",
            )


def named_shapes(context: Context) -> Iterator[Finding]:
    """--input_shape names inputs of the graph, which cannot contain its separators."""
    names = {value.name for value in context.view.inputs}
    for name in context.options.input_shapes:
        if name not in names:
            yield about_model(
                "input-shape-name",
                "E10016",
                name=name,
                seen=f"--input_shape names '{name}'",
                wanted=f"one of {', '.join(sorted(names)) or 'no input at all'}",
                cure="correct the name",
            )
    for name in sorted(names):
        if re.search(r"[:;,\s]", name):
            yield about_model(
                "input-name",
                "E10002",
                name=name,
                seen=f"the input name {name!r}",
                wanted="a name without colon, semicolon, comma or space",
                cure="rename the input: --input_shape could not name it",
            )


def fixed_dimensions(context: Context) -> Iterator[Finding]:
    """--input_shape gives as many sizes as the graph has dimensions, and the numbers that it fixes."""
    for info in context.view.model.graph.input:
        given = context.options.input_shapes.get(info.name)
        declared = info.type.tensor_type.shape
        if given is not None and info.type.tensor_type.HasField("shape") and len(given) != len(declared.dim):
            yield about_model(
                "input-shape-rank",
                "E10001",
                name=info.name,
                seen=f"--input_shape gives '{info.name}' {len(given)} dimensions",
                wanted=f"the {len(declared.dim)} of the graph",
                cure="write one size per dimension",
            )
        elif given is not None and any(_contradicts(dim, size) for dim, size in zip(declared.dim, given, strict=False)):
            fixed = tuple(int(dim.dim_value) if dim.HasField("dim_value") else None for dim in declared.dim)
            yield about_model(
                "input-shape-fixed",
                "E10001",
                name=info.name,
                seen=f"--input_shape gives '{info.name}' the shape {shape_text(given)}",
                wanted=f"{shape_text(fixed)}: the graph fixes these numbers",
                cure="give the graph's own numbers, or export it with these dimensions open",
                certain=False,  # ATC may take the given number where nothing behind it needs the graph's
            )


def _contradicts(dim: TensorShapeProto.Dimension, size: int | None) -> bool:
    """Whether a size is given for a dimension that the graph fixes at another; -1 leaves it to gears."""
    return size is not None and dim.HasField("dim_value") and dim.dim_value > 0 and dim.dim_value != size


def tensor_types(context: Context) -> Iterator[Finding]:
    """Element types the parser has a device type for."""
    for value in context.view.values.values():
        if value.dtype is not None and value.dtype not in PARSED and (value.is_declared or value.tensor is not None):
            yield about_model(
                "element-type",
                "E19999",
                name=value.name,
                seen=f"'{value.name}' is {value.dtype}",
                wanted="f16, bf16, f32, integers or bool",
                cure="cast it before the export; strings, complex numbers and small floats do not reach the device",
            )


def bfloat16(context: Context) -> Iterator[Finding]:
    """Only 910B computes in bfloat16."""
    if "bf16" in context.chip.floats:
        return
    for value in context.view.values.values():
        if value.dtype == "bf16" and (value.tensor is not None or value.is_input):
            yield about_model(
                "bfloat16",
                "EZ3002",
                name=value.name,
                seen=f"'{value.name}' is bf16",
                wanted=f"f16 or f32 on {context.chip.name}",
                cure="export in fp16",
            )
            return


def gears(context: Context) -> Iterator[Finding]:
    """Gears are for float graphs, 2 to 100 of them, with one number per dynamic dimension."""
    options = context.options
    if not options.has_gears:
        return
    if {node.op for node in context.view.nodes} & (_QUANT | {"NPUAscendQuantV2"}):
        yield about_model(
            "quantized-gears",
            "E10055",
            seen="a quantized graph with dynamic dimensions",
            wanted="static shapes: int8 inputs have no dynamic form",
            cure="build one .om per bucket",
        )
    parts = options.dynamic_dims.split(";") if options.dynamic_dims else options.dynamic_batch_size.split(",")
    if not 2 <= len(parts) <= 100:
        code = "E10035" if len(parts) < 2 else "E10036"
        yield about_model(
            "gear-count", code, seen=f"{len(parts)} gears", wanted="2 to 100", cure="3 or 4 are a good number"
        )
    open_dims = sum(d is None for shape in options.input_shapes.values() for d in shape)
    wrong = [part for part in parts if options.dynamic_dims and len(part.split(",")) != open_dims]
    if wrong:
        yield about_model(
            "gear-length",
            "E10045",
            seen=f"the gear '{wrong[0]}'",
            wanted=f"{open_dims} numbers, one for each -1 of --input_shape",
            cure="write one number per dynamic dimension, in order",
        )


def empty_outputs(context: Context) -> Iterator[Finding]:
    """An output named "" would be matched by every input hole."""
    holes = any(value is None for node in context.view.nodes for value in node.inputs)
    for node in context.view.nodes:
        if holes and any(value is None for value in node.outputs):
            yield about_model(
                "unnamed-output",
                "",
                name=node.name,
                effect=WRONG,
                certain=False,
                seen=f"'{node.name}' has an output without a name while other nodes have inputs without one",
                wanted="names for all outputs",
                cure="name the output; nothing needs to read it",
            )


def long_names(context: Context) -> Iterator[Finding]:
    """Names beyond 127 characters are replaced in the .om."""
    for value in (*context.view.inputs, *context.view.outputs):
        if len(value.name) > 127:
            yield about_model(
                "long-name",
                "",
                name=value.name,
                effect=SLOW,
                seen=f"a name of {len(value.name)} characters",
                wanted="at most 127",
                cure="rename it: CANN replaces longer names, and the runtime finds tensors by name",
            )


MODEL_RULES: tuple[ModelRule, ...] = (
    file_size,
    file_name,
    external_data_names,
    has_graph,
    opset_imports,
    functions,
    sparse_initializers,
    input_shapes,
    named_shapes,
    fixed_dimensions,
    tensor_types,
    bfloat16,
    gears,
    empty_outputs,
    long_names,
)
