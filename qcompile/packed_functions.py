"""Codes of 4 to 6 bits and nested scales, unpacked: ONNX functions in domain `qcompile` whose inputs are all constants.

    UnpackInt4(nibbles)               code = nibble - 8
    UnpackInt5(nibbles, rest)         code = nibble + 16 * bit - 16
    UnpackInt6(nibbles, rest)         code = nibble + 16 * pair - 32
    BlockScales(codes, steps)         scale[n, i] = codes[n, i] * steps[n, i / r]
    RepeatScales <times> (scales)     one scale for each of the `times` blocks that a block is cut into
    ZeroPoints <largest> (s, minima)  the code nearest to 0 of each block: clip(round(minima / s), 0, largest)
    ShiftCodes <middle> (codes, z)    codes[n, m] + middle - z[n, m / g]: as LinearW8 has no zero points
    PackInt4(z)                       two of a row in a byte, the first one low

nibbles uint8 [N, M / 2]: the low four bits of a byte belong to the first half of a row, the high ones to the second. rest
uint8 [N, M / 8] or [N, M / 4]: the bits above, those of eight or four neighbours in a byte, the first one lowest. codes of
scales int8 [N, G], steps float32 [N, G / r]. The results are int8 [N, M], float32 [N, G] (zero points too, as they are
multiplied) and uint8 [N, ceil(G / 2)]; a target that folds constants
computes them once, when the model is loaded (ONNX Runtime would not if there was a CastLike among the operators).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.fused_op import FusedOp, TensorType


def _codes(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of the codes of nibbles [N, M / 2]: int8 [N, M]."""
    _, (num_rows, width) = inputs[0]
    return [(ir.DataType.INT8, (num_rows, 2 * width))]


def _scales(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of the scales of codes [N, G]."""
    return [(inputs[1][0], inputs[0][1])]


def _repeated(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of scales [N, G] repeated: [N, times * G]."""
    dtype, (num_rows, num_blocks) = inputs[0]
    return [(dtype, (num_rows, num_blocks * node.attributes["times"].as_int()))]


def _same(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of what has the type of the first input."""
    return [inputs[0]]


def _packed(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    """Type of zero points [N, G], packed: uint8 [N, ceil(G / 2)]."""
    _, (num_rows, num_blocks) = inputs[0]
    return [(ir.DataType.UINT8, (num_rows, (num_blocks + 1) // 2))]


_PLANES = """
      low_bits = Constant <value = uint8 {15}> ()
      four = Constant <value = uint8 {4}> ()
      low = BitwiseAnd (nibbles, low_bits)
      high = BitShift <direction = "RIGHT"> (nibbles, four)
      planes = Concat <axis = -1> (low, high)"""


def _rest(bits: int) -> str:
    """Spell whole = planes + 16 * rest, for `bits` - 4 bits of rest a code."""
    width = bits - 4
    shifts = ", ".join(str(shift) for shift in range(0, 8, width))
    return f"""
      last = Constant <value = int64[1] {{-1}}> ()
      shifts = Constant <value = uint8[{8 // width}] {{{shifts}}}> ()
      rest_bits = Constant <value = uint8 {{{(1 << width) - 1}}}> ()
      columns = Unsqueeze (rest, last)
      shifted = BitShift <direction = "RIGHT"> (columns, shifts)
      exact = BitwiseAnd (shifted, rest_bits)
      shape = Shape (planes)
      flat = Reshape (exact, shape)
      placed = BitShift <direction = "LEFT"> (flat, four)
      whole = BitwiseOr (planes, placed)"""


def _centred(bits: int, whole: str) -> str:
    return f"""
      wide = Cast <to = 6> ({whole})
      middle = Constant <value = int32 {{{1 << (bits - 1)}}}> ()
      centred = Sub (wide, middle)
      codes = Cast <to = 3> (centred)"""


UNPACK_INT4 = FusedOp("UnpackInt4", f"UnpackInt4 (nibbles) => (codes) {{ {_PLANES}{_centred(4, 'planes')} }}", _codes)
UNPACK_INT5 = FusedOp(
    "UnpackInt5", f"UnpackInt5 (nibbles, rest) => (codes) {{ {_PLANES}{_rest(5)}{_centred(5, 'whole')} }}", _codes
)
UNPACK_INT6 = FusedOp(
    "UnpackInt6", f"UnpackInt6 (nibbles, rest) => (codes) {{ {_PLANES}{_rest(6)}{_centred(6, 'whole')} }}", _codes
)
BLOCK_SCALES = FusedOp(
    "BlockScales",
    """BlockScales (codes, steps) => (scales) {
      last = Constant <value = int64[1] {-1}> ()
      typed = Cast <to = 1> (codes)
      rows = Shape (steps)
      by_step = Concat <axis = 0> (rows, last)
      groups = Reshape (typed, by_step)
      columns = Unsqueeze (steps, last)
      products = Mul (groups, columns)
      shape = Shape (codes)
      scales = Reshape (products, shape)
    }""",
    _scales,
)
REPEAT_SCALES = FusedOp(
    "RepeatScales",
    """RepeatScales <times> (scales) => (y) {
      last = Constant <value = int64[1] {-1}> ()
      zero = Constant <value = int64[1] {0}> ()
      one = Constant <value = int64[1] {1}> ()
      count = Constant <value_int: int = @times> ()
      count_1d = Unsqueeze (count, zero)
      columns = Unsqueeze (scales, last)
      spread = Concat <axis = 0> (one, one, count_1d)
      copies = Expand (columns, spread)
      rows = Shape <end = 1> (scales)
      shape = Concat <axis = 0> (rows, last)
      y = Reshape (copies, shape)
    }""",
    _repeated,
)
ZERO_POINTS = FusedOp(
    "ZeroPoints",
    """ZeroPoints <largest> (scales, minima) => (z) {
      zero = Constant <value = float {0.0}> ()
      one = Constant <value = float {1.0}> ()
      count = Constant <value_int: int = @largest> ()
      most = Cast <to = 1> (count)
      is_zero = Equal (scales, zero)
      divisors = Where (is_zero, one, scales)
      exact = Div (minima, divisors)
      nearest = Round (exact)
      z = Clip (nearest, zero, most)
    }""",
    _same,
)
SHIFT_CODES = FusedOp(
    "ShiftCodes",
    """ShiftCodes <middle> (codes, z) => (y) {
      last = Constant <value = int64[1] {-1}> ()
      count = Constant <value_int: int = @middle> ()
      middle_32 = Cast <to = 1> (count)
      typed = Cast <to = 1> (codes)
      rows = Shape (z)
      by_block = Concat <axis = 0> (rows, last)
      groups = Reshape (typed, by_block)
      steps = Sub (middle_32, z)
      columns = Unsqueeze (steps, last)
      moved = Add (groups, columns)
      shape = Shape (codes)
      flat = Reshape (moved, shape)
      y = Cast <to = 3> (flat)
    }""",
    _same,
)
PACK_INT4 = FusedOp(
    "PackInt4",
    # a column of zeros behind the others makes pairs of an odd number
    """PackInt4 (z) => (packed) {
      behind = Constant <value = int64[4] {0, 0, 0, 1}> ()
      first = Constant <value = int64[1] {0}> ()
      one = Constant <value = int64[1] {1}> ()
      two = Constant <value = int64[1] {2}> ()
      before_last = Constant <value = int64[1] {-1}> ()
      end = Constant <value = int64[1] {9223372036854775807}> ()
      sixteen = Constant <value = float {16.0}> ()
      padded = Pad (z, behind)
      low = Slice (padded, first, before_last, one, two)
      high = Slice (padded, one, end, one, two)
      placed = Mul (high, sixteen)
      both = Add (low, placed)
      packed = Cast <to = 2> (both)
    }""",
    _packed,
)
UNPACKING = {4: UNPACK_INT4, 5: UNPACK_INT5, 6: UNPACK_INT6}
PACKED_OPS: tuple[FusedOp, ...] = (
    *UNPACKING.values(),
    BLOCK_SCALES,
    REPEAT_SCALES,
    ZERO_POINTS,
    SHIFT_CODES,
    PACK_INT4,
)
