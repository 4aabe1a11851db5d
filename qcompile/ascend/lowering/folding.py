"""Decide, before lowering, what disappears into weights: the softmax scale, and the Split between projection and attention.

The scale d^-0.5 multiplies q. It commutes with the rotation, so it goes into the columns of the projection that makes q,
or into the gamma of q's norm where the model has one (Qwen3); where neither is possible a multiplication is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.ascend.lowering.head_norms import HeadNorms, head_norms_of
from qcompile.ascend.lowering.typed_weights import Factor
from qcompile.functions import DOMAIN
from qcompile.quantized_functions import QUANTIZED_LINEARS

_PROJECTIONS = {"MatMul", "Linear", *QUANTIZED_LINEARS}


@dataclass
class Foldings:
    """What the walk has to know of the whole graph.

    Attributes:
        factors: Projection or norm -> (columns, number): its first columns are multiplied by the number.
        packed: Attention -> the packed q|k|v it reads through a Split.
        left_over: Attention -> the scale that could not be folded.
        unneeded: Nodes that only serve masks, angles or the Splits above.
        vocabulary: The projection that makes the logits: in front of it the row of the last token is chosen.
        biases: Quantized projection -> the bias added behind it.
        added: The Add of such a bias -> its projection; it stands for the projection's result.
        head_norms: Attention -> the norms of its q and k heads.
    """

    factors: dict[ir.Node, Factor] = field(default_factory=dict)
    packed: dict[ir.Node, ir.Value] = field(default_factory=dict)
    left_over: dict[ir.Node, float] = field(default_factory=dict)
    unneeded: set[ir.Node] = field(default_factory=set)
    vocabulary: set[ir.Node] = field(default_factory=set)
    biases: dict[ir.Node, ir.Value] = field(default_factory=dict)
    added: dict[ir.Node, ir.Node] = field(default_factory=dict)
    head_norms: dict[ir.Node, HeadNorms] = field(default_factory=dict)

    def of(self, node: ir.Node) -> Factor | None:
        """Return what is folded into a node's weights."""
        return self.factors.get(node)


def foldings_of(model: ir.Model) -> Foldings:
    """Look at every attention of a fused model."""
    found = Foldings()
    _find_biases(model, found)
    attentions = [n for n in model.graph if (n.domain, n.op_type) == (DOMAIN, "Attention")]
    for node in attentions:
        scale = node.attributes["scale"].as_float()
        split = _common_split(node)
        if split is not None:
            found.packed[node] = _present(split.inputs[0])
            found.unneeded.add(split)
        maker = _maker_of(_present(node.inputs[0]) if split is None else found.packed[node], found)
        if maker is None:
            found.left_over[node] = scale
        else:
            found.factors[maker] = (_width(node), scale)
        norms = head_norms_of(node)
        if norms is not None and maker is norms.q:
            found.head_norms[node] = norms
    needed = set(_behind(model, attentions))
    found.unneeded |= {node for node in model.graph if node not in needed}
    _find_vocabulary(model, found)
    return found


def _find_biases(model: ir.Model, found: Foldings) -> None:
    """Find vectors added behind quantized projections: their kernels add a bias themselves."""
    for node in model.graph:
        if node.op_type not in QUANTIZED_LINEARS:
            continue
        readers = list(node.outputs[0].uses())
        if len(readers) != 1 or readers[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
            continue
        add, index = readers[0]
        bias = _present(add.inputs[1 - index])
        if bias.const_value is not None and len(bias.const_value.shape) == 1:
            found.biases[node] = bias
            found.added[add] = node


def _find_vocabulary(model: ir.Model, found: Foldings) -> None:
    value = next((v for v in model.graph.outputs if v.name == "logits"), None)
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in {"Cast", "Add", "Mul", "Identity"} and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type in _PROJECTIONS:
        found.vocabulary.add(node)


def _width(attention: ir.Node) -> int:
    """Return how many columns q has, H * d."""
    shape = _present(attention.inputs[3]).shape
    assert shape is not None
    return attention.attributes["num_heads"].as_int() * int(shape[3])  # type: ignore[arg-type]


def _common_split(node: ir.Node) -> ir.Node | None:
    """Return the Split whose three outputs are exactly q, k and v of this attention and nothing else's."""
    split = _present(node.inputs[0]).producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
        return None
    if any(len(list(value.uses())) != 1 for value in split.outputs):
        return None
    return split


def _maker_of(value: ir.Value, found: Foldings) -> ir.Node | None:
    """Return the projection or norm whose output, used only here, is the value up to its shape."""
    while len(list(value.uses())) == 1:
        node = value.producer()
        if node is None:
            return None
        node = found.added.get(node, node)
        if node.op_type in _PROJECTIONS or (node.domain, node.op_type) == (DOMAIN, "RmsNorm"):
            return node
        if node.op_type != "Reshape":
            return None
        value = _present(node.inputs[0])
    return None


def _behind(model: ir.Model, attentions: list[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes that logits need; of an attention only q, k and v count."""
    todo = [v for v in model.graph.outputs if v.name == "logits"]
    seen: set[ir.Node] = set()
    stop_at = set(attentions)
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        inputs = node.inputs[:3] if node in stop_at else node.inputs
        todo += [v for v in inputs if v is not None]


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
