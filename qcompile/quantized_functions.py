"""The quantized Linears and embeddings: ONNX functions in domain `qcompile`, as `qcompile.functions` has the others.

Letters: N output channels, M inputs, g = block_size, G = M / g blocks of a row, V vocabulary, D hidden. Codes of 8 bits
are int8; codes of 4 bits are two to a byte, the first one low, each stored plus 8 (so that both kinds unpack alike):

    LinearW8, EmbeddingW8                          w' = scales[n, m / g] * weight[n, m]
    LinearW4, EmbeddingW4                          w' = scales[n, m / g] * (code[n, m] - 8)
    LinearW4Asymmetric, EmbeddingW4Asymmetric      w' = scales[n, m / g] * (code[n, m] - zero_point[n, m / g])
    LinearW8A8, LinearW8A8Static                   w' = scales[n] * weight[m, n], and x is rounded to 8 bits too
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.fused_op import FusedOp, InferOutputs, TensorType

# What LinearW8A8 divides a row of zeros by, instead of 0.
_SMALLEST_STEP = "1e-30"


def _by_rows(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of the output for x [.., M] and weight [N, ..]: [.., N]."""
    (dtype, x_shape), (_, weight_shape) = inputs[0], inputs[1]
    return [(dtype, (*x_shape[:-1], weight_shape[0]))]


def _by_columns(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of the output for x [.., M] and weight [M, N]: [.., N]."""
    (dtype, x_shape), (_, weight_shape) = inputs[0], inputs[1]
    return [(dtype, (*x_shape[:-1], weight_shape[1]))]


def _looked_up(codes_per_element: int) -> InferOutputs:
    """Type of the output for indices [..] and weight [V, D / codes]: [.., D] of the scales' type."""

    def infer(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
        (_, shape), (_, weight_shape), (dtype, _) = inputs[0], inputs[1], inputs[2]
        return [(dtype, (*shape, weight_shape[1] * codes_per_element))]

    return infer


_BLOCK = """
      block = Constant <value_int: int = @block_size> ()
      minus_one = Constant <value = int64[1] {-1}> ()
      first_axis = Constant <value = int64[1] {0}> ()
      block_1d = Unsqueeze (block, first_axis)
      block_rows = Concat <axis = 0> (minus_one, block_1d)
      one_per_block = Constant <value = int64[2] {-1, 1}> ()"""


def _int8_values(codes: str, scales: str) -> str:
    """Spell values = codes [.., M] int8 times their scales [.., G], in the scales' type."""
    return f"""{_BLOCK}
      code_rows = Reshape ({codes}, block_rows)
      float_rows = CastLike (code_rows, {scales})
      scale_rows = Reshape ({scales}, one_per_block)
      value_rows = Mul (float_rows, scale_rows)
      full_shape = Shape ({codes})
      values = Reshape (value_rows, full_shape)"""


def _unpacked(name: str, packed: str) -> str:
    """Spell name_pairs uint8 [.., M / 2, 2]: the codes of each byte, the low one first."""
    return f"""
      {name}_low = BitwiseAnd ({packed}, low_bits)
      {name}_high = BitShift <direction = "RIGHT"> ({packed}, four)
      {name}_low_1 = Unsqueeze ({name}_low, minus_one)
      {name}_high_1 = Unsqueeze ({name}_high, minus_one)
      {name}_pairs = Concat <axis = -1> ({name}_low_1, {name}_high_1)"""


_EIGHT = """
      eight = Constant <value = float {8.0}> ()"""


def _block_zero_points(zero_points: str, scales: str) -> str:
    """Spell zero_rows uint8 [.. * G, 1]: one code per block; a row of an odd number of blocks has half a byte to spare."""
    return f"""{_unpacked("zero", zero_points)}
      num_blocks = Shape <start = -1> ({scales})
      leading = Shape <end = -1> ({zero_points})
      zero_shape = Concat <axis = 0> (leading, minus_one)
      zero_flat = Reshape (zero_pairs, zero_shape)
      zero_exact = Slice (zero_flat, first_axis, num_blocks, minus_one)
      zero_codes = Reshape (zero_exact, one_per_block)
      zero_rows = CastLike (zero_codes, {scales})"""


def _int4_values(packed: str, scales: str, zero_points: str | None = None) -> str:
    """Spell values = (codes - zero points) times scales; packed [.., M / 2] uint8, scales [.., G]."""
    zero = (
        _block_zero_points(zero_points, scales) if zero_points else f"{_EIGHT}\n zero_rows = CastLike (eight, {scales})"
    )
    return f"""{_BLOCK}
      low_bits = Constant <value = uint8 {{15}}> ()
      four = Constant <value = uint8 {{4}}> ()
      {_unpacked("code", packed)}
      code_rows = Reshape (code_pairs, block_rows)
      float_rows = CastLike (code_rows, {scales})
      {zero}
      centred_rows = Sub (float_rows, zero_rows)
      scale_rows = Reshape ({scales}, one_per_block)
      value_rows = Mul (centred_rows, scale_rows)
      rows_of_values = Shape <end = -1> ({packed})
      full_shape = Concat <axis = 0> (rows_of_values, minus_one)
      values = Reshape (value_rows, full_shape)"""


_PRODUCT = """
      typed = CastLike (values, x)
      transposed = Transpose <perm = [1, 0]> (typed)
      y = MatMul (x, transposed)"""


def _int8_product(scaling: str) -> str:
    """Spell y = step * scales * sum over m of code[.., m] weight[m, n], the sums exact in int32."""
    return f"""
      scaled = Div (x32, {scaling})
      nearest = Round (scaled)
      least = Constant <value = float {{-128.0}}> ()
      most = Constant <value = float {{127.0}}> ()
      code = Clip (nearest, least, most)
      middle = Constant <value = float {{128.0}}> ()
      stored = Add (code, middle)
      unsigned = Cast <to = 2> (stored)
      zero_point = Constant <value = uint8 {{128}}> ()
      sums = MatMulInteger (unsigned, weight, zero_point)
      float_sums = Cast <to = 1> (sums)
      by_row = Mul (float_sums, {scaling})
      scales32 = Cast <to = 1> (scales)
      by_column = Mul (by_row, scales32)
      y = CastLike (by_column, x)"""


LINEAR_W8 = FusedOp(
    "LinearW8",
    # y = x W^T; weight int8 [N, M], scales [N, G]
    f"LinearW8 <block_size> (x, weight, scales) => (y) {{ {_int8_values('weight', 'scales')}{_PRODUCT} }}",
    _by_rows,
)

LINEAR_W4 = FusedOp(
    "LinearW4",
    # y = x W^T; weight uint8 [N, M / 2], scales [N, G]
    f"LinearW4 <block_size> (x, weight, scales) => (y) {{ {_int4_values('weight', 'scales')}{_PRODUCT} }}",
    _by_rows,
)

LINEAR_W4_ASYMMETRIC = FusedOp(
    "LinearW4Asymmetric",
    # y = x W^T; weight uint8 [N, M / 2], scales [N, G], zero_points uint8 [N, ceil(G / 2)], packed like the weight
    f"""LinearW4Asymmetric <block_size> (x, weight, scales, zero_points) => (y) {{
      {_int4_values("weight", "scales", "zero_points")}{_PRODUCT}
    }}""",
    _by_rows,
)

LINEAR_W8A8 = FusedOp(
    "LinearW8A8",
    # Every row of x has its own step: step = max|x| / 127, code = round(x / step). weight int8 [M, N], scales [N].
    f"""LinearW8A8 (x, weight, scales) => (y) {{
      x32 = Cast <to = 1> (x)
      magnitude = Abs (x32)
      last = Constant <value = int64[1] {{-1}}> ()
      largest = ReduceMax <keepdims = 1> (magnitude, last)
      steps = Constant <value = float {{127.0}}> ()
      exact_step = Div (largest, steps)
      smallest_step = Constant <value = float {{{_SMALLEST_STEP}}}> ()
      step = Max (exact_step, smallest_step)
      {_int8_product("step")}
    }}""",
    _by_columns,
)

LINEAR_W8A8_STATIC = FusedOp(
    "LinearW8A8Static",
    # One step for all of x, found beforehand: code = clip(round(x / step), -128, 127). weight int8 [M, N], scales [N].
    f"""LinearW8A8Static (x, weight, scales, step) => (y) {{
      x32 = Cast <to = 1> (x)
      step32 = Cast <to = 1> (step)
      {_int8_product("step32")}
    }}""",
    _by_columns,
)

_ROWS = """
      codes = Gather <axis = 0> (weight, indices)
      row_scales = Gather <axis = 0> (scales, indices)"""

EMBEDDING_W8 = FusedOp(
    "EmbeddingW8",
    # y = rows of W; indices int64 [..], weight int8 [V, D], scales [V, G]
    f"""EmbeddingW8 <block_size> (indices, weight, scales) => (y) {{
      {_ROWS}{_int8_values("codes", "row_scales")}
      y = Identity (values)
    }}""",
    _looked_up(1),
)

EMBEDDING_W4 = FusedOp(
    "EmbeddingW4",
    # y = rows of W; indices int64 [..], weight uint8 [V, D / 2], scales [V, G]
    f"""EmbeddingW4 <block_size> (indices, weight, scales) => (y) {{
      {_ROWS}{_int4_values("codes", "row_scales")}
      y = Identity (values)
    }}""",
    _looked_up(2),
)

EMBEDDING_W4_ASYMMETRIC = FusedOp(
    "EmbeddingW4Asymmetric",
    # y = rows of W; indices int64 [..], weight uint8 [V, D / 2], scales [V, G], zero_points uint8 [V, ceil(G / 2)]
    f"""EmbeddingW4Asymmetric <block_size> (indices, weight, scales, zero_points) => (y) {{
      {_ROWS}
      row_zero_points = Gather <axis = 0> (zero_points, indices)
      {_int4_values("codes", "row_scales", "row_zero_points")}
      y = Identity (values)
    }}""",
    _looked_up(2),
)

QUANTIZED_OPS: tuple[FusedOp, ...] = (
    LINEAR_W8,
    LINEAR_W4,
    LINEAR_W4_ASYMMETRIC,
    LINEAR_W8A8,
    LINEAR_W8A8_STATIC,
    EMBEDDING_W8,
    EMBEDDING_W4,
    EMBEDDING_W4_ASYMMETRIC,
)
# Linears whose weight is read by rows of outputs, and in blocks along them.
BLOCKED_LINEARS = frozenset({LINEAR_W8.name, LINEAR_W4.name, LINEAR_W4_ASYMMETRIC.name})
QUANTIZED_LINEARS = BLOCKED_LINEARS | {LINEAR_W8A8.name, LINEAR_W8A8_STATIC.name}
EMBEDDINGS = frozenset({EMBEDDING_W8.name, EMBEDDING_W4.name, EMBEDDING_W4_ASYMMETRIC.name})
