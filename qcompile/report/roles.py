"""What each node of a decoder graph is for: norm, projection, rotary embedding, attention, feed-forward.

Roles come from structure and operators first and need no names, so that graphs of every exporter, before and
after fusion, are told apart by the same rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum

import onnx_ir as ir

from qcompile.quantized_functions import EMBEDDINGS, QUANTIZED_LINEARS
from qcompile.report.links import Links


class Role(Enum):
    """The part a node plays; the value is its CSS class."""

    EMBEDDING = "embedding"
    NORM = "norm"
    QKV = "qkv"
    ROTARY = "rotary"
    CACHE = "cache"
    MASK = "mask"
    ATTENTION = "attention"
    OUTPUT = "output"
    RESIDUAL = "residual"
    MLP = "mlp"
    HEAD = "head"
    OTHER = "other"
    CONTROL = "control"  # arithmetic on shapes and constants: counted, not drawn


_BY_OP = {
    **dict.fromkeys((*EMBEDDINGS, "GatherBlockQuantized"), Role.EMBEDDING),
    **dict.fromkeys(
        (
            "RmsNorm",
            "AddRmsNorm",
            "LayerNorm",
            "AddLayerNorm",
            "RMSNormalization",
            "LayerNormalization",
            "SimplifiedLayerNormalization",
            "SkipSimplifiedLayerNormalization",
            "SkipLayerNormalization",
            "NPURmsNorm",
            "NPURmsNormEpsilon",
            "NPUAddRmsNorm",
        ),
        Role.NORM,
    ),
    **dict.fromkeys(("RotaryEmbedding", "NPURotaryMul", "NPUApplyRotaryPosEmb", "Cos", "Sin"), Role.ROTARY),
    **dict.fromkeys(
        (
            "Attention",
            "GroupQueryAttention",
            "MultiHeadAttention",
            "Softmax",
            "NPUPromptFlashAttention",
            "NPUIncreFlashAttention",
            "NPUFusedInferAttentionScore",
        ),
        Role.ATTENTION,
    ),
    **dict.fromkeys(
        (
            "SwiGlu",
            "Gelu",
            "GeluTanh",
            "FastGelu",
            "QuickGelu",
            "BiasGelu",
            "Sigmoid",
            "Swish",
            "Erf",
            "Tanh",
        ),
        Role.MLP,
    ),
}
_PROJECTIONS = frozenset(
    {
        "MatMul",
        "Gemm",
        "Linear",
        "MatMulNBits",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "QuantBatchMatMul",
        *QUANTIZED_LINEARS,
    }
)
_ADDS_RESIDUAL = frozenset(
    {
        "AddRmsNorm",
        "AddLayerNorm",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "NPUAddRmsNorm",
    }
)
_SHAPE_OPS = frozenset({"Shape", "Size", "Constant"})
_NORM_CHAIN = frozenset({"Add", "Sqrt", "Reciprocal", "Div", "Mul", "Cast", "Sub", "Pow", "ReduceMean"})
_HALVES = frozenset({"Concat", "Neg", "Slice", "Split"})
_LARGE_BYTES = 1024

# What a value hangs on, as bits; 0 is nothing but shapes and constants.
_POSITION, _MASK, _CONTENT = 1, 2, 4


def assign_roles(graph: ir.Graph, links: Links | None = None) -> dict[ir.Node, Role]:
    """Return the role of every node of a topologically sorted graph."""
    return _Roles(graph, links or Links(graph)).assign()


class _Roles:
    """The roles found so far, what every value hangs on, and how many projections lie before it."""

    def __init__(self, graph: ir.Graph, links: Links) -> None:
        self.links = links
        self.nodes = links.nodes
        self.roles: dict[ir.Node, Role] = {}
        self.origin: dict[ir.Value, int] = {value: _input_origin(value) for value in graph.inputs}
        self.depth: dict[ir.Value, int] = {}
        for node in self.nodes:
            bits = 0 if node.op_type in _SHAPE_OPS else self._bits(node)
            depth = max((self.depth.get(v, 0) for v in links.inputs(node)), default=0)
            depth += node.op_type in _PROJECTIONS and bits & _CONTENT > 0
            for output in node.outputs:
                self.origin[output] = bits
                self.depth[output] = depth

    def assign(self) -> dict[ir.Node, Role]:
        """Settle the roles from the surest to the least sure."""
        for node in self.nodes:
            self._by_inputs(node)
        for node in self.nodes:
            if node.op_type == "ReduceMean" and node not in self.roles:
                self._norm_around(node)
        for node in self.nodes:
            self._by_pattern(node)
        self._backward(Role.ROTARY, lambda node: node.op_type in _HALVES)
        self._casts_before_norms()
        self._by_region()
        for node, role in self.roles.items():
            if role is Role.OTHER:
                self.roles[node] = next((self.roles[r] for r in self.links.readers(node)), Role.OTHER)
        return self.roles

    def _bits(self, node: ir.Node) -> int:
        bits = 0
        for value in self.links.inputs(node):
            bits |= self.origin.get(value, 0)
        return bits

    def _content(self, node: ir.Node) -> list[ir.Value]:
        return [v for v in self.links.inputs(node) if self.origin.get(v, 0) & _CONTENT]

    def _by_inputs(self, node: ir.Node) -> None:
        """Settle what inputs and operator tell: shapes, masks, positions, embedding, fused operators."""
        bits = 0 if node.op_type in _SHAPE_OPS else self._bits(node)
        if bits == 0 and node.op_type not in {"Cos", "Sin"}:
            reads_weight = any(_is_large(v) for v in node.inputs)
            self.roles[node] = Role.OTHER if reads_weight else Role.CONTROL
        elif bits in {0, _POSITION}:
            self.roles[node] = Role.ROTARY
        elif not bits & _CONTENT:
            self.roles[node] = Role.MASK
        elif node.op_type in {"Gather", "GatherBlockQuantized"} and _is_large(node.inputs[0]):
            self.roles[node] = Role.EMBEDDING
        elif node.op_type in _BY_OP:
            self.roles[node] = _BY_OP[node.op_type]

    def _norm_around(self, mean: ir.Node) -> None:
        """Mark a decomposed norm: what feeds the mean, and what follows until weight and bias are applied."""
        chain = {mean}
        source = next((v.producer() for v in self._content(mean)), None)
        if source is not None and source.op_type in {"Pow", "Mul"} and source not in self.roles:
            chain.add(source)
        frontier = list(chain)
        while frontier:
            node = frontier.pop()
            is_scaled = node.op_type == "Mul" and any(_is_vector(v) for v in node.inputs)
            for reader in self.links.readers(node):
                fits = reader.op_type == "Add" if is_scaled else reader.op_type in _NORM_CHAIN
                is_sum = reader.op_type == "Add" and len(self._content(reader)) > 1
                if fits and not is_sum and reader not in chain and reader not in self.roles:
                    chain.add(reader)
                    if not is_scaled:
                        frontier.append(reader)
        for node in chain:
            self.roles[node] = Role.NORM

    def _by_pattern(self, node: ir.Node) -> None:
        """Settle rotary products and sums, the KV cache, attention scores and residual sums."""
        if node in self.roles:
            return
        content = self._content(node)
        producers = [v.producer() for v in content]
        if node.op_type == "Mul" and len(content) == 1:
            if any(self.origin.get(v, 0) == _POSITION for v in node.inputs if v is not None):
                self.roles[node] = Role.ROTARY
        elif node.op_type == "Add" and len(content) == 2:
            if all(p is not None and self.roles.get(p) is Role.ROTARY for p in producers):
                self.roles[node] = Role.ROTARY
            elif self.depth.get(content[0], 0) != self.depth.get(content[1], 0):
                self.roles[node] = Role.RESIDUAL
        elif node.op_type == "Concat" and any(v.is_graph_input() for v in content):
            self.roles[node] = Role.CACHE
        elif node.op_type in {"MatMul", "Einsum"} and len(content) == 2:
            self.roles[node] = Role.ATTENTION

    def _backward(self, role: Role, may: Callable[[ir.Node], bool]) -> None:
        """Give `role` to nodes that `may` have it and whose readers all have it."""
        for node in reversed(self.nodes):
            readers = self.links.readers(node)
            fits = node not in self.roles and may(node) and bool(readers)
            if fits and all(self.roles.get(reader) is role for reader in readers):
                self.roles[node] = role

    def _casts_before_norms(self) -> None:
        """Mark the cast to float32 in front of a norm, even where the residual sum reads it too."""
        for node in self.nodes:
            if node.op_type == "Cast" and node not in self.roles:
                readers = {self.roles.get(reader) for reader in self.links.readers(node)}
                if Role.NORM in readers and readers <= {Role.NORM, Role.RESIDUAL}:
                    self.roles[node] = Role.NORM

    def _by_region(self) -> None:
        """Tell what is left by where it lies: before, inside or after the attention, or elsewhere."""
        core = {Role.ATTENTION, Role.CACHE, Role.ROTARY}
        seeds = {node for node, role in self.roles.items() if role in core}
        scores = {node for node, role in self.roles.items() if role is Role.ATTENTION}
        after = self._flood(self.nodes, seeds, self.links.producers)
        after_scores = self._flood(self.nodes, scores, self.links.producers)
        before = self._flood(self.nodes[::-1], seeds, self.links.readers, through_norms=True)
        before_scores = self._flood(self.nodes[::-1], scores, self.links.readers)
        to_logits = {node for node in self.nodes if any(o.is_graph_output() for o in node.outputs)}
        to_logits |= self._flood(self.nodes[::-1], to_logits - set(self.roles), self.links.readers)
        for node in self.nodes:
            if node in self.roles:
                continue
            if node in after and node in before_scores:
                self.roles[node] = Role.ATTENTION
            elif node in before:
                self.roles[node] = Role.QKV
            elif node in after_scores:
                self.roles[node] = Role.OUTPUT
            else:
                self.roles[node] = Role.HEAD if node in to_logits else Role.MLP

    def _flood(
        self,
        order: list[ir.Node],
        seeds: set[ir.Node],
        neighbours: Callable[[ir.Node], Iterable[ir.Node]],
        *,
        through_norms: bool = False,
    ) -> set[ir.Node]:
        """Return the nodes without a role that are connected to a seed through nodes without a role."""
        reached: set[ir.Node] = set()
        for node in order:
            is_norm = self.roles.get(node) is Role.NORM and node.op_type not in _ADDS_RESIDUAL
            is_open = node not in self.roles or (through_norms and is_norm)
            if is_open and any(n in seeds or n in reached for n in neighbours(node)):
                reached.add(node)
        return reached


def _input_origin(value: ir.Value) -> int:
    name = value.name or ""
    if "position" in name:
        return _POSITION
    is_mask = any(word in name for word in ("mask", "seqlens", "total_sequence", "last_token"))
    return _MASK if is_mask else _CONTENT


def _is_large(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.nbytes > _LARGE_BYTES


def _is_vector(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and len(tensor.shape) == 1 and tensor.size > 1
