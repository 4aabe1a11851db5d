"""Count the kernels a static graph becomes, after what CANN's documentation says GE fuses by itself.

An estimate from the graph, not a measurement: GE may do more, or less.

* Reshape is no kernel.
* A Transpose of the last two axes goes into the matrix product that reads it.
* A bias Add behind a MatMul goes into it (MatMulBiasAddFusionPass).
* An Add in front of NPURmsNorm becomes AddRmsNorm with it (AddRmsNormFusionGraphPass); NPUDynamicQuant behind it joins
  them (AddRmsNormDynamicQuantFusionPass).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

_FREE = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Constant"}
_NORMS = {"NPURmsNorm", "NPURmsNormEpsilon"}  # both are GE's RmsNorm
_PRODUCTS = {"MatMul", "Gemm", "BatchMatMul"}
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass
class KernelCount:
    """Kernels of one graph by operator, in all and in one decoder layer."""

    total: int = 0
    layers: int = 0
    per_layer: dict[str, int] = field(default_factory=dict)

    @property
    def largest_layer(self) -> int:
        """Kernels in the layer that has most."""
        return sum(self.per_layer.values())

    def record(self) -> dict[str, Any]:
        """Return it JSON-ready."""
        return {"kernels": self.total, "kernels_per_layer": self.largest_layer, "layer": self.per_layer}


def count_kernels(model: ir.Model) -> KernelCount:
    """Count the kernels of a lowered graph; a layer is what is named `layers.<i>.`."""
    kernels = [node for node in model.graph if not _vanishes(node)]
    layers: dict[str, Counter[str]] = {}
    for node in kernels:
        found = _LAYER.search(node.name or "")
        if found is not None:
            layers.setdefault(found[1], Counter())[node.op_type] += 1
    largest = max(layers.values(), key=lambda counted: counted.total(), default=Counter[str]())
    return KernelCount(len(kernels), len(layers), dict(sorted(largest.items())))


def _vanishes(node: ir.Node) -> bool:
    if node.op_type in _FREE:
        return True
    readers = [user for user, _ in node.outputs[0].uses()]
    if node.op_type == "Transpose":
        perm = list(node.attributes["perm"].as_ints())
        swapped = perm[:-2] == list(range(len(perm) - 2)) and perm[-2:] == [len(perm) - 1, len(perm) - 2]
        return swapped and bool(readers) and all(user.op_type in _PRODUCTS for user in readers)
    if node.op_type == "Add":
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        is_bias = node.inputs[1] is not None and node.inputs[1].const_value is not None
        if maker is not None and maker.op_type in _PRODUCTS and is_bias:
            return True
        return any(user.op_type in _NORMS for user in readers)
    if node.op_type == "NPUDynamicQuant":
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        return maker is not None and maker.op_type in _NORMS and _behind_add(maker)
    return False


def _behind_add(norm: ir.Node) -> bool:
    add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    return add is not None and add.op_type == "Add"
