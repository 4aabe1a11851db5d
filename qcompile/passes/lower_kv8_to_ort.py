"""Let GroupQueryAttention keep its cache in int8, with the scales that `kv8` found.

    past_key_values.{i}.key, present.{i}.key   float [B, K, T, d]   ->   int8, k_scale float [K, 1, d]; values likewise

The kernel rounds what it appends and multiplies codes by their scales while it reads. On the CPU both must be per channel
(or both per tensor): a scale per token is not offered.
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, node_label
from qcompile.passes.kernel_rewrite import MICROSOFT
from qcompile.passes.quantize_kv8 import KV8, CacheScales

_PAST, _PRESENT = slice(3, 5), slice(1, 3)
_K_SCALE = 12
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")


class LowerKv8ToOrt(Pass):
    """The int8 cache."""

    name = "lower-kv8-to-ort"
    summary = "KV cache of GroupQueryAttention -> int8"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Change every cache that has scales; without `kv8` there are none."""
        scales: dict[int, CacheScales] = context.model.meta.get(KV8, {})
        for node in list(context.model.graph):
            if not scales or (node.domain, node.op_type) != (MICROSOFT, "GroupQueryAttention"):
                continue
            if node.inputs[3] is not None and node.inputs[3].dtype == ir.DataType.INT8:
                continue
            result.matches += 1
            layer = _LAYER.fullmatch(node.inputs[3].name or "") if node.inputs[3] is not None else None
            if layer is None or int(layer[1]) not in scales:
                reason = "its cache is no graph input past_key_values.{i}.key"
                result.rejected.append(Rejection(node_label(node), self.name, reason))
                continue
            _narrow(context.model.graph, node, int(layer[1]), scales[int(layer[1])])
            result.rewrites += 1
        if result.rewrites:
            context.forget_analysis()
            finish_rewrites(context)


def _narrow(graph: ir.Graph, node: ir.Node, layer: int, scales: CacheScales) -> None:
    for value in (*node.inputs[_PAST], *node.outputs[_PRESENT]):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.INT8)
    inputs = [*node.inputs, *([None] * (_K_SCALE - len(node.inputs)))]
    for kind, array in (("key", scales.key), ("value", scales.value)):
        name = f"kv8.{layer}.{kind}_scale"
        tensor = ir.tensor(np.ascontiguousarray(array[:, None]), name=name)
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
        inputs.append(value)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    for key in ("k_quant_type", "v_quant_type"):
        node.attributes[key] = ir.AttrString(key, "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
