"""What every NPU operator that the lowering emits means: an ONNX function body with its argument order and semantics.

A lowered graph holds operators that no ONNX runtime knows. `reference_model` returns the same graph with each of them
calling its definition, so that the graph that goes to ATC, not an ancestor of it, is what is run and compared. The
bodies follow CANN's documentation; they were not compared with a device.

Rounding: ONNX Runtime's CPU has no float16 kernels; it computes in float32 and drops the roundings between operators where
it can, which made the scores of Qwen2.5-0.5B look ten times more exact than float16 is. So the copy is in float32, and
what each operator makes is cast to the graph's type and back: a chip's kernels round their results, and only these.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.ascend.lowering.static_graph import OPSET
from qcompile.ascend.reference_inputs import complete_inputs
from qcompile.tensors import Array, MappedTensor, StreamedTensor
from qcompile.weights import rows_of

DOMAIN = "npu_reference"

# Letters: x [.., D], gamma [D]; rotary x [B,S,N,d], cos and sin [B,S,1,d]; rows R, inputs M, outputs N, blocks G.
# What both attention operators share: the query heads of a group in the rows of one product, by_head [B,H,S,T] ...
_GROUPED_SCORES = """\
      first = Constant <value = int64[1] {0}> ()
      rest = Constant <value = int64[1] {-1}> ()
      heads_0 = Constant <value_int: int = @num_heads> ()
      kv_heads_0 = Constant <value_int: int = @num_key_value_heads> ()
      heads = Unsqueeze (heads_0, first)
      kv_heads = Unsqueeze (kv_heads_0, first)
      batch = Shape <start = 0, end = 1> (query)
      new = Shape <start = 2, end = 3> (query)
      size = Shape <start = 3> (query)
      total = Shape <start = 2, end = 3> (key)
      group_shape = Concat <axis = 0> (batch, kv_heads, rest, size)
      grouped = Reshape (query, group_shape)
      columns = Transpose <perm = [0, 1, 3, 2]> (key)
      products = MatMul (grouped, columns)
      score_shape = Concat <axis = 0> (batch, heads, new, total)
      by_head = Reshape (products, score_shape)
"""
# ... and from unmasked [B,H,S,T], their scaled and shifted products, to mixed and the shape [B,H,S,d]
_MASKED_MIX = """\
      is_masked = Cast <to = 9> (atten_mask)
      lowest = Constant <value = float {-3.4e38}> ()
      scores = Where (is_masked, lowest, unmasked)
      shares = Softmax <axis = -1> (scores)
      share_shape = Concat <axis = 0> (batch, kv_heads, rest, total)
      shares_grouped = Reshape (shares, share_shape)
      mixed = MatMul (shares_grouped, value)
      mixed_shape = Concat <axis = 0> (batch, heads, new, size)
"""
_BODIES = {
    # y = x / sqrt(mean(x^2) + 1e-6) * gamma; the mean and the root in float32, whatever epsilon the node says
    "NPURmsNorm": """
    NPURmsNorm (x, gamma) => (y) {
      x32 = Cast <to = 1> (x)
      square = Mul (x32, x32)
      mean = ReduceMean <axes = [-1], keepdims = 1> (square)
      eps = Constant <value = float {1e-6}> ()
      variance = Add (mean, eps)
      root = Sqrt (variance)
      normal = Div (x32, root)
      gamma32 = Cast <to = 1> (gamma)
      scaled = Mul (normal, gamma32)
      y = CastLike (scaled, x)
    }""",
    # y = x * cos + rotate_half(x) * sin
    "NPURotaryMul": """
    NPURotaryMul (x, cos, sin) => (y) {
      first, second = Split <axis = -1> (x)
      negative = Neg (second)
      turned = Concat <axis = -1> (negative, first)
      straight = Mul (x, cos)
      crossed = Mul (turned, sin)
      y = Add (straight, crossed)
    }""",
    # y = softmax(query key^T * scale_value + pse_shift, with the lowest number where atten_mask is 1) value, in float32.
    # query [B,H,S,d], key and value [B,K,T,d], pse_shift [1,H,S,T], atten_mask [B,1,S,T]; layout BNSD_BSND: y [B,S,H,d]
    "NPUPromptFlashAttention": """
    NPUPromptFlashAttention <num_heads, num_key_value_heads, scale_value>
    (query, key, value, pse_shift, atten_mask) => (y) {
"""
    + _GROUPED_SCORES
    + """      factor = Constant <value_float: float = @scale_value> ()
      scaled = Mul (by_head, factor)
      unmasked = Add (scaled, pse_shift)
"""
    + _MASKED_MIX
    + """      mixed_by_head = Reshape (mixed, mixed_shape)
      y = Transpose <perm = [0, 2, 1, 3]> (mixed_by_head)
    }""",
    # The operators of the plugins (qcompile.ascend.plugins). NPURmsNorm with the node's own epsilon
    "NPURmsNormEpsilon": """
    NPURmsNormEpsilon <epsilon> (x, gamma) => (y) {
      x32 = Cast <to = 1> (x)
      square = Mul (x32, x32)
      mean = ReduceMean <axes = [-1], keepdims = 1> (square)
      eps = Constant <value_float: float = @epsilon> ()
      variance = Add (mean, eps)
      root = Sqrt (variance)
      normal = Div (x32, root)
      gamma32 = Cast <to = 1> (gamma)
      scaled = Mul (normal, gamma32)
      y = CastLike (scaled, x)
    }""",
    # y = silu(first half) * second half, of the last axis
    "NPUSwiGlu": """
    NPUSwiGlu (x) => (y) {
      gate, up = Split <axis = -1> (x)
      sigmoid = Sigmoid (gate)
      silu = Mul (gate, sigmoid)
      y = Mul (silu, up)
    }""",
    # both turned as NPURotaryMul turns; query [B,S,H,d], key [B,S,K,d], cos and sin [B,S,1,d]
    "NPUApplyRotaryPosEmb": """
    NPUApplyRotaryPosEmb (query, key, cos, sin) => (query_out, key_out) {
      q_first, q_second = Split <axis = -1> (query)
      q_negative = Neg (q_second)
      q_turned = Concat <axis = -1> (q_negative, q_first)
      q_straight = Mul (query, cos)
      q_crossed = Mul (q_turned, sin)
      query_out = Add (q_straight, q_crossed)
      k_first, k_second = Split <axis = -1> (key)
      k_negative = Neg (k_second)
      k_turned = Concat <axis = -1> (k_negative, k_first)
      k_straight = Mul (key, cos)
      k_crossed = Mul (k_turned, sin)
      key_out = Add (k_straight, k_crossed)
    }""",
    # NPUPromptFlashAttention without pse_shift; y [B,H,S,d], turned to [B,S,H,d] behind it where the layout says so
    "NPUFusedInferAttentionScore": """
    NPUFusedInferAttentionScore <num_heads, num_key_value_heads, scale> (query, key, value, atten_mask) => (y) {
"""
    + _GROUPED_SCORES
    + """      factor = Constant <value_float: float = @scale> ()
      unmasked = Mul (by_head, factor)
"""
    + _MASKED_MIX
    + """      y = Reshape (mixed, mixed_shape)
    }""",
    # Per row: step = max|x| / 127, y = round(x / step)
    "NPUDynamicQuant": """
    NPUDynamicQuant (x) => (y, scale) {
      magnitude = Abs (x)
      largest = ReduceMax <axes = [-1], keepdims = 1> (magnitude)
      most = Constant <value = float {127.0}> ()
      exact_step = Div (largest, most)
      smallest = Constant <value = float {1e-30}> ()
      step = Max (exact_step, smallest)
      scaled = Div (x, step)
      nearest = Round (scaled)
      y = Cast <to = 3> (nearest)
      last = Constant <value = int64[1] {-1}> ()
      scale = Squeeze (step, last)
    }""",
    # y = round(x * scale) + offset, cut off at -128 and 127
    "AscendQuant": """
    AscendQuant <scale, offset> (x) => (y) {
      factor = Constant <value_float: float = @scale> ()
      shift = Constant <value_float: float = @offset> ()
      scaled = Mul (x, factor)
      nearest = Round (scaled)
      shifted = Add (nearest, shift)
      least = Constant <value = float {-128.0}> ()
      most = Constant <value = float {127.0}> ()
      cut = Clip (shifted, least, most)
      y = Cast <to = 3> (cut)
    }""",
    # y = round(x * scale + offset), cut off at -128 and 127; scale and offset [1] or one per column
    "NPUAscendQuantV2": """
    NPUAscendQuantV2 (x, scale, offset) => (y) {
      scaled = Mul (x, scale)
      shifted = Add (scaled, offset)
      nearest = Round (shifted)
      least = Constant <value = float {-128.0}> ()
      most = Constant <value = float {127.0}> ()
      cut = Clip (nearest, least, most)
      y = Cast <to = 3> (cut)
    }""",
    # y = x * deq_scale; x int32 [R,N], deq_scale [N] as decoded from its packing
    "AscendDequant": """
    AscendDequant (x, deq_scale) => (y) {
      sums = Cast <to = 1> (x)
      y = Mul (sums, deq_scale)
    }""",
    # y = (x1 x2) * scale * pertoken_scale + bias; x1 int8 [R,M], x2 int8 [M,N], sums exact in int32
    "QuantBatchMatMul": """
    QuantBatchMatMul (x1, x2, scale, bias, pertoken_scale) => (y) {
      sums = MatMulInteger (x1, x2)
      sums32 = Cast <to = 1> (sums)
      by_column = Mul (sums32, scale)
      last = Constant <value = int64[1] {-1}> ()
      steps = Unsqueeze (pertoken_scale, last)
      by_row = Mul (by_column, steps)
      y = Add (by_row, bias)
    }""",
    # y = x w, w = (weight + antiquant_offset) * antiquant_scale by groups of rows; weight int8 [M,N], scale [G,N]
    "NPUWeightQuantBatchMatmulV2": """
    NPUWeightQuantBatchMatmulV2 (x, weight, antiquant_scale, antiquant_offset) => (y) {
      codes = Cast <to = 1> (weight)
      shape = Shape (weight)
      scale_shape = Shape (antiquant_scale)
      first = Constant <value = int64[1] {0}> ()
      minus_one = Constant <value = int64[1] {-1}> ()
      groups = Gather (scale_shape, first)
      columns = Gather (shape, minus_one)
      grouped = Concat <axis = 0> (groups, minus_one, columns)
      code_groups = Reshape (codes, grouped)
      second = Constant <value = int64[1] {1}> ()
      scales = Unsqueeze (antiquant_scale, second)
      offsets = Unsqueeze (antiquant_offset, second)
      moved = Add (code_groups, offsets)
      scaled = Mul (moved, scales)
      weights = Reshape (scaled, shape)
      y = MatMul (x, weights)
    }""",
}
NPU_OPS = frozenset(_BODIES)
# They move numbers and compute none.
_EXACT = {"Reshape", "Concat", "Gather", "Transpose", "Slice", "Split", "Identity", "Expand", "TopK", "ArgMax"}
_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


@functools.cache
def _function(op_type: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n{_BODIES[op_type]}')


WideWeights = dict[tuple[str, int, int], ir.TensorProtocol]  # by file, offset and length


def reference_model(model: ir.Model, *, keep_logits: bool = False, shared: WideWeights | None = None) -> ir.Model:
    """Return a copy of a lowered graph that any ONNX runtime runs, in float32 with the roundings of the graph's types.

    Args:
        model: The lowered graph; it is left as it is.
        keep_logits: Make what the greedy choice is taken from an output, `logits` [B, 1, V], if it is none.
        shared: Give one dictionary for all graphs that share a file of weights, and their copies share them too.
    """
    shared = {} if shared is None else shared
    twin = model.clone()
    graph = twin.graph
    if keep_logits:
        _keep_logits(graph)
    for value in (*graph.inputs, *graph.initializers.values()):
        _widen(value, shared)
    used = set()
    for node in list(graph):
        used |= _define(graph, node)
        for value in node.outputs:
            if value.dtype in _HALVES:
                _round(graph, node, value)
    for op_type in sorted(used):
        function = ir.serde.deserialize_function(_function(op_type))
        twin.functions[function.identifier()] = function
    if used:
        graph.opset_imports[DOMAIN] = 1
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return twin


def _define(graph: ir.Graph, node: ir.Node) -> set[str]:
    """Make a node that no runtime knows call its definition; returns the definition's name."""
    if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.INT8:
        node.op_type = "MatMulInteger"
    if node.domain != "" or node.op_type not in NPU_OPS:
        return set()
    complete_inputs(graph, node)
    known = set(_function(node.op_type).attribute)
    for name in set(node.attributes) - known:  # the parser ignores them, or `complete_inputs` has heeded them
        node.attributes.pop(name)
    node.domain = DOMAIN
    return {node.op_type}


def _keep_logits(graph: ir.Graph) -> None:
    if any(value.name == "logits" for value in graph.outputs):
        return
    choice = next(node for node in graph if node.op_type == "ArgMax")
    logits = choice.inputs[0]
    assert logits is not None
    logits.name = "logits"
    graph.outputs.append(logits)


def _widen(value: ir.Value, shared: WideWeights) -> None:
    """Make an input or a weight float32; the numbers of a weight stay those of its type."""
    tensor = value.const_value
    if value.dtype not in _HALVES:
        return
    value.type = _FLOAT
    if tensor is None:
        return

    def rows(start: int, stop: int) -> Array:
        return rows_of(tensor, start, stop).astype(np.float32)

    if not isinstance(tensor, MappedTensor):
        value.const_value = ir.Tensor(tensor.numpy().astype(np.float32), name=value.name)
        return
    place = (str(tensor.file.path), tensor.offset or 0, tensor.length or 0)
    if place not in shared:
        shared[place] = StreamedTensor(rows, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=value.name)
    value.const_value = shared[place]


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put a value of half precision through its type; what computes nothing only becomes float32."""
    half = value.dtype
    assert half is not None
    value.type = _FLOAT
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    elif node.op_type in _EXACT:
        return
    narrow = ir.node("Cast", [value], {"to": int(half)}, name=f"{value.name}.narrow")
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.rounded")
    narrow.outputs[0].name, wide.outputs[0].name = narrow.name, wide.name
    wide.outputs[0].type, wide.outputs[0].shape = _FLOAT, value.shape
    ir.convenience.replace_all_uses_with(value, wide.outputs[0], replace_graph_outputs=True)
    graph.insert_after(node, [narrow, wide])
    narrow.replace_input_with(0, value)
    if wide.outputs[0].is_graph_output():
        value.name, wide.outputs[0].name = f"{value.name}.exact", value.name
