"""The fused operators: ONNX functions in domain `qcompile`, each with its meaning spelled in standard operators.

A fused graph therefore runs unchanged on any ONNX runtime, is verified the same way everywhere, and is lowered per
target: a call is replaced by the target's kernel where there is one, and inlined where there is none.

Dim letters: B batch, S query length, P past length, T = P + S, D hidden, F ffn, H heads, K kv heads, d head, N, M any.
Norms, softmax and their sums are computed in float32 whatever the dtype of the graph, as transformers does.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.errors import PassError
from qcompile.fused_op import DOMAIN, DOMAIN_VERSION, MIN_OPSET, FusedOp, TensorType, same_as_first
from qcompile.packed_functions import PACKED_OPS
from qcompile.quantized_functions import QUANTIZED_OPS

__all__ = [
    "ADD_LAYER_NORM",
    "ADD_RMS_NORM",
    "ATTENTION",
    "DOMAIN",
    "DOMAIN_VERSION",
    "FUSED_OPS",
    "GELU",
    "GELU_TANH",
    "LAYER_NORM",
    "LINEAR",
    "MIN_OPSET",
    "RMS_NORM",
    "ROTARY_EMBEDDING",
    "SWI_GLU",
    "FusedOp",
    "fused_op",
]


def _linear(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    (dtype, x_shape), (_, weight_shape) = inputs[0], inputs[1]
    return [(dtype, (*x_shape[:-1], weight_shape[1]))]


def _attention(node: ir.Node, inputs: Sequence[TensorType]) -> list[TensorType]:
    (dtype, q_shape), (cache_dtype, past_shape) = inputs[0], inputs[3]
    batch, kv_heads, past, head = past_shape
    present = (cache_dtype, (batch, kv_heads, past + q_shape[1], head))
    return [(dtype, q_shape), present, present]


def _rms_norm_of(x: str) -> str:
    """RMS norm of a value: y = x * rsqrt(mean(x^2, -1) + epsilon) * gamma        (Zhang & Sennrich 2019, eq. 4)."""
    return f"""
      x32 = Cast <to = 1> ({x})
      square = Mul (x32, x32)
      last = Constant <value = int64[1] {{-1}}> ()
      mean = ReduceMean <keepdims = 1> (square, last)
      eps = Constant <value_float: float = @epsilon> ()
      variance = Add (mean, eps)
      deviation = Sqrt (variance)
      normal = Div (x32, deviation)
      typed = CastLike (normal, {x})
      y = Mul (typed, gamma)"""


def _layer_norm_of(x: str) -> str:
    """Layer norm of a value: y = (x - mean(x)) / sqrt(var(x) + epsilon) * gamma + beta        (Ba et al. 2016, eq. 4)."""
    return f"""
      x32 = Cast <to = 1> ({x})
      last = Constant <value = int64[1] {{-1}}> ()
      mean = ReduceMean <keepdims = 1> (x32, last)
      centred = Sub (x32, mean)
      square = Mul (centred, centred)
      spread = ReduceMean <keepdims = 1> (square, last)
      eps = Constant <value_float: float = @epsilon> ()
      variance = Add (spread, eps)
      deviation = Sqrt (variance)
      normal = Div (centred, deviation)
      typed = CastLike (normal, {x})
      scaled = Mul (typed, gamma)
      y = Add (scaled, beta)"""


def _rotated(x: str, y: str) -> str:
    """Rotate a value: y = x * cos + rotate_half(x) * sin        (Su et al. 2021, eq. 34, split halves)."""
    return f"""
      {y}_first, {y}_second = Split <axis = -1, num_outputs = 2> ({x})
      {y}_negative = Neg ({y}_second)
      {y}_turned = Concat <axis = -1> ({y}_negative, {y}_first)
      {y}_straight = Mul ({x}, cos)
      {y}_crossed = Mul ({y}_turned, sin)
      {y} = Add ({y}_straight, {y}_crossed)"""


RMS_NORM = FusedOp(
    "RmsNorm",
    f"RmsNorm <epsilon> (x, gamma) => (y) {{{_rms_norm_of('x')} }}",
    same_as_first(1),
)

ADD_RMS_NORM = FusedOp(
    "AddRmsNorm",
    # h = x + residual; y = RmsNorm(h)
    f"AddRmsNorm <epsilon> (x, residual, gamma) => (y, h) {{ h = Add (x, residual){_rms_norm_of('h')} }}",
    same_as_first(2),
)

GAMMA_INPUTS = {RMS_NORM.name: 1, ADD_RMS_NORM.name: 2}  # where the scale of a norm stands among its inputs

LAYER_NORM = FusedOp(
    "LayerNorm",
    f"LayerNorm <epsilon> (x, gamma, beta) => (y) {{{_layer_norm_of('x')} }}",
    same_as_first(1),
)

ADD_LAYER_NORM = FusedOp(
    "AddLayerNorm",
    # h = x + residual; y = LayerNorm(h)
    f"AddLayerNorm <epsilon> (x, residual, gamma, beta) => (y, h) {{ h = Add (x, residual){_layer_norm_of('h')} }}",
    same_as_first(2),
)

LINEAR = FusedOp(
    "Linear",
    # y = x W + b; x [..., M], W [M, N], b [N]
    """
    Linear (x, weight, bias) => (y) {
      product = MatMul (x, weight)
      y = Add (product, bias)
    }""",
    _linear,
)

SWI_GLU = FusedOp(
    "SwiGlu",
    # y = gate * sigmoid(gate) * up        (Shazeer 2020, eq. 6 without the projections)
    """
    SwiGlu (gate, up) => (y) {
      sigmoid = Sigmoid (gate)
      silu = Mul (gate, sigmoid)
      y = Mul (silu, up)
    }""",
    same_as_first(1),
)

GELU = FusedOp(
    "Gelu",
    # y = x/2 * (1 + erf(x / sqrt 2))        (Hendrycks & Gimpel 2016)
    """
    Gelu (x) => (y) {
      root = Constant <value = float {1.4142135623730951}> ()
      root_like = CastLike (root, x)
      scaled = Div (x, root_like)
      erf = Erf (scaled)
      one = Constant <value = float {1.0}> ()
      one_like = CastLike (one, x)
      sum = Add (erf, one_like)
      half = Constant <value = float {0.5}> ()
      half_like = CastLike (half, x)
      half_x = Mul (x, half_like)
      y = Mul (half_x, sum)
    }""",
    same_as_first(1),
)

GELU_TANH = FusedOp(
    "GeluTanh",
    # y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))        (Hendrycks & Gimpel 2016, the approximation)
    """
    GeluTanh (x) => (y) {
      square = Mul (x, x)
      cube = Mul (square, x)
      c = Constant <value = float {0.044715}> ()
      c_like = CastLike (c, x)
      bent = Mul (cube, c_like)
      inner = Add (x, bent)
      root = Constant <value = float {0.7978845608028654}> ()
      root_like = CastLike (root, x)
      scaled = Mul (inner, root_like)
      tanh = Tanh (scaled)
      one = Constant <value = float {1.0}> ()
      one_like = CastLike (one, x)
      sum = Add (tanh, one_like)
      half = Constant <value = float {0.5}> ()
      half_like = CastLike (half, x)
      half_x = Mul (x, half_like)
      y = Mul (half_x, sum)
    }""",
    same_as_first(1),
)

ROTARY_EMBEDDING = FusedOp(
    "RotaryEmbedding",
    # x [B,N,S,d], cos and sin [B,1,S,d]
    f"RotaryEmbedding (x, cos, sin) => (y) {{{_rotated('x', 'y')} }}",
    same_as_first(1),
)

ATTENTION = FusedOp(
    "Attention",
    # Causal grouped-query attention with rotary embedding and KV cache (Vaswani et al. 2017, eq. 1; Ainslie et al. 2023).
    # q [B,S,H*d], k and v [B,S,K*d], past_* [B,K,P,d], cos and sin [B,1,S,d], attention_mask int64 [B,T] (1 = token)
    # -> y [B,S,H*d], present_* [B,K,T,d]. Query i sees key j when j <= P + i and attention_mask[b, j] = 1.
    # q is scaled before the product: float16 scores of Qwen's large key biases would overflow before the scale.
    """
    Attention <num_heads, kv_num_heads, scale> (q, k, v, past_key, past_value, cos, sin, attention_mask)
        => (y, present_key, present_value) {
      zero = Constant <value = int64[1] {0}> ()
      one = Constant <value = int64[1] {1}> ()
      two = Constant <value = int64[1] {2}> ()
      minus_one = Constant <value = int64[1] {-1}> ()
      heads_scalar = Constant <value_int: int = @num_heads> ()
      kv_scalar = Constant <value_int: int = @kv_num_heads> ()
      heads_1d = Unsqueeze (heads_scalar, zero)
      kv_1d = Unsqueeze (kv_scalar, zero)
      group_1d = Div (heads_1d, kv_1d)
      q_shape = Concat <axis = 0> (zero, zero, heads_1d, minus_one)
      kv_shape = Concat <axis = 0> (zero, zero, kv_1d, minus_one)
      q_rows = Reshape (q, q_shape)
      k_rows = Reshape (k, kv_shape)
      v_rows = Reshape (v, kv_shape)
      q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
      k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
      v_heads = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    """
    + _rotated("q_heads", "q_rope")
    + _rotated("k_heads", "k_rope")
    + """
      present_key = Concat <axis = 2> (past_key, k_rope)
      present_value = Concat <axis = 2> (past_value, v_heads)

      total = Shape <start = 2, end = 3> (present_key)
      past = Shape <start = 2, end = 3> (past_key)
      query = Shape <start = 1, end = 2> (q)
      start = Constant <value_int: int = 0> ()
      step = Constant <value_int: int = 1> ()
      total_scalar = Squeeze (total, zero)
      query_scalar = Squeeze (query, zero)
      columns = Range (start, total_scalar, step)
      rows = Range (start, query_scalar, step)
      rows_after_past = Add (rows, past)
      rows_2d = Unsqueeze (rows_after_past, one)
      causal = LessOrEqual (columns, rows_2d)
      is_token = Cast <to = 9> (attention_mask)
      token_axes = Constant <value = int64[3] {1, 2, 3}> ()
      token_5d = Unsqueeze (is_token, token_axes)
      visible = And (causal, token_5d)

      grouped_shape = Concat <axis = 0> (zero, kv_1d, group_1d, query, minus_one)
      factor = Constant <value_float: float = @scale> ()
      factor_like = CastLike (factor, q)
      q_scaled = Mul (q_rope, factor_like)
      q_grouped = Reshape (q_scaled, grouped_shape)
      k_group = Unsqueeze (present_key, two)
      v_group = Unsqueeze (present_value, two)
      k_transposed = Transpose <perm = [0, 1, 2, 4, 3]> (k_group)
      scores = MatMul (q_grouped, k_transposed)
      scores32 = Cast <to = 1> (scores)
      lowest = Constant <value = float {-3.4028234663852886e38}> ()
      masked = Where (visible, scores32, lowest)
      weights32 = Softmax <axis = -1> (masked)
      weights = CastLike (weights32, v)
      mixed = MatMul (weights, v_group)
      y_shape = Concat <axis = 0> (zero, heads_1d, query, minus_one)
      y_heads = Reshape (mixed, y_shape)
      y_rows = Transpose <perm = [0, 2, 1, 3]> (y_heads)
      flat_shape = Concat <axis = 0> (zero, zero, minus_one)
      y = Reshape (y_rows, flat_shape)
    }""",
    _attention,
)

FUSED_OPS: dict[str, FusedOp] = {
    op.name: op
    for op in (
        RMS_NORM,
        ADD_RMS_NORM,
        LAYER_NORM,
        ADD_LAYER_NORM,
        LINEAR,
        SWI_GLU,
        GELU,
        GELU_TANH,
        ROTARY_EMBEDDING,
        ATTENTION,
        *QUANTIZED_OPS,
        *PACKED_OPS,
    )
}


def fused_op(name: str) -> FusedOp:
    """Return a fused operator by name, or raise PassError."""
    if name not in FUSED_OPS:
        raise PassError(f"no fused operator '{name}'; there are: {', '.join(sorted(FUSED_OPS))}")
    return FUSED_OPS[name]
