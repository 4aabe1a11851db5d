"""Faults of standard nodes, norms, rotary embedding and attention."""

from __future__ import annotations

import numpy as np

from tests.ascend.faults import (
    Fault,
    attribute,
    changed,
    dead_output,
    infinite_mask,
    int64s,
    lengths_given,
    mask_dims,
    node_of,
    overflowing,
    replaced,
    rotary,
    sliced,
    split,
    unary,
)
from tests.ascend.graphs import attention_layer, constants, flash_attention, norm_model, ones, parsed

NODE_FAULTS = [
    # forms of standard operators
    Fault("Slice with positive axes and steps", sliced, "slice-form", "E20001", "310p3"),
    Fault("the same on 910B4", sliced, "slice-form", "E20001"),
    Fault("Split with num_outputs", split(", num_outputs = 2", "x", 18), "split-num-outputs", "E11010"),
    Fault("Split with an attribute of opset 11", split(", split = [32, 32]", "x", 16), "split-attribute", "E11010"),
    Fault("Split with wrong sizes", split("", "x, wrong", 16), "split-sizes", "E14001"),
    Fault(
        "ReduceMean of opset 18 at 16",
        lambda: constants(parsed("y = ReduceMean (x, axes)", outputs="float16[1,8,1] y"), axes=int64s(-1)),
        "input-count",
        "E11010",
    ),
    Fault("missing attribute", unary("Cast"), "attribute-missing", "E11010"),
    Fault(
        "Trilu with k on CANN 8.0",
        lambda: constants(parsed("y = Trilu (x, k)"), k=np.array(1)),
        "trilu",
        "E11010",
        cann="8.0",
    ),
    Fault("Trilu", unary("Trilu"), "trilu", "W11001"),
    Fault(
        "Cast to int8 on 310B",
        lambda: parsed("y = Cast <to = 3> (x)", outputs="int8[1,8,64] y"),
        "cast-to-int8",
        "EZ3002",
        "310b4",
    ),
    Fault("NonZero", lambda: parsed("y = NonZero (x)", outputs="int64[3,n] y"), "data-dependent-shape", "E10055"),
    Fault("infinite mask", infinite_mask, "infinite-constant", ""),
    Fault("float minimum cast to fp16", overflowing, "cast-overflow", ""),
    Fault("unnamed output with input holes", dead_output, "unnamed-output", ""),
    # norms and rotary embedding
    Fault("epsilon 1e-5", changed(norm_model, attribute("NPURmsNorm", epsilon=1e-5)), "rms-norm-epsilon", ""),
    Fault("norm on 310B", norm_model, "op-not-on-chip", "EZ3002", "310b4"),
    Fault(
        "norm with gamma of another length",
        changed(norm_model, replaced("gamma", ones(32))),
        "rms-norm-gamma",
        "E14001",
    ),
    Fault(
        "norm in f32 with fp16 gamma",
        lambda: constants(parsed("y = NPURmsNorm (x, g)", "float[1,8,64] x", "float[1,8,64] y"), g=ones(64)),
        "operand-dtype",
        "EZ3002",
    ),
    Fault("norm without gamma", changed(norm_model, lambda m: m.graph.node[0].input.pop()), "operand-count", "E11010"),
    Fault(
        "AddRmsNorm with two outputs",
        changed(
            attention_layer,
            lambda m: (
                node_of(m, "NPUAddRmsNorm").output.pop(),
                setattr(m.graph.node[-1], "op_type", "Identity"),
                m.graph.node[-1].input.pop(),
            ),
        ),
        "output-count",
        "E11010",
    ),
    Fault(
        "AddRmsNorm of mixed types",
        changed(attention_layer, replaced("gamma", ones(64, dtype=np.float32))),
        "operand-dtype",
        "EZ3002",
    ),
    Fault("odd head size", rotary("1,8,4,15", "1,8,1,15"), "rotary-shape", "EZ9999"),
    Fault("large head size", rotary("1,8,4,1024", "1,8,1,1024"), "rotary-shape", "EZ9999"),
    Fault("decode in BNSD with many heads", rotary("1,28,1,128", "1,1,1,128"), "rotary-shape", "EZ9999"),
    Fault("table that does not broadcast", rotary("1,8,4,16", "1,7,1,16"), "rotary-shape", "EZ9999"),
    Fault("rotary without mode", rotary("1,8,4,16", "1,8,1,16", "NPURotaryPositionEmbedding"), "attribute", "E11010"),
    Fault(
        "rotary with mode 7",
        rotary("1,8,4,16", "1,8,1,16", "NPURotaryPositionEmbedding", "<mode = 7>"),
        "attribute",
        "E11010",
    ),
    Fault(
        "NPURotaryPositionEmbedding on 310P",
        rotary("1,8,4,16", "1,8,1,16", "NPURotaryPositionEmbedding", "<mode = 0>"),
        "op-not-on-chip",
        "EZ3002",
        "310p3",
    ),
    # attention
    Fault("four inputs", lambda: flash_attention("q, k, v, pse"), "attention-inputs", "E11010"),
    Fault("empty pse_shift", lambda: flash_attention("q, k, v, , mask"), "attention-inputs", "E11010"),
    Fault("num_heads left out", lambda: flash_attention(attributes="num_heads="), "attribute", "E11010"),
    Fault("unknown layout", lambda: flash_attention(attributes='input_layout="SBH"'), "attribute", "E11010"),
    Fault(
        "heads that do not divide",
        lambda: flash_attention(attributes="num_key_value_heads=3"),
        "attention-heads",
        "EZ9999",
    ),
    Fault("window of 0", lambda: flash_attention(attributes="next_tokens="), "attention-window", ""),
    Fault(
        "fp16 mask",
        changed(flash_attention, lambda m: setattr(m.graph.input[3].type.tensor_type, "elem_type", 10)),
        "attention-mask",
        "EZ3002",
    ),
    Fault("GQA on 310P", flash_attention, "attention-310p", "EZ9999", "310p3"),
    Fault(
        "decode attention operator",
        lambda: parsed('y = NPUIncreFlashAttention <num_heads = 4, input_layout = "BSH"> (x, x, x)'),
        "op-unusable",
        "",
    ),
    Fault(
        "interleaved rotation by NPURotaryMul",
        rotary("1,8,4,16", "1,8,1,16", attributes="<mode = 1>"),
        "attribute-ignored",
        "",
    ),
    Fault(
        "a mask per head", changed(flash_attention, lambda m: mask_dims(m, 1, 4, 128, 128)), "attention-mask", "EZ9999"
    ),
    Fault(
        "compressed mask of another size",
        lambda: flash_attention(attributes="sparse_mode=2"),
        "attention-mask",
        "EZ9999",
    ),
    Fault(
        "keys of other heads", lambda: flash_attention(attributes="num_key_value_heads=4"), "attention-heads", "EZ9999"
    ),
    Fault(
        "pse_shift per batch only",
        changed(flash_attention, replaced("pse", np.zeros((1, 1, 128, 128), np.float16))),
        "attention-pse",
        "EZ9999",
    ),
    Fault("lengths as inputs", lengths_given, "attention-lengths", "EZ9999"),
    Fault(
        "three inputs for NPURmsNorm",
        changed(norm_model, lambda m: m.graph.node[0].input.append("gamma")),
        "operand-count",
        "E11010",
    ),
]
