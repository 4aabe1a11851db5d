"""Quantized projections and embeddings: the chip's kernel where there is one for the scheme, else float weights.

    LinearW8A8        NPUDynamicQuant -> QuantBatchMatMul with a scale per token
    LinearW8A8Static  AscendQuant -> QuantBatchMatMul with a packed scale; AscendQuant -> MatMul -> AscendDequant on 310
    LinearW8, W4      NPUWeightQuantBatchMatmulV2
    EmbeddingW8       Gather of codes and scales, Cast, Mul

Where a kernel has no form for a weight (a vocabulary beyond 65,535 columns, another chip, a block that is no multiple of 32),
the weight is stored as the floats that its codes mean, and the reason is reported. Symmetric activations only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering import quantized_weights as layout
from qcompile.ascend.lowering.static_graph import StaticGraph, dims
from qcompile.ascend.lowering.typed_weights import Factor, TypedWeights
from qcompile.errors import UnsupportedOpError

MAX_DIM = 65535
_FLOAT16_ENUM, _BFLOAT16_ENUM = 1, 27  # GE's numbers of the types


@dataclass(frozen=True)
class QuantizedLinear:
    """What the appenders below need of one projection.

    Attributes:
        x: Input rows [R, M].
        weight: Codes of the fused model.
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
                "quantize with --passes int8-static or int8-weight"
            )
        rows, m = dims(linear.x)
        codes, step = self.graph.ops(
            "NPUDynamicQuant",
            [linear.x],
            [(rows, m), (rows,)],
            name=f"{linear.name}.codes",
            dtypes=[ir.DataType.INT8, ir.DataType.FLOAT],
        )
        scale = self._vector(f"{linear.name}.scale", self._channel_scales(linear))
        return self._quant_matmul(linear, codes, scale, step)

    def _static(self, linear: QuantizedLinear) -> ir.Value:
        assert linear.step is not None
        step = float(np.asarray(linear.step.numpy()).reshape(-1)[0])
        codes = self.graph.op(
            "AscendQuant",
            [linear.x],
            dims(linear.x),
            name=f"{linear.name}.codes",
            dtype=ir.DataType.INT8,
            scale=1.0 / step,
            offset=0.0,
        )
        scales = self._channel_scales(linear) * np.float32(step)
        if self.family == "910B":
            packed = self._vector(f"{linear.name}.scale", layout.packed_scale(scales))
            return self._quant_matmul(linear, codes, packed, None)
        rows, n = dims(linear.x)[0], len(scales)
        weight = self.graph.weight(*self._codes(linear))
        sums = self.graph.op("MatMul", [codes, weight], (rows, n), name=f"{linear.name}.sums", dtype=ir.DataType.INT32)
        plain = self._vector(f"{linear.name}.scale", layout.plain_scale(scales))
        y = self.graph.op(
            "AscendDequant",
            [sums, plain],
            (rows, n),
            name=linear.name,
            dtype=ir.DataType.FLOAT16,
            more={"dtype": _FLOAT16_ENUM},
        )
        return self._biased(linear, y)

    def _quant_matmul(
        self, linear: QuantizedLinear, codes: ir.Value, scale: ir.Value, step: ir.Value | None
    ) -> ir.Value:
        name, tensor = self._codes(linear)
        n = int(tensor.shape[1])  # type: ignore[arg-type]
        is_half = self.weights.dtype == ir.DataType.FLOAT16
        attributes = {"dtype": _FLOAT16_ENUM if is_half else _BFLOAT16_ENUM}
        if n > MAX_DIM:  # the last axis of x2 is limited, so it is stored the other way round
            name, tensor = f"{name}.by_row", self.weights.get(f"{name}.by_row", lambda: layout.codes_by_column(tensor))
            attributes["transpose_x2"] = 1
        bias = linear.bias if step is not None else None
        inputs = [codes, self.graph.weight(name, tensor), scale, None, bias, step]
        while inputs[-1] is None:
            inputs.pop()
        shape = (dims(linear.x)[0], n)
        y = self.graph.op(
            "QuantBatchMatMul", inputs, shape, name=linear.name, dtype=self.weights.dtype, more=attributes
        )
        return y if bias is not None else self._biased(linear, y)

    def _weight_only(self, op_type: str, linear: QuantizedLinear) -> ir.Value:
        n, width = (int(d) for d in linear.weight.shape.numpy())
        is_int4 = op_type != "LinearW8"
        m = 2 * width if is_int4 else width
        refusal = self._why_not_weight_only(n, m, linear.block, is_int4=is_int4)
        if refusal:
            self.note(f"{op_type}: {refusal}")
            return self._as_floats(linear)
        blocks = int(linear.scales.shape[1])  # type: ignore[arg-type]
        make = layout.nibbles_by_column if is_int4 else layout.codes_by_column
        name = f"{linear.name}.weight"
        weight = self.graph.weight(name, self.weights.get(name, lambda: make(linear.weight)))
        scales = layout.scales_by_column(linear.scales, linear.factor)
        half = self.weights.dtype.numpy()
        inputs = [linear.x, weight, self._vector(f"{linear.name}.scale", scales.astype(half))]
        if linear.zero_points is not None:
            offsets = layout.offsets_by_column(linear.zero_points, blocks)
            inputs.append(self._vector(f"{linear.name}.offset", offsets.astype(half)))
        y = self.graph.op(
            "NPUWeightQuantBatchMatmulV2",
            inputs,
            (dims(linear.x)[0], n),
            name=linear.name,
            antiquant_group_size=linear.block if blocks > 1 else 0,
        )
        return self._biased(linear, y)

    def _why_not_weight_only(self, n: int, m: int, block: int, *, is_int4: bool) -> str:
        if self.family == "310B" or (self.family == "310P" and is_int4):
            return f"the {self.family} has no kernel for {'4' if is_int4 else '8'}-bit weights"
        if max(n, m) > MAX_DIM:
            return f"{m} x {n} is beyond the {MAX_DIM} rows or columns of NPUWeightQuantBatchMatmulV2"
        if block < m and block % 32:
            return f"blocks of {block}; the kernel takes multiples of 32"
        if is_int4 and n % 8:
            return f"{n} output channels; eight share a word"
        return ""

    def _as_floats(self, linear: QuantizedLinear) -> ir.Value:
        name = f"{linear.name}.floats"
        tensor = self.weights.get(
            name,
            lambda: layout.dequantized(
                linear.weight, linear.scales, linear.zero_points, self.weights.dtype, linear.factor
            ),
        )
        n = int(tensor.shape[0])  # type: ignore[arg-type]
        y = self.graph.op(
            "Gemm", [linear.x, self.graph.weight(name, tensor)], (dims(linear.x)[0], n), name=linear.name, transB=1
        )
        return self._biased(linear, y)

    def _biased(self, linear: QuantizedLinear, y: ir.Value) -> ir.Value:
        if linear.bias is None:
            return y
        return self.graph.op("Add", [y, linear.bias], dims(y), name=f"{linear.name}.biased")

    def _codes(self, linear: QuantizedLinear) -> tuple[str, ir.TensorProtocol]:
        name = f"{linear.name}.weight"
        return name, self.weights.get(name, lambda: linear.weight)

    def _channel_scales(self, linear: QuantizedLinear) -> np.ndarray:
        scales = linear.scales.numpy().astype(np.float32).reshape(-1).copy()
        if linear.factor is not None:
            scales[: linear.factor[0]] *= np.float32(linear.factor[1])
        return scales

    def _vector(self, name: str, array: np.ndarray) -> ir.Value:
        return self.graph.weight(name, self.weights.get(name, lambda: ir.Tensor(array, name=name)))

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
        """Append the look-up in a table of 4 bits, stored as floats: no kernel takes a row of it apart."""
        self.note("EmbeddingW4: no operator unpacks 4 bits")
        floats = f"{table}.floats"
        tensor = self.weights.get(floats, lambda: layout.dequantized(codes, scales, zero_points, self.weights.dtype))
        shape = (*dims(ids), int(tensor.shape[1]))  # type: ignore[arg-type]
        return self.graph.op("Gather", [self.graph.weight(floats, tensor), ids], shape, name=name, axis=0)
