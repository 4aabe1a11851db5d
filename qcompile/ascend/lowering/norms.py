"""RmsNorm on the chip: NPURmsNorm where its fixed epsilon is the model's, else spelled out, with the reason.

y = x * rsqrt(mean(x^2, -1) + epsilon) * gamma        (Zhang & Sennrich 2019, eq. 4), the mean and the root in float32.
CANN's parser ignores the node's epsilon and uses 1e-6; the kernel is missing on the 310B.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.static_graph import StaticGraph, dims

FIXED_EPSILON = 1e-6


def why_spelled_out(epsilon: float, family: str, *, any_epsilon: bool = False) -> str:
    """Return why no kernel can be used, or an empty string; a plugin takes any epsilon."""
    if family == "310B":
        return "the 310B has no RmsNorm kernel"
    if not any_epsilon and not math.isclose(epsilon, FIXED_EPSILON, rel_tol=1e-5):
        return f"its epsilon is {epsilon:.3g}, NPURmsNorm always uses {FIXED_EPSILON:g}"
    return ""


def rms_norm(
    graph: StaticGraph,
    x: ir.Value,
    gamma: ir.Value,
    epsilon: float,
    family: str,
    name: str,
    *,
    any_epsilon: bool = False,
) -> ir.Value:
    """Append the norm of `x` [.., D] with `gamma` [D]; `any_epsilon` where the plugin rms-norm is installed."""
    if why_spelled_out(epsilon, family, any_epsilon=any_epsilon):
        return _spelled_out(graph, x, gamma, epsilon, name)
    if why_spelled_out(epsilon, family):
        return graph.op("NPURmsNormEpsilon", [x, gamma], dims(x), name=name, epsilon=epsilon)
    return graph.op("NPURmsNorm", [x, gamma], dims(x), name=name, epsilon=FIXED_EPSILON)


def _spelled_out(graph: StaticGraph, x: ir.Value, gamma: ir.Value, epsilon: float, name: str) -> ir.Value:
    shape, dtype = dims(x), x.dtype
    assert dtype is not None
    one_each = (*shape[:-1], 1)
    x32 = graph.cast(x, ir.DataType.FLOAT, f"{name}.float")
    square = graph.op("Mul", [x32, x32], shape, name=f"{name}.square")
    mean = graph.op("ReduceMean", [square], one_each, name=f"{name}.mean", axes=[-1], keepdims=1)
    eps = graph.constant(f"const.epsilon_{epsilon:.9g}", np.array([epsilon], dtype=np.float32))
    variance = graph.op("Add", [mean, eps], one_each, name=f"{name}.variance")
    root = graph.op("Sqrt", [variance], one_each, name=f"{name}.root")
    normal = graph.op("Div", [x32, root], shape, name=f"{name}.normal")
    return graph.op("Mul", [graph.cast(normal, dtype, f"{name}.typed"), gamma], shape, name=name)
