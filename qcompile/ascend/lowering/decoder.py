"""Lower one fused decoder to one static graph: walk its nodes in order, append what the chip has for each.

The graph takes `input_ids` int64 [B, S], `past_lengths` int32 [B], a prefill graph also `last_token_index` int32 [1], and
past_key_values.{i}.key|value [B, K, T, d]. It returns `next_token` int64 [B, 1] (greedy), if asked for `top_logits` and
`top_ids` [B, 1, k] for sampling, and present.{i}.key|value [B, K, S, d]: the new rows of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from qcompile.ascend.buckets import PREFILL, Bucket
from qcompile.ascend.chips import Chip
from qcompile.ascend.lowering.attention import Heads, StepInputs, attend, rotate, step_inputs
from qcompile.ascend.lowering.flash_attention import flash_attend, flash_mask
from qcompile.ascend.lowering.folding import Foldings
from qcompile.ascend.lowering.head_norms import angles_by_layer
from qcompile.ascend.lowering.linear import Projections
from qcompile.ascend.lowering.norms import FIXED_EPSILON, rms_norm, why_spelled_out
from qcompile.ascend.lowering.static_graph import Dims, StaticGraph, dims
from qcompile.ascend.lowering.typed_weights import TypedWeights
from qcompile.errors import UnsupportedOpError
from qcompile.functions import DOMAIN
from qcompile.passes.rope_table import RopeTable

_SAME_SHAPE = {"Add", "Mul", "Sub", "Div"}


@dataclass(frozen=True)
class LoweringOptions:
    """What to lower to.

    Attributes:
        chip: The chip.
        dtype: Float type of weights, activations and cache.
        top_k: How many logits and ids to return for sampling; 0 for greedy only.
        centred_layers: Attention layers whose keys are centred before the scores.
        keep_logits: Return `logits` [B, 1, V] too, for comparison.
        flash: Use NPUPromptFlashAttention.
        any_epsilon: The plugin rms-norm is installed: RmsNorm has a kernel for every epsilon.
        wide_sums: Residual sums, by their name in the fused model, that are float32 with their norms.
    """

    chip: Chip
    dtype: ir.DataType = ir.DataType.FLOAT16
    top_k: int = 64
    centred_layers: frozenset[int] = frozenset()
    keep_logits: bool = False
    flash: bool = False
    wide_sums: frozenset[str] = frozenset()
    any_epsilon: bool = False


@dataclass
class DecoderLowering:
    """The state of one walk.

    Attributes:
        bucket: Shapes of the graph.
        options: Chip, type and outputs.
        weights: The weights of all graphs of the model.
        foldings: What of the model is folded into which weights.
        table: cos and sin by position [R, d / 2], R at least T + S.
        reasons: Why something was spelled out instead of lowered to a kernel, with how often.
    """

    bucket: Bucket
    options: LoweringOptions
    weights: TypedWeights
    foldings: Foldings
    table: RopeTable
    graph: StaticGraph = field(init=False)
    _projections: Projections = field(init=False)
    reasons: dict[str, int] = field(default_factory=dict)
    _values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _step: StepInputs | None = None
    _angles: dict[ir.Node, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def lower(self, model: ir.Model) -> ir.Model:
        """Return the static graph of a fused model.

        Raises:
            UnsupportedOpError: A node is of no kind that is lowered.
        """
        self.graph = StaticGraph(self.bucket.name)
        b, s = self.bucket.batch, self.bucket.query_len
        family = self.options.chip.family
        self._projections = Projections(self.graph, self.weights, self.foldings, family, self._note)
        by_name = {value.name: value for value in model.graph.inputs}
        ids = self.graph.input("input_ids", ir.DataType.INT64, (b, s))
        self._values[by_name["input_ids"]] = ids
        self._step = self._step_inputs()
        self._angles = self._angles_with_gammas(self._step)
        if self.bucket.role == PREFILL:
            self.graph.input("last_token_index", ir.DataType.INT32, (1,))
        presents: list[tuple[ir.Value, str]] = []
        for node in model.graph:
            if node in self.foldings.unneeded:
                continue
            presents += self._lower(node)
        logits = next(value for value in model.graph.outputs if value.name == "logits")
        self._choose(self._value(logits))
        for value, name in presents:
            self.graph.output(value, name)
        return self.graph.model()

    def _step_inputs(self) -> StepInputs:
        rows = self.bucket.kv_len + self.bucket.query_len
        dtype = self.options.dtype.numpy()
        cos, sin = (np.tile(half[:rows], (1, 2)).astype(dtype) for half in (self.table.cos, self.table.sin))
        return step_inputs(self.graph, self.bucket, cos, sin, flash_mask if self.options.flash else None)

    def _angles_with_gammas(self, step: StepInputs) -> dict[ir.Node, tuple[ir.Value, ir.Value]]:
        """Return the angles of attentions whose head norms are rotated with them; see `head_norms`."""
        found = self.foldings.head_norms
        family = self.options.chip.family
        if self.bucket.query_len > 1 or family != "910B" or not found:
            return {}
        if any(why_spelled_out(norms.epsilon, family) for norms in found.values()):
            return {}
        gammas = [(self._gamma(norms.q), self._gamma(norms.k)) for norms in found.values()]
        heads = {heads_of(attention) for attention in found}
        if len(heads) != 1:
            return {}
        return dict(zip(found, angles_by_layer(self.graph, step, gammas, heads.pop()), strict=True))

    def _gamma(self, norm: ir.Node) -> np.ndarray:
        gamma = norm.inputs[1]
        assert gamma is not None
        assert gamma.const_value is not None
        return np.asarray(self.weights.typed(gamma.name or "gamma", gamma.const_value, self.foldings.of(norm)).numpy())

    def _value(self, source: ir.Value | None) -> ir.Value:
        """Return what a value of the fused graph became; a constant becomes one of the graph's type."""
        assert source is not None
        if source not in self._values:
            if source.const_value is None:
                raise UnsupportedOpError(f"'{source.name}' is needed by the logits and has no static form")
            self._values[source] = self._constant(source)
        return self._values[source]

    def _constant(self, source: ir.Value) -> ir.Value:
        tensor, name = source.const_value, source.name or ""
        assert tensor is not None
        if not tensor.dtype.is_floating_point():
            return self.graph.weight(name, tensor)
        return self.graph.weight(name, self.weights.typed(name, tensor))

    def _lower(self, node: ir.Node) -> list[tuple[ir.Value, str]]:
        if node.op_type == "Attention" and node.domain == DOMAIN:
            return self._attention(node)
        handler = _HANDLERS.get(node.op_type)
        if node in self.foldings.added:
            self._set(node, self._value(self.foldings.added[node].outputs[0]))
        elif handler is not None:
            handler(self, node)
        elif not self._projections.lower(node, self._values):
            raise UnsupportedOpError(
                f"node '{node.name}' ({node.domain or 'ai.onnx'}::{node.op_type}) has no lowering for "
                f"{self.options.chip.name}; fuse first (--passes fuse), `qcompile inspect` lists what is left"
            )
        return []

    # one method per operator; each sets the node's outputs

    def _embedding(self, node: ir.Node) -> None:
        table, ids = self._value(node.inputs[0]), self._value(node.inputs[1])
        shape = (*dims(ids), *dims(table)[1:])
        self._set(node, self.graph.op("Gather", [table, ids], shape, name=self._name(node), axis=0))

    def _rms_norm(self, node: ir.Node) -> None:
        self._set(node, self._norm(node, self._value(node.inputs[0]), node.inputs[1]))

    def _add_rms_norm(self, node: ir.Node) -> None:
        name = self._name(node)
        dtype = ir.DataType.FLOAT if node.outputs[1].name in self.options.wide_sums else self.options.dtype
        x, residual = (
            self.graph.cast(self._value(value), dtype, f"{name}.{what}")
            for value, what in zip(node.inputs[:2], ("typed", "typed_residual"), strict=True)
        )
        total = self.graph.op("Add", [x, residual], dims(x), name=f"{name}.residual")
        self._set(node, self._norm(node, total, node.inputs[2]), total)

    def _norm(self, node: ir.Node, x: ir.Value, gamma: ir.Value | None) -> ir.Value:
        assert gamma is not None
        assert gamma.const_value is not None
        name = gamma.name or "gamma"
        typed = self.weights.typed(name, gamma.const_value, self.foldings.of(node))
        if x.dtype == ir.DataType.FLOAT:
            wide = ir.tensor(typed.numpy().astype(np.float32))
            name, typed = f"{name}.float", self.weights.get(f"{name}.float", lambda: wide)
        epsilon = node.attributes["epsilon"].as_float()
        family = self.options.chip.family
        reason = why_spelled_out(epsilon, family, any_epsilon=self.options.any_epsilon)
        if reason:
            self._note(f"RmsNorm: {reason}")
        weight, any_epsilon = self.graph.weight(name, typed), self.options.any_epsilon
        y = rms_norm(self.graph, x, weight, epsilon, family, self._name(node), any_epsilon=any_epsilon)
        return self.graph.cast(y, self.options.dtype, f"{self._name(node)}.typed_norm")

    def _swiglu(self, node: ir.Node) -> None:
        gate, up = (self._value(v) for v in node.inputs)
        shape, name = dims(gate), self._name(node)
        sigmoid = self.graph.op("Sigmoid", [gate], shape, name=f"{name}.sigmoid")
        silu = self.graph.op("Mul", [gate, sigmoid], shape, name=f"{name}.silu")
        self._set(node, self.graph.op("Mul", [silu, up], shape, name=name))

    def _split(self, node: ir.Node) -> None:
        x, sizes = self._value(node.inputs[0]), node.inputs[1]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if sizes is None or sizes.const_value is None:
            raise UnsupportedOpError(f"node '{node.name}' (Split) has sizes that are no constant")
        widths = [int(n) for n in sizes.const_value.numpy()]
        self._set(node, *self.graph.split(x, widths, axis % len(dims(x)), node.name or "split"))

    def _reshape(self, node: ir.Node) -> None:
        x, target = self._value(node.inputs[0]), node.inputs[1]
        if target is None or target.const_value is None:
            raise UnsupportedOpError(f"node '{node.name}' (Reshape) has a shape that is no constant")
        shape = _resolved(dims(x), [int(n) for n in target.const_value.numpy()])
        self._set(node, self.graph.reshape(x, shape, self._name(node)))

    def _cast(self, node: ir.Node) -> None:
        self._set(node, self._value(node.inputs[0]))  # float types are the chip's choice here

    def _elementwise(self, node: ir.Node) -> None:
        left, right = (self._value(v) for v in node.inputs)
        shape = tuple(np.broadcast_shapes(dims(left), dims(right)))
        self._set(node, self.graph.op(node.op_type, [left, right], shape, name=self._name(node)))

    def _attention(self, node: ir.Node) -> list[tuple[ir.Value, str]]:
        assert self._step is not None
        name = self._name(node)
        past = [value.name or "" for value in node.inputs[3:5] if value is not None]
        layer = int(past[0].split(".")[1])
        heads = heads_of(node)
        rows = self._rotated(node, heads, name)
        b, t = self.bucket.batch, self.bucket.kv_len
        cache = [self.graph.input(n, self.options.dtype, (b, heads.kv, t, heads.dim)) for n in past]
        past_kv = (cache[0], cache[1])
        if self.options.flash:
            y, key, value = flash_attend(self.graph, rows, past_kv, self._step, heads, name=name)
        else:
            centred = layer in self.options.centred_layers
            y, key, value = attend(self.graph, rows, past_kv, self._step, heads, centred=centred, name=name)
        self._values[node.outputs[0]] = y
        return [(new, out.name or "") for new, out in zip((key, value), node.outputs[1:], strict=True)]

    def _rotated(self, node: ir.Node, heads: Heads, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return rotated q and k and v as rows [B, S, N, d]; one rotation for both where q and k lie side by side."""
        assert self._step is not None
        b, s, family = self.bucket.batch, self.bucket.query_len, self.options.chip.family
        packed = self.foldings.packed.get(node)
        norms = self.foldings.head_norms[node] if node in self._angles else None
        if packed is not None or norms is not None:
            qk, v = self._side_by_side(self._value(packed if norms is None else norms.packed), heads, name)
            step = self._step
            if norms is not None:
                ones = self.graph.constant("head_norm.ones", np.ones(heads.dim, self.options.dtype.numpy()))
                qk = rms_norm(self.graph, qk, ones, FIXED_EPSILON, family, f"{name}.qk_norm")
                step = replace(step, cos=self._angles[node][0], sin=self._angles[node][1])
            turned = rotate(self.graph, qk, step, family, f"{name}.rotary")
            q, k = self.graph.split(turned, (heads.num, heads.kv), 2, f"{name}.q_k")
            return q, k, v
        q, k, v = (
            self.graph.reshape(self._value(value), (b, s, count, heads.dim), f"{name}.{letter}_rows")
            for value, count, letter in zip(node.inputs[:3], (heads.num, heads.kv, heads.kv), "qkv", strict=True)
        )
        scale = self.foldings.left_over.get(node)
        if scale is not None:
            factor = self.graph.constant(f"{name}.scale", np.array([scale], dtype=self.options.dtype.numpy()))
            q = self.graph.op("Mul", [q, factor], dims(q), name=f"{name}.scaled")
        return (
            rotate(self.graph, q, self._step, family, f"{name}.q_rotary"),
            rotate(self.graph, k, self._step, family, f"{name}.k_rotary"),
            v,
        )

    def _side_by_side(self, packed: ir.Value, heads: Heads, name: str) -> tuple[ir.Value, ir.Value]:
        """Split q | k | v into rows of q and k heads [B, S, H + K, d] and of v heads [B, S, K, d]."""
        both, (b, s, _) = heads.num + heads.kv, dims(packed)
        qk, v = self.graph.split(packed, (both * heads.dim, heads.kv * heads.dim), 2, f"{name}.qk_v")
        return (
            self.graph.reshape(qk, (b, s, both, heads.dim), f"{name}.qk_rows"),
            self.graph.reshape(v, (b, s, heads.kv, heads.dim), f"{name}.v_rows"),
        )

    def _choose(self, logits: ir.Value) -> None:
        b, _, vocab = dims(logits)
        if self.options.keep_logits:
            self.graph.output(logits, "logits")
        token = self.graph.op(
            "ArgMax", [logits], (b, 1), name="choose.greedy", dtype=ir.DataType.INT64, axis=2, keepdims=0
        )
        self.graph.output(token, "next_token")
        if self.options.top_k:
            k = min(self.options.top_k, vocab)
            top = self.graph.ops(
                "TopK",
                [logits, self.graph.ints(k)],
                [(b, 1, k), (b, 1, k)],
                name="choose.top",
                dtypes=[None, ir.DataType.INT64],
                axis=2,
            )
            self.graph.output(top[0], "top_logits")
            self.graph.output(top[1], "top_ids")

    def _note(self, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def _name(self, node: ir.Node) -> str:
        """Name what becomes of a node after its first output: layers.3.input_norm."""
        return node.outputs[0].name or node.name or node.op_type

    def _set(self, node: ir.Node, *values: ir.Value) -> None:
        for output, value in zip(node.outputs, values, strict=True):
            self._values[output] = value


def heads_of(attention: ir.Node) -> Heads:
    """Return the heads of a fused attention."""
    past = attention.inputs[3]
    assert past is not None
    assert past.shape is not None
    num, kv = (attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    return Heads(num, kv, int(past.shape[3]))  # type: ignore[arg-type]


def _resolved(shape: Dims, target: list[int]) -> Dims:
    """Return the shape that a Reshape target means: 0 keeps a dimension, -1 takes what is left."""
    sizes = [shape[i] if n == 0 else n for i, n in enumerate(target)]
    if -1 in sizes:
        known = int(np.prod([n for n in sizes if n != -1]))
        sizes[sizes.index(-1)] = int(np.prod(shape)) // known
    return tuple(sizes)


_HANDLERS: dict[str, Callable[[DecoderLowering, ir.Node], None]] = {
    "Gather": DecoderLowering._embedding,
    "RmsNorm": DecoderLowering._rms_norm,
    "AddRmsNorm": DecoderLowering._add_rms_norm,
    "SwiGlu": DecoderLowering._swiglu,
    "Split": DecoderLowering._split,
    "Reshape": DecoderLowering._reshape,
    "Cast": DecoderLowering._cast,
    **dict.fromkeys(_SAME_SHAPE, DecoderLowering._elementwise),
}
