"""The same decoder, spelled at random in other ways, is fused all the same and gives the same numbers."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes import registry
from qcompile.passes.base import PassContext, op_histogram
from qcompile.passes.canonicalize_shapes import CanonicalizeShapes
from qcompile.passes.clean import EliminateIdentities
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.proof import Prover
from tests.passes.conftest import GRAPHS
from tests.passes.graph_text import draw_feeds, relative_error, run_graph
from tests.passes.six_tests import TIDY

COMMUTATIVE = {"Add", "Mul", "And", "Or", "Max", "Min", "Equal"}
FUSED = {
    "qcompile::RmsNorm": 1,
    "qcompile::AddRmsNorm": 4,
    "qcompile::Attention": 2,
    "qcompile::SwiGlu": 2,
    "qcompile::Linear": 2,
}


def respell(model: ir.Model, seed: int) -> None:
    """Swap operands, write squares as powers, put Identities in between, copy constants, rename everything."""
    rng = np.random.default_rng(seed)
    graph = model.graph
    for node in list(graph):
        if node.op_type in COMMUTATIVE and rng.random() < 0.5:
            first, second = node.inputs
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
        if node.op_type == "Mul" and node.inputs[0] is node.inputs[1] and rng.random() < 0.5:
            two = constant(graph, f"two.{node.name}", np.array(2.0, np.float32))
            power = ir.node("Pow", [node.inputs[0], two])
            replace(graph, node, power)
        if node.graph is not None:
            respell_inputs(graph, node, rng)
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for index, node in enumerate(graph):
        node.name = f"op{rng.integers(1 << 30)}_{index}"
        for position, value in enumerate(node.outputs):
            if value not in kept:
                value.name = f"t{rng.integers(1 << 30)}_{index}_{position}"


def respell_inputs(graph: ir.Graph, node: ir.Node, rng: np.random.Generator) -> None:
    for index, value in enumerate(node.inputs):
        if value is None:
            continue
        if value.const_value is not None and value.const_value.size < 8 and rng.random() < 0.3:
            copied = constant(graph, f"copy.{node.name}.{index}", value.const_value.numpy())
            node.replace_input_with(index, copied)
        elif value.const_value is None and rng.random() < 0.2:
            identity = ir.node("Identity", [value])
            identity.outputs[0].type, identity.outputs[0].shape = value.type, value.shape
            graph.insert_before(node, identity)
            node.replace_input_with(index, identity.outputs[0])


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.array(array), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    new.outputs[0].type, new.outputs[0].shape = old.outputs[0].type, old.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], [new], old.outputs, new.outputs)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["qwen2-builder", "qwen2-dynamo-sdpa", "qwen2-optimum"])
def test_fused_all_the_same(name, seed):
    original = ir.load(GRAPHS / f"{name}.onnx")
    context = PassContext(ir.load(GRAPHS / f"{name}.onnx"), Prover())
    respell(context.model, seed)
    assert op_histogram(context.model)["Identity"] > op_histogram(original).get("Identity", 0)
    feeds = draw_feeds(original, 2, 3, 5)
    before = run_graph(original, feeds)
    for a, b in zip(before, run_graph(context.model, feeds), strict=True):
        assert relative_error(a, b) < 1e-6
    for pass_class in TIDY:
        pass_class()(context)
    for fusion in registry.FUSE:
        fusion()(context)
        if fusion is FuseAttention:
            CanonicalizeShapes()(context)
            EliminateIdentities()(context)
    ops = op_histogram(context.model)
    assert {op: ops.get(op) for op in FUSED} == FUSED
    # The rows of a padded batch that are tokens: with a past of 5, all new ones.
    for a, b in zip(before, run_graph(context.model, feeds), strict=True):
        assert relative_error(a, b) < 1e-4
