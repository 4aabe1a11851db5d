"""What a fused operator is: an ONNX function in domain `qcompile` with its rule for the types of its outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.errors import GraphError

DOMAIN = "qcompile"
DOMAIN_VERSION = 1
# The definitions use ReduceMean, Split and Shape as opset 18 has them; later opsets read them the same way.
MIN_OPSET = 18
# The first with functions, and the one that came with opset 18.
MIN_IR_VERSION = 8

TensorType = tuple[ir.DataType, tuple[int, ...]]
InferOutputs = Callable[[ir.Node, Sequence[TensorType]], list[TensorType]]


@dataclass(frozen=True)
class FusedOp:
    """One fused operator.

    Attributes:
        name: Operator type in domain `qcompile`.
        text: Its ONNX function, in ONNX text form.
        outputs: Infers dtype and shape of every output from those of the inputs.
    """

    name: str
    text: str
    outputs: InferOutputs

    @functools.cached_property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return len(self.proto(MIN_OPSET).output)

    @property
    def function(self) -> ir.Function:
        """A fresh copy of the ONNX function that defines the operator."""
        return ir.serde.deserialize_function(self.proto(MIN_OPSET))

    def proto(self, opset: int) -> onnx.FunctionProto:
        """Return the definition for models of this opset, 18 or later; shared, do not change it."""
        return _parsed(self.text, max(opset, MIN_OPSET))

    def infer(self, node: ir.Node, inputs: Sequence[TensorType | None]) -> list[TensorType]:
        """Return dtype and shape of each output for concrete input types."""
        present = [t for t in inputs if t is not None]
        return self.outputs(node, present)

    def is_defined_by(self, function: ir.Function) -> bool:
        """Whether a function that a model brings along is this operator's own definition."""
        seen, own = ir.to_proto(function), self.proto(MIN_OPSET)
        if [*seen.input] != [*own.input] or [*seen.output] != [*own.output]:
            return False
        return [n.SerializeToString(deterministic=True) for n in map(_anonymous, seen.node)] == [
            n.SerializeToString(deterministic=True) for n in map(_anonymous, own.node)
        ]

    def register(self, model: ir.Model) -> None:
        """Add the function and its domain to a model that calls it; its body is of the model's own opset.

        Raises:
            GraphError: The model has another function of that name.
        """
        opset = model.graph.opset_imports.get("", MIN_OPSET)
        function = ir.serde.deserialize_function(self.proto(opset))
        existing = model.functions.setdefault(function.identifier(), function)
        if existing is not function and not self.is_defined_by(existing):
            raise GraphError(
                f"function {DOMAIN}::{self.name} is not what this version means by it: do not skip "
                "inline-exporter-functions, which puts its operators in its place"
            )
        model.ir_version = max(model.ir_version, MIN_IR_VERSION)
        model.graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)


def _anonymous(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy of a node with nothing but what it computes: onnx-ir adds names and metadata."""
    copy = onnx.NodeProto(op_type=node.op_type, domain=node.domain, input=node.input, output=node.output)
    copy.attribute.extend(sorted(node.attribute, key=lambda attribute: attribute.name))
    for attribute in copy.attribute:
        attribute.doc_string = ""
    return copy


@functools.lru_cache(maxsize=256)
def _parsed(text: str, opset: int) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n{text}')


def same_as_first(count: int) -> InferOutputs:
    """Outputs like the first input: `count` of them."""
    return lambda node, inputs: [inputs[0]] * count
