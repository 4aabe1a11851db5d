"""Faults of quantized nodes."""

from __future__ import annotations

import numpy as np

from tests.ascend.faults import Fault, attribute, changed, node_of, replaced
from tests.ascend.graphs import (
    ascend_quant,
    constants,
    dynamic_w8a8,
    ones,
    packed_int4,
    packed_scale,
    parsed,
    plain_scale,
    static_w8a8,
    weight_only,
)

QUANT_FAULTS = [
    Fault(
        "16-bit activations",
        changed(ascend_quant, attribute("AscendQuant", dst_type="INT16")),
        "quant-dst-type",
        "EZ3002",
    ),
    Fault(
        "4-bit activations on 310P",
        changed(ascend_quant, attribute("AscendQuant", dst_type="INT4")),
        "quant-dst-type",
        "EZ3002",
        "310p3",
    ),
    # quantized operators
    Fault(
        "lm_head too wide",
        changed(dynamic_w8a8, replaced("w", np.zeros((64, 70000), np.int8))),
        "quant-dimension",
        "EZ9999",
    ),
    Fault(
        "three-dimensional activations",
        lambda: constants(
            parsed(
                "q, s = NPUDynamicQuant (x) y = QuantBatchMatMul (q, w, ws, , , s)",
                outputs="float16[1,8,32] y",
                values="int8[1,8,64] q, float[1,8] s",
            ),
            w=ones(64, 32, dtype=np.int8),
            ws=ones(32, dtype=np.float32),
        ),
        "quant-rank",
        "EZ9999",
    ),
    Fault(
        "f32 scale without per-token scale",
        changed(dynamic_w8a8, lambda m: [node_of(m, "QuantBatchMatMul").input.pop() for _ in range(3)]),
        "quant-types",
        "EZ3002",
    ),
    Fault("fp16 scale", changed(dynamic_w8a8, replaced("ws", ones(32))), "operand-dtype", "EZ3002"),
    Fault(
        "float bias with a packed scale",
        changed(static_w8a8, replaced("bias", ones(32, dtype=np.float32))),
        "quant-types",
        "EZ3002",
    ),
    Fault(
        "bf16 output with a packed scale",
        changed(static_w8a8, attribute("QuantBatchMatMul", dtype=27)),
        "quant-types",
        "EZ3002",
    ),
    Fault("unknown output type", changed(static_w8a8, attribute("QuantBatchMatMul", dtype=5)), "attribute", "E11010"),
    Fault(
        "AMCT packing in QuantBatchMatMul",
        changed(static_w8a8, replaced("scale", plain_scale(np.full(32, 0.01)))),
        "scale-packing",
        "",
    ),
    Fault("K that differs", changed(dynamic_w8a8, replaced("w", ones(32, 32, dtype=np.int8))), "quant-shape", "E14001"),
    Fault("QuantBatchMatMul on 310P", static_w8a8, "quant-310p", "EZ3002", "310p3"),
    Fault("dynamic quantization on 310P", dynamic_w8a8, "op-not-on-chip", "EZ3002", "310p3"),
    Fault(
        "dynamic quantization of f32",
        lambda: parsed("y, s = NPUDynamicQuant (x)", "float[8,64] x", "int8[8,64] y, float[8] s"),
        "operand-dtype",
        "EZ3002",
    ),
    Fault(
        "one scale per tensor",
        lambda: parsed("y, s = NPUDynamicQuant (x)", "float16[8,64] x", "int8[8,64] y, float[64] s"),
        "dynamic-quant-scale",
        "E14001",
    ),
    Fault(
        "AscendDequant to f32", changed(ascend_quant, attribute("AscendDequant", dtype=0)), "dequant-dtype", "EZ3002"
    ),
    Fault(
        "AscendDequant without dtype",
        changed(ascend_quant, attribute("AscendDequant", dtype=None)),
        "dequant-dtype",
        "EZ3002",
    ),
    Fault(
        "QuantBatchMatMul's packing in AscendDequant",
        changed(ascend_quant, replaced("deq", packed_scale(np.full(32, 0.01)))),
        "scale-packing",
        "",
    ),
    Fault(
        "float deq_scale", changed(ascend_quant, replaced("deq", ones(32, dtype=np.float32))), "operand-dtype", "EZ3002"
    ),
    Fault(
        "offset before a fused MatMul", changed(ascend_quant, attribute("AscendQuant", offset=3.0)), "quant-offset", ""
    ),
    Fault(
        "AscendQuant to INT7", changed(ascend_quant, attribute("AscendQuant", dst_type="INT7")), "attribute", "E11010"
    ),
    Fault(
        "int32 bias before AscendDequant",
        lambda: constants(
            parsed(
                "q = AscendQuant <scale = 2.0> (x) s = MatMul (q, w) t = Add (s, b) y = AscendDequant <dtype = 1> (t, d)",
                "float16[8,64] x",
                "float16[8,32] y",
                "int8[8,64] q, int32[8,32] s, int32[8,32] t",
            ),
            w=ones(64, 32, dtype=np.int8),
            b=ones(32, dtype=np.int32),
            d=plain_scale(ones(32)),
        ),
        "dequant-bias",
        "",
    ),
    Fault(
        "int8 weight that is no constant",
        lambda: constants(
            parsed(
                "q = AscendQuant <scale = 2.0> (x) s = MatMul (q, w) y = AscendDequant <dtype = 1> (s, d)",
                "float16[8,64] x, int8[64,32] w",
                "float16[8,32] y",
                "int8[8,64] q, int32[8,32] s",
            ),
            d=plain_scale(ones(32)),
        ),
        "int8-weight",
        "EZ3002",
    ),
    Fault(
        "int32 sums read by Cast",
        lambda: constants(
            parsed(
                "q = AscendQuant <scale = 2.0> (x) s = MatMul (q, w) y = Cast <to = 10> (s)",
                "float16[8,64] x",
                "float16[8,32] y",
                "int8[8,64] q, int32[8,32] s",
            ),
            w=ones(64, 32, dtype=np.int8),
        ),
        "int8-without-dequant",
        "EZ3002",
    ),
    Fault("groups of 48", lambda: weight_only(48, 96), "group-size", "EZ9999"),
    Fault("group as large as K", lambda: weight_only(64, 64), "group-size", "EZ9999"),
    Fault(
        "weight-only too wide",
        lambda: constants(
            parsed("y = NPUWeightQuantBatchMatmulV2 (x, w, s)", "float16[8,64] x", "float16[8,70000] y"),
            w=np.zeros((64, 70000), np.int8),
            s=ones(70000),
        ),
        "quant-dimension",
        "EZ9999",
    ),
    Fault("scales of another grouping", changed(weight_only, replaced("scale", ones(3, 48))), "scale-shape", "E14001"),
    Fault("weight-only on 310B", weight_only, "op-not-on-chip", "EZ3002", "310b4"),
    Fault(
        "DynamicQuant to int4",
        lambda: parsed("y, s = NPUDynamicQuant <dst_type = 3> (x)", "float16[8,64] x", "int8[8,64] y, float[8] s"),
        "attribute-ignored",
        "",
    ),
    Fault(
        "transposed weight-only weight",
        changed(weight_only, attribute("NPUWeightQuantBatchMatmulV2", transpose_weight=1)),
        "attribute-ignored",
        "",
    ),
    Fault(
        "bf16 bias for f16 output",
        lambda: constants(
            parsed(
                "q, s = NPUDynamicQuant (x) y = QuantBatchMatMul (q, w, ws, , b, s)",
                "float16[8,64] x, bfloat16[32] b",
                "float16[8,32] y",
                "int8[8,64] q, float[8] s",
            ),
            w=ones(64, 32, dtype=np.int8),
            ws=ones(32, dtype=np.float32),
        ),
        "quant-types",
        "EZ3002",
    ),
    Fault("deq_scale per row", changed(ascend_quant, replaced("deq", plain_scale(ones(8)))), "scale-shape", "E14001"),
    Fault("packed int4 on 310P", packed_int4, "quant-types", "EZ3002", "310p3"),
    Fault(
        "packed int4 with scales of the packed width",
        changed(packed_int4, replaced("scale", ones(2, 6))),
        "scale-shape",
        "E14001",
    ),
]
