"""A weight on a grid in the graph: what is stored, the nodes that make operands of it, and the operators that read them.

Rows of one format are a segment. Those of 8 bits are stored as they are; 4 to 6 bits beside each other or beside 8 are unpacked
to int8 and joined; a weight of 4 bits throughout keeps two codes to a byte. All of these nodes read constants only.

    affine grid: w = s * q - m = s * (q - z) + (s * z - m),    z = clip(round(m / s))

Kernels round x to 8 bits, and that error is multiplied by the coded part s * (q - z). With z in the middle of the codes, the
small weights beside a large one would be coded as large ones that the offset takes back; with z where 0 is, they stay small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN, DOMAIN_VERSION
from qcompile.packed_functions import BLOCK_SCALES, PACK_INT4, REPEAT_SCALES, SHIFT_CODES, UNPACKING, ZERO_POINTS
from qcompile.passes.base import PassContext
from qcompile.passes.change import named_constant, static_dims
from qcompile.passes.grid_weights import Segment, StoredSegment
from qcompile.passes.quantize_projections import Projection
from qcompile.tensors import StreamedTensor


@dataclass
class GridWeight:
    """A stored weight.

    Attributes:
        segments: Its rows.
        bits: 4 or 8, of the codes that the operators read.
        block: Inputs that share a scale there.
        codes: int8 [N, M] or uint8 [N, M / 2].
        scales: [N, M / block].
        zero_points: uint8 [N, ceil(G / 2)] of 4-bit codes with offsets, else None.
        offsets: [N, M / block], or None where all rows are symmetric.
    """

    segments: list[Segment]
    bits: int
    block: int
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    offsets: ir.Value | None

    def operator(self, projection: Projection) -> str:
        """Return the operator that stands for a projection."""
        kind = "Asymmetric" if self.zero_points is not None else ""
        return f"{'Embedding' if projection.is_lookup else 'Linear'}W{self.bits}{kind}"


def store(graph: ir.Graph, projection: Projection, segments: list[Segment]) -> GridWeight:
    """Register what is stored of a weight, and the nodes that make codes, scales, zero points and offsets of it."""
    name = projection.source.name or projection.name
    block = min(segment.grid.kind.block for segment in segments)
    shapes = {(segment.grid.bits, segment.grid.kind.block) for segment in segments}
    bits = 4 if shapes == {(4, block)} else 8
    is_affine = any(segment.grid.kind.is_affine for segment in segments)
    nodes = _Nodes(graph)
    rows = []
    for segment in segments:
        stored = StoredSegment(projection, segment, two_to_a_byte=bits == 4)
        own = name if len(segments) == 1 else f"{name}.{segment.start}"
        values = {kind: _initializer(graph, tensor) for kind, tensor in stored.tensors(own).items()}
        if segment.grid.kind.is_affine:
            operands = nodes.affine(values, segment.grid.bits, own, for_kernel=bits)
        else:
            operands = nodes.symmetric(values, segment.grid.bits, own)
        rows.append(nodes.for_blocks(operands, segment.grid.kind.block // block))
    joined = nodes.joined([row.codes for row in rows], f"{name}.codes")
    scales = nodes.joined([row.scales for row in rows], f"{name}.scales")
    zero_points = offsets = None
    if is_affine:
        offsets = nodes.joined([row.offsets or nodes.zeros(row.scales) for row in rows], f"{name}.offsets")
        if bits == 4:
            parts = [row.zero_points or _eights(graph, row.scales) for row in rows]
            zero_points = nodes.joined(parts, f"{name}.zero_points")
    graph.insert_before(next(iter(graph)), nodes.made)
    return GridWeight(segments, bits, block, joined, scales, zero_points, offsets)


@dataclass(frozen=True)
class _Operands:
    """What an operator reads of some rows; symmetric ones have neither zero points nor offsets."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None = None
    offsets: ir.Value | None = None


class _Nodes:
    """Nodes over constants; all have types and shapes, as nothing infers them before they are read."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: list[ir.Node] = []

    def symmetric(self, values: dict[str, ir.Value], bits: int, name: str) -> _Operands:
        """Return the operands of rows without offsets."""
        return _Operands(self.unpacked(values, bits, name), self.numbers(values, "scales", name))

    def affine(self, values: dict[str, ir.Value], bits: int, name: str, *, for_kernel: int) -> _Operands:
        """Return the operands of rows with offsets: codes that run as 8 bits are moved, those of 4 have zero points."""
        scales, minima = self.numbers(values, "scales", name), self.numbers(values, "minima", name)
        codes = self.unpacked(values, bits, name)
        z = self.zero_points(scales, minima, bits, name)
        offsets = self.offsets(scales, z, minima, name)
        if for_kernel == 4:
            return _Operands(codes, scales, self.packed(z, name), offsets)
        return _Operands(self.shifted(codes, z, bits, name), scales, None, offsets)

    def for_blocks(self, operands: _Operands, times: int) -> _Operands:
        """Return operands for blocks that are cut into some; weights with zero points have blocks of one size."""
        offsets = operands.offsets
        return replace(
            operands,
            scales=self.repeated(operands.scales, times),
            offsets=self.repeated(offsets, times) if offsets is not None else None,
        )

    def unpacked(self, values: dict[str, ir.Value], bits: int, name: str) -> ir.Value:
        """Return codes int8 [N, M] of nibbles and what is above them; what is stored as the kernel reads it."""
        if "codes" in values:
            return values["codes"]
        inputs = [values["nibbles"], *([values["rest"]] if "rest" in values else [])]
        num_rows, width = static_dims(inputs[0])
        node = ir.node(UNPACKING[bits].name, inputs, domain=DOMAIN)
        return self._add(node, f"{name}.unpacked", ir.DataType.INT8, [num_rows, 2 * width])

    def numbers(self, values: dict[str, ir.Value], kind: str, name: str) -> ir.Value:
        """Return scales or minima [N, G] of the stored blocks."""
        if kind in values:
            return values[kind]
        codes, steps = values[f"{kind}.codes"], values[f"{kind}.steps"]
        node = ir.node(BLOCK_SCALES.name, [codes, steps], domain=DOMAIN)
        return self._add(node, f"{name}.{kind}.products", ir.DataType.FLOAT, static_dims(codes))

    def repeated(self, numbers: ir.Value, times: int) -> ir.Value:
        """Return numbers [N, G] once for each of the blocks that a block is cut into for the kernel."""
        if times == 1:
            return numbers
        num_rows, width = static_dims(numbers)
        node = ir.node(REPEAT_SCALES.name, [numbers], {"times": times}, domain=DOMAIN)
        return self._add(node, f"{numbers.name}.repeated", ir.DataType.FLOAT, [num_rows, width * times])

    def zero_points(self, scales: ir.Value, minima: ir.Value, bits: int, name: str) -> ir.Value:
        """Return the code nearest to 0 of each block, float32 [N, G]."""
        node = ir.node(ZERO_POINTS.name, [scales, minima], {"largest": (1 << bits) - 1}, domain=DOMAIN)
        return self._add(node, f"{name}.zero_points", ir.DataType.FLOAT, static_dims(scales))

    def packed(self, z: ir.Value, name: str) -> ir.Value:
        """Return zero points two to a byte."""
        num_rows, width = static_dims(z)
        node = ir.node(PACK_INT4.name, [z], domain=DOMAIN)
        return self._add(node, f"{name}.zero_points.packed", ir.DataType.UINT8, [num_rows, -(-width // 2)])

    def shifted(self, codes: ir.Value, z: ir.Value, bits: int, name: str) -> ir.Value:
        """Return unpacked codes that are 0 at the zero point and not in the middle."""
        node = ir.node(SHIFT_CODES.name, [codes, z], {"middle": 1 << (bits - 1)}, domain=DOMAIN)
        return self._add(node, f"{name}.shifted", ir.DataType.INT8, static_dims(codes))

    def offsets(self, scales: ir.Value, z: ir.Value, minima: ir.Value, name: str) -> ir.Value:
        """Return scales * z - minima: what code 0 stands for."""
        value = self._add(ir.node("Mul", [scales, z]), f"{name}.offsets.coded", ir.DataType.FLOAT, static_dims(scales))
        return self._add(
            ir.node("Sub", [value, minima]), f"{name}.offsets.rows", ir.DataType.FLOAT, static_dims(scales)
        )

    def zeros(self, scales: ir.Value) -> ir.Value:
        """Return the offsets of symmetric rows."""
        zero = named_constant(self.graph, "offset.none", np.array(0, np.float32))
        return self._add(
            ir.node("Mul", [scales, zero]), f"{scales.name}.offsets", ir.DataType.FLOAT, static_dims(scales)
        )

    def joined(self, parts: Sequence[ir.Value], name: str) -> ir.Value:
        """Return rows below each other."""
        if len(parts) == 1:
            return parts[0]
        num_rows, width = sum(static_dims(part)[0] for part in parts), static_dims(parts[0])[1]
        node = ir.node("Concat", parts, {"axis": 0})
        return self._add(node, f"{name}.joined", parts[0].dtype or ir.DataType.FLOAT, [num_rows, width])

    def _add(self, node: ir.Node, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        node.name = name
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self.made.append(node)
        return output


def replace_by(context: PassContext, projection: Projection, weight: GridWeight) -> None:
    """Put the operators that read a stored weight in the place of the MatMul, Linear or Gather."""
    graph, node = context.model.graph, projection.node
    x = node.inputs[1] if projection.is_lookup else node.inputs[0]
    new = ir.node(
        weight.operator(projection),
        [x, weight.codes, weight.scales, *([weight.zero_points] if weight.zero_points is not None else [])],
        {"block_size": weight.block},
        domain=DOMAIN,
        name=node.name,
    )
    nodes = [new]
    if weight.offsets is not None and projection.is_lookup:
        nodes += _row_offsets(graph, x, new.outputs[0], weight)
    elif weight.offsets is not None:
        nodes += _block_offsets(graph, x, new.outputs[0], weight, rank=len(node.outputs[0].shape or (0, 0, 0)))
    if node.op_type == "Linear":
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]], name=f"{node.name}.bias"))
    for index, extra in enumerate(nodes[1:]):
        # not in the name space of the node: a float product there would count as the weight made float
        extra.name = extra.name or f"offsets/{index}/{node.name}"
        extra.outputs[0].type = node.outputs[0].type
    old, output = node.outputs[0], nodes[-1].outputs[0]
    output.type, output.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [output])
    graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)


def _block_offsets(
    graph: ir.Graph, x: ir.Value | None, product: ir.Value, weight: GridWeight, *, rank: int
) -> list[ir.Node]:
    """product + (sums of x over blocks) @ offsets^T: what the offsets of an affine grid contribute."""
    zeros = "x".join("0" * (rank - 1))
    by_block = np.array([0] * (rank - 1) + [-1, weight.block], np.int64)
    shape = named_constant(graph, f"shape.{zeros}.rest.{weight.block}", by_block)
    last = named_constant(graph, "axes.last", np.array([-1], np.int64))
    blocks = ir.node("Reshape", [x, shape])
    sums = ir.node("ReduceSum", [blocks.outputs[0], last], {"keepdims": 0})
    columns = ir.node("Transpose", [weight.offsets], {"perm": [1, 0]})
    shares = ir.node("MatMul", [sums.outputs[0], columns.outputs[0]])
    return [blocks, sums, columns, shares, ir.node("Add", [product, shares.outputs[0]])]


def _row_offsets(graph: ir.Graph, indices: ir.Value | None, rows: ir.Value, weight: GridWeight) -> list[ir.Node]:
    """Rows of a table [.., D] + their offsets, one for each block."""
    by_block = named_constant(graph, f"shape.0x0.rest.{weight.block}", np.array([0, 0, -1, weight.block], np.int64))
    flat = named_constant(graph, "shape.keep2.flat", np.array([0, 0, -1], np.int64))
    last = named_constant(graph, "axes.last", np.array([-1], np.int64))
    taken = ir.node("Gather", [weight.offsets, indices], {"axis": 0})
    columns = ir.node("Unsqueeze", [taken.outputs[0], last])
    blocks = ir.node("Reshape", [rows, by_block])
    moved = ir.node("Add", [blocks.outputs[0], columns.outputs[0]])
    return [taken, columns, blocks, moved, ir.node("Reshape", [moved.outputs[0], flat])]


def _eights(graph: ir.Graph, scales: ir.Value) -> ir.Value:
    """Return the zero points of symmetric rows beside affine ones."""
    num_rows, width = static_dims(scales)
    return named_constant(graph, f"{scales.name}.zero_points", np.full((num_rows, -(-width // 2)), 0x88, np.uint8))


def _initializer(graph: ir.Graph, tensor: StreamedTensor) -> ir.Value:
    name = tensor.name or ""
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
