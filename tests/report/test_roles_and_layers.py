"""qcompile.report.roles and layers: what a node is for, and which layer it belongs to."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.report.layers import Place, split_sections
from qcompile.report.links import Links
from qcompile.report.roles import Role, assign_roles
from tests.report.fused_graphs import EXPORTED, GRAPHS, exported, fused

RAW_FP32 = [name for name in EXPORTED if name != "qwen2-dynamo-fp16"]


def _counts(model):
    roles = assign_roles(model.graph)
    assert set(roles) == set(model.graph)
    return Counter(roles.values())


def _sections(model):
    return split_sections(Links(model.graph), assign_roles(model.graph))


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exporter_has_the_same_parts(name):
    counts = _counts(exported(name))
    norms = 5 if name.startswith("qwen2") else 9
    assert counts[Role.EMBEDDING] == 1
    assert counts[Role.CACHE] == 4
    assert counts[Role.RESIDUAL] == 4
    assert counts[Role.OUTPUT] == 6  # Transpose, Reshape, MatMul in both layers
    assert counts[Role.NORM] % norms == 0
    assert counts[Role.OTHER] == 0
    assert counts[Role.HEAD] in {1, 2}
    assert counts[Role.ATTENTION] >= 14
    assert counts[Role.MASK] >= 4


@pytest.mark.parametrize("name", EXPORTED)
def test_both_layers_are_alike_and_nothing_is_lost(name):
    model = exported(name)
    sections = _sections(model)
    assert [s.place for s in sections] == [Place.BEFORE, Place.LAYER, Place.AFTER]
    assert sections[1].indices == (0, 1)
    assert len(sections[1].nodes) == 2
    placed = [node for s in sections for part in (*s.nodes, *s.control) for node in part]
    assert len(placed) == len(set(placed)) == model.graph.num_nodes()


@pytest.mark.parametrize("name", ["qwen2-builder", "qwen2-dynamo-sdpa", "qwen2-optimum"])
def test_the_fused_graph_has_one_node_per_norm_and_attention(name):
    model = fused(name)
    counts = _counts(model)
    assert counts[Role.NORM] == 5
    assert counts[Role.ATTENTION] == 2
    assert counts[Role.CACHE] == counts[Role.RESIDUAL] == 0
    sections = _sections(model)
    # RmsNorm opens layer 0, AddRmsNorm layer 1
    assert [s.indices for s in sections] == [(), (0,), (1,), ()]
    assert [len(s.nodes[0]) for s in sections[1:3]] == [len(sections[1].nodes[0])] * 2


def test_the_lowered_graph_is_understood_too():
    model = fused("qwen2-builder", "ort")
    roles = {node.op_type: role for node, role in assign_roles(model.graph).items()}
    assert roles["GroupQueryAttention"] is Role.ATTENTION
    assert roles["SkipSimplifiedLayerNormalization"] is Role.NORM
    assert [s.indices for s in _sections(model)] == [(), (0,), (1,), ()]


def test_positions_in_a_layer_correspond():
    layers = _sections(exported("qwen2-dynamo-sdpa"))[1]
    for first, second in zip(*layers.nodes, strict=True):
        assert first.op_type == second.op_type
        assert [str(v.shape) for v in first.outputs] == [str(v.shape) for v in second.outputs]
    names = [[n.name for n in nodes if n.op_type == "Softmax"] for nodes in layers.nodes]
    assert names[0] != names[1]


@pytest.mark.parametrize("name", ["dynamo18", "dynamo20", "legacy14", "legacy18"])
def test_the_toys_have_no_attention(name):
    model = exported(f"layernorm-gelu-{name}")
    counts = _counts(model)
    assert counts[Role.RESIDUAL] == 4
    assert counts[Role.ATTENTION] == counts[Role.QKV] == counts[Role.OUTPUT] == 0
    sections = _sections(model)
    assert [s.indices for s in sections] == [(0,), (1,), (2,), (3,), ()]
    assert all(len([n for n in s.nodes[0] if n.op_type == "MatMul"]) == 2 for s in sections[:-1])
    roles = assign_roles(model.graph)
    assert all(sum(roles[n] is Role.RESIDUAL for n in s.nodes[0]) == 1 for s in sections[:-1])


def _chain(num_layers):
    """An unnamed chain of layers, each of six operators, between two others."""
    body, x = [], "x"
    for i in range(num_layers):
        for j, op in enumerate(("MatMul", "Relu", "Neg", "MatMul", "Abs", "Exp")):
            weight = ", w" if op == "MatMul" else ""
            body.append(f"h{i}_{j} = {op} ({x}{weight})")
            x = f"h{i}_{j}"
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[4, 4] x0) => (float[4, 4] y) <float[4, 4] w = {{0.0}}>
        {{ c = Constant <value_float = 1.0> () x = Add (x0, c) {" ".join(body)} y = Sin ({x}) }}
    """)


def test_layers_without_names_are_found_by_repetition():
    sections = _sections(_chain(8))
    assert [(s.place, s.indices) for s in sections] == [
        (Place.BEFORE, ()),
        (Place.LAYER, tuple(range(8))),
        (Place.AFTER, ()),
    ]
    assert all(len(nodes) == 6 for nodes in sections[1].nodes)


def test_norms_whose_beginning_has_no_name_belong_to_the_layer_of_their_weight():
    model = exported("qwen2-dynamo-eager")
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
        node.metadata_props.clear()
    for s in _sections(model):
        for nodes in s.nodes:
            means = [n for n in nodes if n.op_type == "ReduceMean"]
            assert len(means) == {Place.BEFORE: 0, Place.LAYER: 2, Place.AFTER: 1}[s.place]


def test_a_small_graph_without_layers_is_one_section():
    (section,) = _sections(_chain(1))
    assert section.place is Place.WHOLE
    assert section.indices == ()
    (irregular,) = _sections(
        ir.from_onnx_text(
            """
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[4] x) => (float[4] y) {"""
            + _irregular()
            + "}"
        )
    )
    assert irregular.place is Place.WHOLE


def _irregular():
    """Fifty operators in an order that repeats nowhere."""
    ops, x, text = ["Neg", "Abs", "Exp", "Sin", "Cos", "Tanh", "Relu"], "x", ""
    generator = np.random.default_rng(0)
    for i in range(50):
        target = "y" if i == 49 else f"h{i}"
        text += f" {target} = {ops[generator.integers(7)]} ({x})"
        x = target
    return text


def test_a_bare_attention_without_cache_or_names():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 8, 64] x) => (float[1, 8, 64] y) <float[64, 64] w = {0.0}, float half = {0.5}> {
          q = MatMul (x, w) k = MatMul (x, w) v = MatMul (x, w)
          kt = Transpose <perm = [0, 2, 1]> (k)
          s = MatMul (q, kt) scaled = Mul (s, half) p = Softmax (scaled)
          mixed = MatMul (p, v) o = MatMul (mixed, w) r = Add (x, o)
          up = MatMul (r, w) a = Relu (up) down = MatMul (a, w) y = Add (r, down)
        }
    """)
    weight = model.graph.initializers["w"]
    weight.const_value = ir.LazyTensor(lambda: None, ir.DataType.FLOAT, ir.Shape([64, 64]), name="w")
    roles = assign_roles(model.graph)
    by_name = {node.outputs[0].name: role for node, role in roles.items()}
    assert {by_name[n] for n in "qkv"} == {Role.QKV}
    assert by_name["scaled"] is by_name["s"] is by_name["mixed"] is Role.ATTENTION
    assert by_name["o"] is Role.OUTPUT
    assert by_name["r"] is by_name["y"] is Role.RESIDUAL
    assert by_name["up"] is by_name["a"] is by_name["down"] is Role.MLP


def test_data_is_where_it_should_be():
    assert len(EXPORTED) == 11
    assert GRAPHS.is_dir()
