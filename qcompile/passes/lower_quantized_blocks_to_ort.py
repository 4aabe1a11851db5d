"""Lower weights that are quantized in blocks to ONNX Runtime's kernels.

    LinearW8(x, codes, scales)                  -> MatMulNBits(x, codes + 128, scales), 8 bits, accuracy_level 4
    LinearW4(x, codes, scales)                  -> MatMulNBits(x, codes, scales), 4 bits
    LinearW4Asymmetric(x, codes, scales, zeros) -> MatMulNBits(x, codes, scales, zeros), 4 bits
    Embedding…(ids, codes, scales[, zeros])     -> GatherBlockQuantized on the same codes, which both kernels read as
                                                   uint8 [N, G, block bytes]

accuracy_level 4 quantizes the activations of each block to int8 inside the kernel. Level 0 keeps them float but runs 100
times slower (736 ms against 4.6 ms for a 152k vocabulary), so it is no choice; the proof's limit says what level 4 costs.
A block that the kernel does not take (a whole channel) is cut into the largest blocks that it does, with the same scale: one
is stored for each row, and an Expand of that constant, which ONNX Runtime folds at load, gives one for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant, node_label
from qcompile.passes.kernel_rewrite import MICROSOFT, Kernel, first_rows, lower, matrix_shape
from qcompile.passes.narrow_scales import widen_scales
from qcompile.passes.packed_codes import computed_tensor
from qcompile.passes.unpack_at_load import unsigned_blocks
from qcompile.quant.packing import packed_pairs
from qcompile.quantized_functions import BLOCKED_LINEARS, EMBEDDINGS
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import derived_rows, rows_of

ACCURACY_LEVEL = 4
# Activations rounded to 8 bits per block: measured up to 0.018 of the largest output on random normal rows, 24 layers.
MAX_RELATIVE_ERROR = 5e-2
BLOCK_SIZES = (256, 128, 64, 32, 16)
_INT8_SIGN = np.uint8(128)


class LowerQuantizedBlocksToOrt(Pass):
    """Weights of 8 and 4 bits in blocks."""

    name = "lower-quantized-blocks-to-ort"
    summary = "LinearW8, LinearW4 -> MatMulNBits; EmbeddingW8, EmbeddingW4 -> GatherBlockQuantized"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lower each, proved with a limit for int8 activations; keep the function where the proof fails."""
        widen_scales(context.model.graph)
        with computed_constants(context.model.graph):
            self._lower_all(context, result)
        if result.rewrites:
            finish_rewrites(context)

    def _lower_all(self, context: PassContext, result: PassResult) -> None:
        cut: dict[ir.Value, int] = {}
        for node in list(context.model.graph):
            if node.domain != DOMAIN or node.op_type not in BLOCKED_LINEARS | EMBEDDINGS:
                continue
            if _kernel_block(node) is None:
                result.matches += 1
                size = node.attributes["block_size"].as_int()
                reason = f"MatMulNBits takes blocks of {', '.join(map(str, sorted(BLOCK_SIZES)))}, not {size}"
                result.rejected.append(Rejection(node_label(node), self.name, reason))
                continue
            if _repeats(node) > 1:
                cut[_input(node, 2)] = _kernel_block(node) or 1
            if node.op_type in EMBEDDINGS:
                lower(context, result, node, _gather, first_rows)
            else:
                lower(context, result, node, _matmul, first_rows, MAX_RELATIVE_ERROR)
        for scales, block in cut.items():
            _expand_at_load(context.model.graph, scales, block)


@contextmanager
def computed_constants(graph: ir.Graph) -> Iterator[None]:
    """Let codes and scales that are made of constants count as such: their tensors are computed when they are read."""
    known: list[ir.Value] = []
    for node in graph:
        if node.domain == DOMAIN and node.op_type in BLOCKED_LINEARS | EMBEDDINGS:
            known += (v for v in node.inputs[1:] if v is not None and v.const_value is None)
    for value in dict.fromkeys(known):
        value.const_value = computed_tensor(value)
    try:
        yield
    finally:
        for value in known:
            value.const_value = None


def _expand_at_load(graph: ir.Graph, scales: ir.Value, block: int) -> None:
    """Read scales [N, G] that were repeated from an Expand of those that are stored, [N, 1].

    Not before the proofs: where constants are not folded, MatMulNBits computes nonsense with scales that are computed.
    """
    repeated = graph.initializers.get(f"{scales.name}.blocks{block}")
    if repeated is None or not repeated.uses() or matrix_shape(scales)[1] != 1:
        return
    num_blocks = matrix_shape(repeated)[1]
    shape = named_constant(graph, f"shape.1x{num_blocks}", np.array([1, num_blocks], np.int64))
    expand = ir.node("Expand", [scales, shape], name=f"{scales.name}.blocks")
    output = expand.outputs[0]
    output.type, output.shape = repeated.type, repeated.shape
    for node, index in list(repeated.uses()):
        node.replace_input_with(index, output)
    graph.insert_before(next(iter(graph)), expand)
    del graph.initializers[repeated.name or ""]


def _kernel_block(node: ir.Node) -> int | None:
    """Return the block size for the kernel: the node's own, or the largest that divides it."""
    size = node.attributes["block_size"].as_int()
    return size if size in BLOCK_SIZES else next((block for block in BLOCK_SIZES if size % block == 0), None)


def _repeats(node: ir.Node) -> int:
    """Return into how many blocks for the kernel each of the node's own is cut."""
    return node.attributes["block_size"].as_int() // (_kernel_block(node) or 1)


def _bits(node: ir.Node) -> int:
    return 8 if node.op_type.endswith("W8") else 4


def _matmul(node: ir.Node, graph: ir.Graph) -> Kernel:
    codes, scales, zero_points = _stored(node, graph)
    block = _kernel_block(node)
    num_outputs, width = matrix_shape(_input(node, 1))
    attributes = {"K": width * 8 // _bits(node), "N": num_outputs, "bits": _bits(node), "block_size": block}
    inputs = [node.inputs[0], codes, scales, *([zero_points] if zero_points is not None else [])]
    return Kernel([ir.node("MatMulNBits", inputs, {**attributes, "accuracy_level": ACCURACY_LEVEL}, domain=MICROSOFT)])


def _gather(node: ir.Node, graph: ir.Graph) -> Kernel:
    """GatherBlockQuantized on codes [V, G, bytes] gives [.., G, block]; its scales must be of the rank of the codes."""
    codes, scales, zero_points = _stored(node, graph)
    block = _kernel_block(node)
    last = named_constant(graph, "axes.last", np.array([-1], np.int64))
    wide = ir.node("Unsqueeze", [scales, last])
    inputs = [codes, node.inputs[0], wide.outputs[0]]
    unpacking: list[ir.Node] = []
    if zero_points is not None:
        unpacking = _unpacked(graph, zero_points, matrix_shape(scales)[1])
        inputs.append(unpacking[-1].outputs[0])
    attributes = {"bits": _bits(node), "block_size": block, "gather_axis": 0, "quantize_axis": 2}
    rows = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
    flat = named_constant(graph, "shape.keep2.flat", np.array([0, 0, -1], np.int64))
    return Kernel([wide, *unpacking, rows, ir.node("Reshape", [rows.outputs[0], flat])])


def _unpacked(graph: ir.Graph, zero_points: ir.Value, num_groups: int) -> list[ir.Node]:
    """Return the nodes that make a byte of every zero point: uint8 [V, ceil(G / 2)] -> [V, G, 1].

    GatherBlockQuantized packs along the last axis, which is of length 1 there: a byte each is what it takes. Made from the
    packed ones that MatMulNBits reads of a tied head, once, when ONNX Runtime loads the model and folds constants.
    """
    num_rows, width = matrix_shape(zero_points)
    low_bits = named_constant(graph, "bits.low", np.array(15, np.uint8))
    four = named_constant(graph, "bits.four", np.array(4, np.uint8))
    last = named_constant(graph, "axes.last", np.array([-1], np.int64))
    one = named_constant(graph, "axes.1", np.array([1], np.int64))
    start, stop = (named_constant(graph, f"bound.{n}", np.array([n], np.int64)) for n in (0, num_groups))
    shape = named_constant(graph, f"shape.keep1.{2 * width}", np.array([0, 2 * width], np.int64))
    low = ir.node("BitwiseAnd", [zero_points, low_bits])
    high = ir.node("BitShift", [zero_points, four], {"direction": "RIGHT"})
    columns = [ir.node("Unsqueeze", [half.outputs[0], last]) for half in (low, high)]
    pairs = ir.node("Concat", [column.outputs[0] for column in columns], {"axis": -1})
    flat = ir.node("Reshape", [pairs.outputs[0], shape])
    exact = ir.node("Slice", [flat.outputs[0], start, stop, one])
    nodes = [low, high, *columns, pairs, flat, exact, ir.node("Unsqueeze", [exact.outputs[0], last])]
    sizes = ([width], [width], [width, 1], [width, 1], [width, 2], [2 * width], [num_groups], [num_groups, 1])
    for node, size in zip(nodes, sizes, strict=True):
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        node.outputs[0].shape = ir.Shape([num_rows, *size])
    return nodes


def _stored(node: ir.Node, graph: ir.Graph) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Return codes [N, G, block bytes], scales [N, G] and zero points as the kernels want them, shared by all users."""
    block, repeats = _kernel_block(node), _repeats(node)
    assert block is not None
    stored = _input(node, 1)
    if stored.producer() is not None:
        codes = unsigned_blocks(graph, stored, block * _bits(node) // 8, f"{stored.name}.blocks{block}")
    else:
        codes = _shared(graph, stored, f".blocks{block}", _block_rows(node, block))
    scales = _input(node, 2)
    _move_to_end(graph, scales)
    if repeats > 1:
        scales = _shared(graph, scales, f".blocks{block}", _repeated(scales, repeats))
    zero_points = _input(node, 3) if len(node.inputs) > 3 else None
    if zero_points is not None and repeats > 1:
        zero_points = _shared(graph, zero_points, f".blocks{block}", _zero_points(node, repeats))
    return codes, scales, zero_points


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _block_rows(node: ir.Node, block: int) -> StreamedTensor:
    """Return uint8 [N, G, block bytes]; int8 codes become offset by 128, the kernel's zero point."""
    tensor = _input(node, 1).const_value
    assert tensor is not None
    bits = _bits(node)
    num_outputs, width = matrix_shape(_input(node, 1))
    block_bytes = block * bits // 8

    def rows(start: int, stop: int) -> Array:
        stored = rows_of(tensor, start, stop)
        unsigned = stored.view(np.uint8) ^ _INT8_SIGN if bits == 8 else stored
        return unsigned.reshape(stop - start, width // block_bytes, block_bytes)

    return derived_rows(tensor, rows, ir.DataType.UINT8, [num_outputs, width // block_bytes, block_bytes])


def _repeated(scales: ir.Value, repeats: int) -> StreamedTensor:
    tensor = scales.const_value
    assert tensor is not None
    num_outputs, num_groups = matrix_shape(scales)

    def rows(start: int, stop: int) -> Array:
        return np.repeat(rows_of(tensor, start, stop), repeats, axis=1)

    return derived_rows(tensor, rows, tensor.dtype, [num_outputs, num_groups * repeats])


def _zero_points(node: ir.Node, repeats: int) -> StreamedTensor:
    """Return the zero points of the kernel's blocks: packed uint8 [N, ceil(G / 2)]."""
    tensor = _input(node, 3).const_value
    assert tensor is not None
    num_outputs, num_groups = matrix_shape(_input(node, 2))
    width = num_groups * repeats

    def rows(start: int, stop: int) -> Array:
        stored = rows_of(tensor, start, stop)
        pairs = np.stack([stored & np.uint8(15), stored >> np.uint8(4)], axis=2)
        return packed_pairs(np.repeat(pairs.reshape(stop - start, -1)[:, :num_groups], repeats, axis=1))

    return derived_rows(tensor, rows, ir.DataType.UINT8, [num_outputs, -(-width // 2)])


def _shared(graph: ir.Graph, source: ir.Value, suffix: str, tensor: StreamedTensor) -> ir.Value:
    """Return the initializer derived from another under a suffix; made once, whoever reads it."""
    name = f"{source.name}{suffix}"
    if name not in graph.initializers:
        tensor.name = name
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, type=kind, shape=tensor.shape, const_value=tensor))
    return graph.initializers[name]


def _move_to_end(graph: ir.Graph, value: ir.Value) -> None:
    """Let scales be written right behind the codes they were computed with."""
    if value.name and graph.initializers.get(value.name) is value:
        graph.initializers[value.name] = graph.initializers.pop(value.name)
