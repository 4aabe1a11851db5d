"""Quantized projections and embeddings: the chip's kernel where there is one for the scheme, else float weights.

    LinearW8A8        NPUDynamicQuant -> QuantBatchMatMul with a scale per token
    LinearW8A8Static  AscendQuant -> QuantBatchMatMul with a packed scale; AscendQuant -> MatMul -> AscendDequant on 310
    LinearW8, W4      NPUWeightQuantBatchMatmulV2; a vocabulary beyond 65,535 columns in several, side by side
    EmbeddingW8       Gather of codes and scales, Cast, Mul

Where a kernel has no form for a weight (another chip, a block that is no multiple of 32), the weight is stored as the floats
that its codes mean, and the reason is reported. Symmetric activations only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering import quantized_weights as layout
from qcompile.ascend.lowering.static_graph import StaticGraph, dims
from qcompile.ascend.lowering.typed_weights import Factor, TypedWeights
from qcompile.errors import UnsupportedOpError

MAX_DIM = 65535
_PIECE_MULTIPLE = 128  # columns of a piece of a wide weight: whole tiles, whole words of codes
_FLOAT16_ENUM, _BFLOAT16_ENUM = 1, 27  # GE's numbers of the types
Make = Callable[[], ir.TensorProtocol]


@dataclass(frozen=True)
class QuantizedLinear:
    """What the appenders below need of one projection.

    Attributes:
        x: Input rows [R, M].
        weight: Codes of the fused model.
        table: Their name in it; an embedding may read them too.
        scales: Its scales.
        zero_points: Its zero points or None.
        step: Activation step of a static scheme or None.
        block: Block size, 0 for one scale per output channel.
        factor: (count, number) folded into the first output channels.
        bias: Bias in the graph's type [N], or None.
        name: Prefix of names.
    """

    x: ir.Value
    weight: ir.TensorProtocol
    table: str
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    step: ir.TensorProtocol | None
    block: int
    factor: Factor | None
    bias: ir.Value | None
    name: str


class QuantizedLowering:
    """Appends quantized projections to one graph.

    Args:
        graph: The graph.
        weights: The weights of all graphs.
        family: The chip's family.
        note: Called with the reason when a weight is stored as floats.
    """

    def __init__(self, graph: StaticGraph, weights: TypedWeights, family: str, note: Callable[[str], None]) -> None:
        self.graph, self.weights, self.family, self.note = graph, weights, family, note

    def linear(self, op_type: str, linear: QuantizedLinear) -> ir.Value:
        """Append one projection of rows [R, M]; returns [R, N].

        Raises:
            UnsupportedOpError: The chip has no kernels for its activations.
        """
        if op_type == "LinearW8A8":
            return self._per_token(linear)
        if op_type == "LinearW8A8Static":
            return self._static(linear)
        return self._weight_only(op_type, linear)

    def _per_token(self, linear: QuantizedLinear) -> ir.Value:
        if self.family != "910B":
            raise UnsupportedOpError(
                f"'{linear.name}' is quantized per token (int8-dynamic); the {self.family} has no kernel for that: "
                "quantize with --passes int8, int8-static or int8-weight"
            )
        rows, m = dims(linear.x)
        codes, step = self.graph.ops(
            "NPUDynamicQuant",
            [linear.x],
            [(rows, m), (rows,)],
            name=f"{linear.name}.codes",
            dtypes=[ir.DataType.INT8, ir.DataType.FLOAT],
        )
        return self._quant_matmul(linear, codes, lambda: layout.channel_scales(linear.scales, linear.factor), step)

    def _static(self, linear: QuantizedLinear) -> ir.Value:
        assert linear.step is not None
        step = float(np.asarray(linear.step.numpy()).reshape(-1)[0])
        if self.weights.dtype == ir.DataType.BFLOAT16:
            return self._static_bfloat16(linear, step)
        codes = self.graph.op(
            "AscendQuant",
            [linear.x],
            dims(linear.x),
            name=f"{linear.name}.codes",
            dtype=ir.DataType.INT8,
            scale=1.0 / step,
            offset=0.0,
        )
        pack = layout.packed_scale if self.family == "910B" else layout.plain_scale

        def scales() -> ir.TensorProtocol:
            return layout.channel_scales(linear.scales, linear.factor, step, pack)

        if self.family == "910B":
            return self._quant_matmul(linear, codes, scales, None)
        weight = self._weight(f"{linear.name}.weight", lambda: linear.weight)
        shape = (dims(linear.x)[0], dims(weight)[1])
        sums = self.graph.op("MatMul", [codes, weight], shape, name=f"{linear.name}.sums", dtype=ir.DataType.INT32)
        y = self.graph.op(
            "AscendDequant",
            [sums, self._weight(f"{linear.name}.scale", scales)],
            shape,
            name=linear.name,
            dtype=ir.DataType.FLOAT16,
            more={"dtype": _FLOAT16_ENUM},
        )
        return self._biased(linear, y)

    def _static_bfloat16(self, linear: QuantizedLinear, step: float) -> ir.Value:
        """AscendQuant takes no bfloat16 and a packed scale makes none: NPUAscendQuantV2 and a float32 scale do."""
        factor = np.array([1.0 / step], self.weights.dtype.numpy())
        codes = self.graph.op(
            "NPUAscendQuantV2",
            [linear.x, self.graph.constant(f"{linear.name}.factor", factor)],
            dims(linear.x),
            name=f"{linear.name}.codes",
            dtype=ir.DataType.INT8,
            axis=-1,
        )
        exact = 1.0 / float(factor[0])  # what the rounded factor divides by
        scales = functools.partial(layout.channel_scales, linear.scales, linear.factor, exact)
        return self._quant_matmul(linear, codes, scales, None)

    def _quant_matmul(self, linear: QuantizedLinear, codes: ir.Value, scales: Make, step: ir.Value | None) -> ir.Value:
        n = int(linear.weight.shape[1])  # type: ignore[arg-type]
        is_half = self.weights.dtype == ir.DataType.FLOAT16
        attributes = {"dtype": _FLOAT16_ENUM if is_half else _BFLOAT16_ENUM}
        name, make = f"{linear.name}.weight", lambda: linear.weight
        if n > MAX_DIM:  # the last axis of x2 is limited, so it is stored the other way round
            name, make = f"{name}.by_row", lambda: layout.codes_by_column(linear.weight)
            attributes["transpose_x2"] = 1
        weight = self._weight(name, make)  # before its scales: they come with the codes
        bias = linear.bias if step is not None else None
        inputs = [codes, weight, self._weight(f"{linear.name}.scale", scales), None, bias, step]
        while inputs[-1] is None:
            inputs.pop()
        shape = (dims(linear.x)[0], n)
        y = self.graph.op(
            "QuantBatchMatMul", inputs, shape, name=linear.name, dtype=self.weights.dtype, more=attributes
        )
        return y if bias is not None else self._biased(linear, y)

    def _weight_only(self, op_type: str, linear: QuantizedLinear) -> ir.Value:
        n, width = (int(d) for d in linear.weight.shape.numpy())
        m = 2 * width if op_type != "LinearW8" else width
        refusal = self.why_floats(op_type, n, m, linear.block)
        if refusal:
            self.note(f"{op_type}: {refusal}")
            return self._as_floats(linear)
        bounds = _column_ranges(n)
        pieces = [self._weight_only_piece(op_type, linear, first, last, m) for first, last in bounds]
        y = pieces[0]
        if len(pieces) > 1:
            y = self.graph.op("Concat", pieces, (dims(linear.x)[0], n), name=f"{linear.name}.joined", axis=1)
        return self._biased(linear, y)

    def _weight_only_piece(self, op_type: str, linear: QuantizedLinear, first: int, last: int, m: int) -> ir.Value:
        """Append the product with the output channels `first` to `last`."""
        make = layout.codes_by_column if op_type == "LinearW8" else layout.nibbles_by_column
        blocks, half = int(linear.scales.shape[1]), self.weights.dtype  # type: ignore[arg-type]
        name = linear.name if first == 0 else f"{linear.name}.from_{first}"
        weight = self._weight(f"{name}.weight", lambda: make(linear.weight, first, last))
        scales = self._weight(
            f"{name}.scale", lambda: layout.scales_by_column(linear.scales, half, linear.factor, first, last)
        )
        inputs = [linear.x, weight, scales]
        points = linear.zero_points
        if points is not None:
            inputs.append(
                self._weight(f"{name}.offset", lambda: layout.offsets_by_column(points, blocks, half, first, last))
            )
        return self.graph.op(
            "NPUWeightQuantBatchMatmulV2",
            inputs,
            (dims(linear.x)[0], last - first),
            name=name,
            antiquant_group_size=linear.block if blocks > 1 else 0,
        )

    def why_floats(self, op_type: str, n: int, m: int, block: int) -> str:
        """Return why a weight-only projection [M, N] has no kernel, or an empty string."""
        is_int4 = op_type != "LinearW8"
        if self.family == "310B" or (self.family == "310P" and is_int4):
            return f"the {self.family} has no kernel for {'4' if is_int4 else '8'}-bit weights"
        if m > MAX_DIM:
            return f"{m} inputs are beyond the {MAX_DIM} rows that NPUWeightQuantBatchMatmulV2 takes"
        if block < m and block % 32:
            return f"blocks of {block}; the kernel takes multiples of 32"
        if is_int4 and n % 8:
            return f"{n} output channels; eight share a word"
        return ""

    def _as_floats(self, linear: QuantizedLinear) -> ir.Value:
        half = self.weights.dtype
        weight = self._weight(
            f"{linear.table}.floats",
            lambda: layout.dequantized(linear.weight, linear.scales, linear.zero_points, half, linear.factor),
        )
        shape = (dims(linear.x)[0], dims(weight)[0])
        y = self.graph.op("Gemm", [linear.x, weight], shape, name=linear.name, transB=1)
        return self._biased(linear, y)

    def _biased(self, linear: QuantizedLinear, y: ir.Value) -> ir.Value:
        if linear.bias is None:
            return y
        return self.graph.op("Add", [y, linear.bias], dims(y), name=f"{linear.name}.biased")

    def _weight(self, name: str, make: Make) -> ir.Value:
        return self.graph.weight(name, self.weights.get(name, make))

    def embedding(
        self, ids: ir.Value, codes: ir.TensorProtocol, scales: ir.TensorProtocol, name: str, table: str
    ) -> ir.Value:
        """Append the look-up of ids [B, S] in codes int8 [V, D] with scales [V, G]; returns [B, S, D]."""
        d, g = int(codes.shape[1]), int(scales.shape[1])  # type: ignore[arg-type]
        b, s = dims(ids)
        half = self.weights.dtype
        rows = self.graph.op(
            "Gather",
            [self.graph.weight(table, codes), ids],
            (b, s, d),
            name=f"{name}.codes",
            dtype=ir.DataType.INT8,
            axis=0,
        )
        typed = self.weights.typed(f"{table}.scales", scales)
        steps = self.graph.op(
            "Gather", [self.graph.weight(f"{table}.scales", typed), ids], (b, s, g), name=f"{name}.scales", axis=0
        )
        blocks = self.graph.reshape(self.graph.cast(rows, half, f"{name}.floats"), (b, s, g, d // g), f"{name}.blocks")
        steps = self.graph.reshape(steps, (b, s, g, 1), f"{name}.steps")
        scaled = self.graph.op("Mul", [blocks, steps], (b, s, g, d // g), name=f"{name}.scaled")
        return self.graph.reshape(scaled, (b, s, d), name)

    def float_embedding(
        self,
        ids: ir.Value,
        codes: ir.TensorProtocol,
        scales: ir.TensorProtocol,
        zero_points: ir.TensorProtocol | None,
        name: str,
        table: str,
    ) -> ir.Value:
        """Append the look-up in a table that is stored as floats."""
        half = self.weights.dtype
        floats = self._weight(f"{table}.floats", lambda: layout.dequantized(codes, scales, zero_points, half))
        return self.graph.op("Gather", [floats, ids], (*dims(ids), dims(floats)[1]), name=name, axis=0)


def _column_ranges(n: int) -> list[tuple[int, int]]:
    """Cut `n` columns into equal ranges that a kernel takes, whole tiles but for the last."""
    if n <= MAX_DIM:
        return [(0, n)]
    tiles = -(-n // _PIECE_MULTIPLE)
    most = MAX_DIM // _PIECE_MULTIPLE
    size = -(-tiles // -(-tiles // most)) * _PIECE_MULTIPLE
    return [(first, min(first + size, n)) for first in range(0, n, size)]
