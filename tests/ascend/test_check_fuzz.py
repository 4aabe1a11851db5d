"""Models broken at random, in their bytes and in their structure: a report or one clear error, never a crash."""

import random

import onnx
import pytest

from qcompile.ascend.chips import cann_version, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.operators import operator_table
from qcompile.errors import GraphError
from tests.ascend.graphs import CLEAN, attention_layer
from tests.ascend.om_files import mutated

OPERATORS = [operator.name for operator in operator_table()]
NAMES = ["", "x", "y", "gamma", "nothere"]


def break_node(node: onnx.NodeProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 1:
        node.input.append(rng.choice(NAMES))
    elif kind == 2:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 3 and node.attribute:
        rng.choice(node.attribute).type = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 11])
    elif kind == 4 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(NAMES)


def break_types(graph: onnx.GraphProto, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0 and graph.initializer:
        rng.choice(graph.initializer).data_type = rng.choice([0, 1, 2, 3, 7, 8, 9, 10, 16, 17, 22, 99])
    elif kind == 1 and graph.initializer:
        rng.choice(graph.initializer).dims.append(rng.choice([0, 1, -1, 2**40]))
    elif kind == 2:
        rng.choice(graph.input).type.Clear()
    elif kind == 3:
        rng.choice(graph.input).type.tensor_type.shape.dim.add(dim_value=rng.choice([-5, 0, 3, 2**62]))


@pytest.mark.parametrize("name", CLEAN)
def test_a_broken_structure(name, tmp_path):
    rng, path = random.Random(name), tmp_path / "m.onnx"
    whole = CLEAN[name]().SerializeToString()
    found = 0
    for _ in range(60):
        model = onnx.ModelProto.FromString(whole)
        for _ in range(rng.randrange(1, 5)):
            break_node(model.graph.node[rng.randrange(len(model.graph.node))], rng)
            break_types(model.graph, rng)
        path.write_bytes(model.SerializeToString())
        report = check_model(path, chip_named(rng.choice(["910b4", "310p3", "310b4"])), cann_version("8.1"))
        found += bool(report.findings)
    assert found > 30


def test_broken_bytes(tmp_path):
    rng, path = random.Random(1), tmp_path / "m.onnx"
    whole = attention_layer().SerializeToString()
    outcomes = set()
    for _ in range(200):
        path.write_bytes(mutated(whole, rng))
        try:
            outcomes.add(type(check_model(path, chip_named("910b4"), cann_version("8.1"))))
        except GraphError:
            outcomes.add(GraphError)
    assert len(outcomes) == 2
