"""Compare one lowered attention with what it replaces, on random caches with rows of different lengths.

The function works on exact-length caches, one row at a time; the kernel on one padded buffer for all rows. Both must give
the same outputs and the same cache entries. A kernel whose scale went into its tables must do as before, with keys times
the root of the scale in its cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.errors import GraphError
from qcompile.functions import ATTENTION, DOMAIN
from qcompile.passes.proof import Prover
from qcompile.passes.rope_table import RopeTable

# (query length, past length of each row): a prompt, a chunk after a past, and one decode step for ragged rows.
_STEPS: tuple[tuple[int, tuple[int, ...]], ...] = ((5, (0,)), (3, (9,)), (1, (13, 2, 7)))
_SLACK = 6


@dataclass(frozen=True)
class _Shape:
    num_heads: int
    kv_num_heads: int
    head_dim: int
    scale: float


def prove_lowered_attention(node: ir.Node, table: RopeTable | None, prover: Prover) -> tuple[str, float]:
    """Return (reason it fails, or empty; largest relative error) for an Attention node about to be lowered."""
    s = _shape_of(node)
    key = f"{s}{None if table is None else table.cos.shape}"
    rng = np.random.default_rng([prover.seed, len(key)])
    return _over_steps(prover, lambda length, pasts: _step_error(s, table, prover, rng, length, pasts))


def prove_folded_scale(
    node: ir.Node, table: RopeTable, folded: RopeTable, root: np.float32, prover: Prover
) -> tuple[str, float]:
    """Return the same for a GroupQueryAttention node that is to rotate by `folded`, with scale 1 and keys times `root`."""
    s, rng = _shape_of(node), np.random.default_rng(prover.seed)
    unscaled = _kernel_model(replace(s, scale=1.0), with_rotary=True)

    def error(length: int, pasts: tuple[int, ...]) -> float:
        feeds = _feeds(s, table, rng, length, pasts)
        y, key, value = prover.run(_kernel_model(s, with_rotary=True), feeds)
        size = key.shape[2]
        feeds |= {"past_key": feeds["past_key"] * root, "cos": folded.cos[:size], "sin": folded.sin[:size]}
        seen = prover.run(unscaled, feeds)
        return max(_relative_error(a, b) for a, b in zip((y, key * root, value), seen, strict=True))

    return _over_steps(prover, error)


def _over_steps(prover: Prover, error_of: Callable[[int, tuple[int, ...]], float]) -> tuple[str, float]:
    worst = 0.0
    for length, pasts in _STEPS:
        try:
            error = error_of(length, pasts)
        except GraphError as refused:
            return str(refused), worst
        worst = max(worst, error)
        if error > prover.limit:
            return f"{length} tokens after {list(pasts)}: relative error {error:.2g} > {prover.limit:.2g}", worst
    return "", worst


def _shape_of(node: ir.Node) -> _Shape:
    past = node.inputs[3]
    dim = past.shape[3] if past is not None and past.shape is not None else 0
    head_dim = dim if isinstance(dim, int) else 0
    return _Shape(
        node.attributes["num_heads"].as_int(),
        node.attributes["kv_num_heads"].as_int(),
        head_dim,
        node.attributes["scale"].as_float(),
    )


def _feeds(
    s: _Shape, table: RopeTable | None, rng: np.random.Generator, length: int, pasts: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Draw a step of the kernel: `length` tokens of each row behind its past."""
    batch, size = len(pasts), max(pasts) + length + _SLACK

    def draw(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims).astype(np.float32)

    feeds = {"q": draw(batch, length, s.num_heads * s.head_dim)}
    feeds |= {name: draw(batch, length, s.kv_num_heads * s.head_dim) for name in "kv"}
    feeds |= {f"past_{name}": draw(batch, s.kv_num_heads, size, s.head_dim) for name in ("key", "value")}
    feeds["seqlens_k"] = np.array([p + length - 1 for p in pasts], dtype=np.int32)
    feeds["total"] = np.array(max(pasts) + length, dtype=np.int32)
    if table is not None:
        feeds |= {"cos": table.cos[:size].astype(np.float32), "sin": table.sin[:size].astype(np.float32)}
    return feeds


def _step_error(
    s: _Shape, table: RopeTable | None, prover: Prover, rng: np.random.Generator, length: int, pasts: tuple[int, ...]
) -> float:
    feeds = _feeds(s, table, rng, length, pasts)
    q, k, v, key, value = (feeds[name] for name in ("q", "k", "v", "past_key", "past_value"))
    size, half = key.shape[2], s.head_dim // 2
    ones, zeros = np.ones((size, half), np.float32), np.zeros((size, half), np.float32)
    cos, sin = feeds.get("cos", ones), feeds.get("sin", zeros)
    lowered = prover.run(_kernel_model(s, with_rotary=table is not None), feeds)
    worst = 0.0
    for row, past in enumerate(pasts):
        stop = past + length
        exact = {"q": q[row : row + 1], "k": k[row : row + 1], "v": v[row : row + 1]}
        exact |= {"past_key": key[row : row + 1, :, :past], "past_value": value[row : row + 1, :, :past]}
        exact |= {n: np.tile(t[past:stop], 2)[None, None] for n, t in (("cos", cos), ("sin", sin))}
        exact["attention_mask"] = np.ones((1, stop), dtype=np.int64)
        wanted = prover.run(_function_model(s), exact)
        seen = [lowered[0][row : row + 1], *(c[row : row + 1, :, :stop] for c in lowered[1:])]
        for a, b in zip(wanted, seen, strict=True):
            worst = max(worst, _relative_error(a, b))
    return worst


def _relative_error(wanted: np.ndarray, seen: np.ndarray) -> float:
    return float(np.abs(wanted - seen).max() / max(np.abs(wanted).max(), 1e-30))


def _kernel_model(s: _Shape, *, with_rotary: bool) -> bytes:
    names = ["q", "k", "v", "past_key", "past_value", "seqlens_k", "total"]
    names += ["cos", "sin"] if with_rotary else []
    attributes = {"num_heads": s.num_heads, "kv_num_heads": s.kv_num_heads, "scale": s.scale}
    attributes["do_rotary"] = int(with_rotary)
    ranks = {"q": 3, "k": 3, "v": 3, "past_key": 4, "past_value": 4, "seqlens_k": 1, "total": 0, "cos": 2, "sin": 2}
    return _one_node("com.microsoft", "GroupQueryAttention", names, ranks, attributes)


def _function_model(s: _Shape) -> bytes:
    names = ["q", "k", "v", "past_key", "past_value", "cos", "sin", "attention_mask"]
    attributes = {"num_heads": s.num_heads, "kv_num_heads": s.kv_num_heads, "scale": s.scale}
    ranks = {"q": 3, "k": 3, "v": 3, "past_key": 4, "past_value": 4, "cos": 4, "sin": 4, "attention_mask": 2}
    return _one_node(DOMAIN, "Attention", names, ranks, attributes)


def _one_node(
    domain: str, op_type: str, names: list[str], ranks: dict[str, int], attributes: dict[str, int | float]
) -> bytes:
    dtypes = {"seqlens_k": ir.DataType.INT32, "total": ir.DataType.INT32, "attention_mask": ir.DataType.INT64}
    inputs = [
        ir.Value(
            name=name, type=ir.TensorType(dtypes.get(name, ir.DataType.FLOAT)), shape=ir.Shape([None] * ranks[name])
        )
        for name in names
    ]
    outputs = [ir.Value(name=name) for name in ("y", "present_key", "present_value")]
    node = ir.Node(domain, op_type, inputs, ir.convenience.convert_attributes(attributes), outputs=outputs)
    imports = {"": 18, DOMAIN: 1, "com.microsoft": 1}
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports=imports, name="attention")
    functions = [ATTENTION.function] if domain == DOMAIN else []
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10, functions=functions)).SerializeToString())
