"""Faults of the model as a whole, its operator sets, inputs, types and options."""

from __future__ import annotations

from qcompile.ascend.legality.rule import AtcOptions
from tests.ascend.faults import (
    Fault,
    bfloat_norm,
    bool_mask,
    called_function,
    changed,
    imports,
    input_dim,
    int64_mask,
    looped,
    renamed,
    unary,
    without_value_info,
)
from tests.ascend.graphs import (
    ascend_quant,
    attention_layer,
    constants,
    dynamic_w8a8,
    flash_attention,
    norm_model,
    ones,
    parsed,
)

SHAPES = {"x": (1, None, 64)}
MODEL_FAULTS = [
    # onnx_ops.md section 1, atc.md section 0: operator sets, domains, registration
    Fault(
        "two opset imports", changed(norm_model, imports(("", 16), ("ai.onnx.ml", 2))), "opset-import-several", "E16005"
    ),
    Fault(
        "one domain imported twice",
        changed(norm_model, imports(("", 16), ("", 17))),
        "opset-import-several",
        "E16005",
        cann="9.2",
    ),
    Fault("no opset import", changed(norm_model, imports()), "opset-import-missing", "E19999"),
    Fault("another spelling of the domain", changed(norm_model, imports(("ai.onnx", 16))), "domain-spelling", "E16002"),
    Fault(
        "npu domain beside the default one",
        changed(attention_layer, renamed("NPURmsNorm", "NPURmsNorm", "npu")),
        "domain-not-imported",
        "E19999",
    ),
    Fault(
        "contrib operator",
        changed(norm_model, renamed("NPURmsNorm", "SimplifiedLayerNormalization", "com.microsoft")),
        "op-unregistered",
        "E16002",
    ),
    Fault(
        "contrib operator, old CANN",
        changed(norm_model, renamed("NPURmsNorm", "MatMulNBits", "com.microsoft")),
        "op-unregistered",
        "E19010",
        cann="8.0",
    ),
    Fault(
        "operator of torch_npu that CANN lacks",
        changed(norm_model, renamed("NPURmsNorm", "NPUSwiGlu")),
        "op-unregistered",
        "E16002",
    ),
    Fault("npu-only operator in the default domain", unary("NPUGeluV2"), "domain-unregistered", "E16002"),
    Fault("opset 23", unary("Sigmoid", imports='"" : 23'), "opset-unregistered", "E16002"),
    Fault(
        "RMSNormalization of opset 23",
        changed(norm_model, renamed("NPURmsNorm", "RMSNormalization")),
        "op-unregistered",
        "E16002",
    ),
    Fault(
        "LayerNormalization at opset 16",
        lambda: constants(parsed("y = LayerNormalization (x, g)"), g=ones(64)),
        "opset-unregistered",
        "E16002",
    ),
    Fault("QuantBatchMatMul at opset 17", changed(dynamic_w8a8, imports(("", 17))), "opset-unregistered", "E16002"),
    Fault("flash attention at opset 17", changed(flash_attention, imports(("", 17))), "opset-unregistered", "E16002"),
    Fault("Gelu", unary("Gelu", imports='"" : 20'), "op-unregistered", "E16002"),
    Fault(
        "QuantizeLinear",
        lambda: constants(
            parsed("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", values="uint8[1,8,64] q"), s=ones(1)
        ),
        "op-unregistered",
        "E16002",
    ),
    Fault("loop", looped, "op-unregistered", "E16002"),
    Fault("function not inlined", called_function, "function-call", "E16002"),
    # shapes and inputs
    Fault("symbolic batch", changed(norm_model, input_dim(0, "batch")), "dynamic-dimension", "E10011"),
    Fault(
        "empty cache",
        changed(attention_layer, lambda m: setattr(m.graph.input[4].type.tensor_type.shape.dim[1], "dim_value", 0)),
        "empty-dimension",
        "E10011",
    ),
    Fault(
        "shape of another rank",
        norm_model,
        "input-shape-rank",
        "E10001",
        options=AtcOptions(input_shapes={"x": (1, 8)}),
    ),
    Fault(
        "shape that the graph contradicts",
        changed(norm_model, input_dim(0, "batch")),
        "input-shape-fixed",
        "E10001",
        options=AtcOptions(input_shapes={"x": (4, 8, 65)}),
    ),
    Fault(
        "shape for an unknown input",
        norm_model,
        "input-shape-name",
        "E10016",
        options=AtcOptions(input_shapes={"ids": (1, 2)}),
    ),
    Fault("no outputs", changed(norm_model, lambda m: m.graph.ClearField("output")), "no-input-or-output", "E16001"),
    Fault("no graph", changed(norm_model, lambda m: m.graph.ClearField("node")), "no-graph", "E16004"),
    Fault(
        "one gear",
        changed(norm_model, input_dim(1, "s")),
        "gear-count",
        "E10035",
        options=AtcOptions(input_shapes=SHAPES, dynamic_dims="8"),
    ),
    Fault(
        "gear too long",
        changed(norm_model, input_dim(1, "s")),
        "gear-length",
        "E10045",
        options=AtcOptions(input_shapes=SHAPES, dynamic_dims="8,1;9,1"),
    ),
    Fault(
        "gears on a quantized graph",
        ascend_quant,
        "quantized-gears",
        "E10055",
        options=AtcOptions(input_shapes=SHAPES, dynamic_dims="8;16"),
    ),
    # types
    Fault("bf16 on 310P", bfloat_norm, "bfloat16", "EZ3002", "310p3"),
    Fault("string input", lambda: parsed("y = Identity (x)", "string[1] x", "string[1] y"), "element-type", "E19999"),
    Fault("int64 arithmetic", int64_mask, "int64-arithmetic", "W11001"),
    Fault(
        "double arithmetic",
        lambda: parsed("y = Add (x, x)", "double[8] x", "double[8] y"),
        "double-arithmetic",
        "W11001",
    ),
    Fault("bool arithmetic", bool_mask, "bool-arithmetic", "W11001"),
    Fault(
        "bf16 in an fp16 kernel",
        lambda: parsed(
            "y = InstanceNormalization (x, s, b)",
            "bfloat16[1,8,64] x, bfloat16[8] s, bfloat16[8] b",
            "bfloat16[1,8,64] y",
        ),
        "dtype",
        "EZ3002",
    ),
    Fault(
        "no value_info after AscendDequant",
        changed(
            ascend_quant,
            lambda m: (
                without_value_info(m),
                m.graph.node[2].output.__setitem__(0, "d"),
                m.graph.node.add(op_type="Identity", input=["d"], output=["y"]),
            ),
        ),
        "value-info-missing",
        "EZ3002",
    ),
    Fault("no value_info at all", changed(attention_layer, without_value_info), "value-info-missing", "EZ3002"),
    Fault(
        "wrong value_info",
        changed(dynamic_w8a8, lambda m: setattr(m.graph.value_info[0].type.tensor_type, "elem_type", 1)),
        "value-info-wrong",
        "EZ3002",
    ),
    Fault(
        "fp16 norm stated as float",
        changed(norm_model, lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 1)),
        "value-info-wrong",
        "EZ3002",
    ),
    # options
    Fault(
        "quantized graph with origin types",
        ascend_quant,
        "quantized-precision",
        "E10055",
        options=AtcOptions(precision_mode_v2="origin"),
    ),
    Fault(
        "quantized graph in f32",
        ascend_quant,
        "quantized-precision",
        "E10055",
        options=AtcOptions(precision_mode="force_fp32"),
    ),
    Fault(
        "a precision mode nobody knows",
        norm_model,
        "precision-mode-name",
        "E10001",
        options=AtcOptions(precision_mode="foo"),
    ),
    Fault(
        "a precision mode of the other option",
        norm_model,
        "precision-mode-name",
        "E10001",
        options=AtcOptions(precision_mode_v2="force_fp16"),
    ),
    Fault(
        "two precision modes",
        norm_model,
        "precision-modes",
        "E10047",
        options=AtcOptions(precision_mode="force_fp16", precision_mode_v2="origin"),
    ),
]
