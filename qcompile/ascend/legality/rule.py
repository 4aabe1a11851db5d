"""What a rule gets and how it reports: `for finding in rule(context, node)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from qcompile.ascend.chips import Cann, Chip
from qcompile.ascend.legality.finding import Effect, Finding
from qcompile.ascend.legality.view import GraphView, Node, Shape
from qcompile.ascend.operators import OperatorTable

REFUSED, WRONG, SLOW = Effect.REFUSED, Effect.WRONG, Effect.SLOW
PRECISION_MODES = {
    "precision_mode": frozenset(
        {
            "force_fp16", "force_fp32", "cube_fp16in_fp32out", "allow_fp32_to_fp16", "must_keep_origin_dtype",
            "allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16", "allow_fp32_to_bf16",
        }
    ),
    "precision_mode_v2": frozenset(
        {
            "fp16", "origin", "cube_fp16in_fp32out", "mixed_float16", "mixed_bfloat16", "mixed_hif8", "cube_hif8",
        }
    ),
}  # fmt: skip
BFLOAT16_MODES = frozenset({"allow_mix_precision_bf16", "allow_fp32_to_bf16", "mixed_bfloat16"})
MODES_OF_NEWER_CHIPS = frozenset({"mixed_hif8", "cube_hif8"})  # the 950


@dataclass(frozen=True)
class AtcOptions:
    """The ATC options that decide about legality, as given on its command line; empty where not given."""

    precision_mode: str = ""
    precision_mode_v2: str = ""
    op_precision_mode: str = ""
    input_shapes: Mapping[str, Shape] = field(default_factory=dict)
    dynamic_dims: str = ""
    dynamic_batch_size: str = ""
    plugins: frozenset[str] = frozenset()  # parser plugins installed where ATC runs

    @property
    def has_gears(self) -> bool:
        """Whether the graph is compiled for several shapes at once."""
        return bool(self.dynamic_dims or self.dynamic_batch_size)


@dataclass(frozen=True)
class Context:
    """One check; `parsers` is what an installed CANN registers (op type -> domains and opsets), where that was scanned."""

    view: GraphView
    chip: Chip
    cann: Cann
    table: OperatorTable
    options: AtcOptions
    parsers: Mapping[str, frozenset[tuple[str, int]]] | None = None

    def schema(self, node: Node) -> onnx.defs.OpSchema | None:
        """Return ONNX's definition of a standard operator at the model's opset; None where there is none."""
        opset = self.view.opset("")
        if node.proto.domain not in {"", "ai.onnx"} or opset is None:
            return None
        try:
            return onnx.defs.get_schema(node.op, min(opset, onnx.defs.onnx_opset_version()), "")
        except onnx.defs.SchemaError:
            return None


ModelRule = Callable[[Context], Iterator[Finding]]
NodeRule = Callable[[Context, Node], Iterator[Finding]]


def about(
    node: Node,
    rule: str,
    code: str,
    *,
    seen: str,
    wanted: str,
    cure: str,
    effect: Effect = REFUSED,
    certain: bool = True,
) -> Finding:
    """Return a finding about a node."""
    return Finding(rule, code, effect, certain, node.name, node.op, node.layer, seen, wanted, cure)


def about_model(
    rule: str,
    code: str,
    *,
    seen: str,
    wanted: str,
    cure: str,
    name: str = "",
    effect: Effect = REFUSED,
    certain: bool = True,
) -> Finding:
    """Return a finding about the whole model, or one of its inputs or initializers."""
    return Finding(rule, code, effect, certain, name, "", "", seen, wanted, cure)


def shape_text(shape: Shape | None) -> str:
    """Spell a shape: [1,?,896], or "unknown"."""
    return "unknown" if shape is None else f"[{','.join('?' if d is None else str(d) for d in shape)}]"
