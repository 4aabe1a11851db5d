"""qcompile.surgeon: a user's graphsurgeon function as a pass, weights left on disk."""

import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile import functions
from qcompile.errors import PassError
from qcompile.model_reader import load_model
from qcompile.surgeon import apply_surgery
from qcompile.tensors import MappedTensor
from qcompile.weights_writer import save_model

DATA = Path(__file__).parent / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
TWO_MATMULS = """
<ir_version: 10, opset_import: ["" : 18]>
toy (float[N, 64] x) => (float[N, 64] y) {
  a = MatMul (x, first)
  same = Identity (a)
  y = MatMul (same, second)
}
"""


@pytest.fixture
def model(tmp_path):
    """Two weights of 16 KiB, saved and loaded again, so that they lie on disk."""
    return _stored(_toy(np.float32), tmp_path)


def _toy(dtype):
    text = TWO_MATMULS.replace("float[", {np.float32: "float["}.get(dtype, "bfloat16["))
    toy = ir.from_onnx_text(text)
    generator = np.random.default_rng(0)
    for name in ("first", "second"):
        (value,) = [v for node in toy.graph for v in node.inputs if v.name == name]
        array = generator.standard_normal((64, 64)).astype(dtype)
        value.const_value = ir.Tensor(array, name=name)
        value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape([64, 64])
        toy.graph.register_initializer(value)
    for number, node in enumerate(toy.graph):
        node.name = f"node_{number}"
    return toy


def _stored(toy, directory):
    save_model(toy, directory / "toy.onnx")
    return load_model(directory / "toy.onnx")


@pytest.fixture
def edit(tmp_path):
    """Write a surgery file and return its `file.py:function`."""

    def write(body: str, name: str = "edit") -> str:
        path = tmp_path / "edit.py"
        path.write_text("import numpy as np\nimport onnx_graphsurgeon as gs\n" + textwrap.dedent(body))
        return f"{path}:{name}"

    return write


def _output(model, x, directory):
    save_model(model, directory / "changed.onnx")
    session = onnxruntime.InferenceSession(directory / "changed.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_the_function_changes_the_graph_and_weights_stay_where_they_are(model, edit, tmp_path):
    spec = edit("""
        def edit(graph):
            (identity,) = [n for n in graph.nodes if n.op == "Identity"]
            identity.o().inputs[0] = identity.inputs[0]
            identity.outputs.clear()
            return graph.cleanup().toposort()
    """)
    changed = apply_surgery(model, spec)
    assert [n.op_type for n in changed.graph] == ["MatMul", "MatMul"]
    assert [n.op_type for n in model.graph] == ["MatMul", "Identity", "MatMul"]
    for name in ("first", "second"):
        assert changed.graph.initializers[name].const_value is model.graph.initializers[name].const_value
        assert isinstance(changed.graph.initializers[name].const_value, MappedTensor)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_array_equal(_output(changed, x, tmp_path), _output(model, x, tmp_path))


def test_values_can_be_read_and_unread_ones_are_kept_by_reference(model, edit):
    spec = edit("""
        def edit(graph):
            tensors = graph.tensors()
            assert isinstance(tensors["first"].values, np.ndarray)      # read only
            tensors["second"].values *= 2                               # changed in place
            tensors["first"].name = "renamed"
            return graph
    """)
    before = model.graph.initializers["second"].const_value.numpy()
    changed = apply_surgery(model, spec)
    assert changed.graph.initializers["renamed"].const_value is model.graph.initializers["first"].const_value
    np.testing.assert_array_equal(changed.graph.initializers["second"].const_value.numpy(), before * 2)
    np.testing.assert_array_equal(model.graph.initializers["second"].const_value.numpy(), before)


def test_a_large_weight_replaced_by_a_small_one_and_by_another_dtype(model, edit, tmp_path):
    spec = edit("""
        def edit(graph):
            tensors = graph.tensors()
            tensors["first"].values = np.eye(64, dtype=np.float32)
            tensors["second"].values = tensors["second"].values[:, :2]
            graph.outputs[0].shape = ["N", 2]
            return graph
    """)
    second = model.graph.initializers["second"].const_value.numpy()
    changed = apply_surgery(model, spec)
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(_output(changed, x, tmp_path), x @ second[:, :2], rtol=1e-4, atol=1e-5)


def test_a_changed_dtype_is_written_as_changed(model, edit):
    spec = edit("""
        def edit(graph):
            first = graph.tensors()["first"]
            first.values = first.values.astype(np.float16)
            return graph
    """)
    changed = apply_surgery(model, spec)
    assert changed.graph.initializers["first"].const_value.dtype == ir.DataType.FLOAT16


def test_two_constants_may_share_one_weight(model, edit):
    spec = edit("""
        def edit(graph):
            tensors = graph.tensors()
            copy = tensors["first"].copy()
            copy.name = "copy"
            graph.nodes[-1].inputs[1] = copy
            return graph
    """)
    changed = apply_surgery(model, spec)
    shared = model.graph.initializers["first"].const_value
    assert changed.graph.initializers["first"].const_value is shared
    assert changed.graph.initializers["copy"].const_value is shared
    assert "second" not in changed.graph.initializers


def test_bfloat16_survives_reading(tmp_path, edit, capfd):
    model = _stored(_toy(ml_dtypes.bfloat16), tmp_path)
    spec = edit("""
        def edit(graph):
            tensors = graph.tensors()
            tensors["first"].values = -tensors["first"].values
            return graph
    """)
    changed = apply_surgery(model, spec)
    first = changed.graph.initializers["first"].const_value
    assert first.dtype == ir.DataType.BFLOAT16
    np.testing.assert_array_equal(first.numpy(), -np.asarray(model.graph.initializers["first"].const_value.numpy()))
    assert changed.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert capfd.readouterr() == ("", "")


def test_metadata_and_unchanged_functions_survive(model, edit):
    functions.LINEAR.register(model)
    (function,) = model.functions.values()
    function.metadata_props["kept"] = "yes"
    model.metadata_props["a"] = "1"
    model.graph.metadata_props["b"] = "2"
    model.graph[0].metadata_props["c"] = "3"
    model.graph[0].doc_string = "why"
    model.graph[1].metadata_props["c"] = "4"
    spec = edit("""
        def edit(graph):
            graph.nodes[1].op = "Neg"
            return graph
    """)
    changed = apply_surgery(model, spec)
    assert changed.metadata_props["a"] == "1"
    assert changed.graph.metadata_props["b"] == "2"
    assert changed.graph[0].metadata_props == {"c": "3"}
    assert changed.graph[0].doc_string == "why"
    assert changed.graph[1].metadata_props == {}
    assert changed.functions[function.identifier()].metadata_props["kept"] == "yes"
    assert changed.functions[function.identifier()] is not function


def test_a_changed_function_is_kept_as_changed(model, edit):
    functions.LINEAR.register(model)
    spec = edit("""
        def edit(graph):
            graph.functions[0].nodes[1].op = "Sub"
            return graph
    """)
    changed = apply_surgery(model, spec)
    (function,) = changed.functions.values()
    assert [n.op_type for n in function] == ["MatMul", "Sub"]


def test_subgraphs_keep_their_large_weights(tmp_path, edit):
    outer = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        branch (bool c, float[64] x) => (float[64] y) {
          y = If (c) <
            then_branch = yes () => (float[64] a) { a = Identity (x) },
            else_branch = no () => (float[64] b) { b = Identity (x) }
          >
        }
    """)
    inner = outer.graph[0].attributes["then_branch"].as_graph()
    weight = ir.Value(
        name="w", const_value=ir.Tensor(np.full((1024,), 2, np.float32), name="w"), shape=ir.Shape([1024])
    )
    inner.register_initializer(weight)
    inner[0].replace_input_with(0, weight)
    changed = apply_surgery(outer, edit("def edit(graph):\n    return graph\n"))
    kept = changed.graph[0].attributes["then_branch"].as_graph().initializers["w"].const_value
    assert kept is weight.const_value


def test_a_file_may_import_what_lies_beside_it(model, edit, tmp_path):
    (tmp_path / "beside_it.py").write_text("OP = 'Neg'\n")
    spec = edit("""
        from dataclasses import dataclass
        from beside_it import OP

        @dataclass
        class Plan:
            op: str

        def edit(graph):
            graph.nodes[1].op = Plan(OP).op
            return graph
    """)
    path = list(sys.path)
    try:
        assert [n.op_type for n in apply_surgery(model, spec).graph] == ["MatMul", "Neg", "MatMul"]
    finally:
        sys.modules.pop("beside_it", None)
    assert sys.path == path
    assert not any(name.startswith("qcompile_surgery") for name in sys.modules)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("edit.py", "write it as file.py:function"),
        (":edit", "write it as file.py:function"),
        ("edit.py:", "write it as file.py:function"),
        ("edit.py:not a name", "write it as file.py:function"),
        ("missing.py:edit", "no file missing.py"),
    ],
)
def test_a_spec_that_names_nothing(model, spec, message):
    with pytest.raises(PassError, match=message):
        apply_surgery(model, spec)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def other(graph):\n    return graph", r"has no function 'edit'; there are: other$"),
        ("edit = 3", r"has no function 'edit'; there are: none$"),
        ("def edit(graph)\n    return graph", r"edit\.py:3: expected ':'"),
        ("import nothing_like_this", r"edit\.py:3: ModuleNotFoundError: .*while the file was loaded"),
        ("raise SystemExit(3)", r"edit\.py:3: SystemExit: 3, while the file was loaded"),
        (
            "def edit(graph):\n    return inner(graph)\n\ndef inner(graph):\n    raise KeyError('lost')",
            r"edit\.py:7: KeyError: 'lost', raised by --surgery",
        ),
        ("def edit(graph):\n    assert not graph.nodes", r"edit\.py:4: AssertionError, raised by"),
        ("def edit(graph):\n    raise SystemExit", r"edit\.py:4: SystemExit, raised by"),
        ("def edit(graph):\n    graph.cleanup()", r"returned NoneType, a gs.Graph is expected"),
        ("def edit(graph):\n    return [graph]", r"returned list, a gs.Graph is expected"),
        (
            "def edit(graph):\n    graph.outputs[0].dtype = None\n    return graph",
            r"the graph it returned cannot be written: .*dtype",
        ),
        (
            "def edit(graph):\n    graph.nodes[0].attrs['a'] = object()\n    return graph",
            r"the graph it returned cannot be written: ",
        ),
        (
            "def edit(graph):\n    graph.nodes[1].inputs[0] = gs.Variable('ghost')\n    return graph",
            r"node 'node_1' \(Identity\) reads 'ghost', which nothing produces",
        ),
        (
            "def edit(graph):\n    graph.outputs.append(gs.Variable('g', np.float32, [1]))\n    return graph",
            r"nothing produces graph output 'g'",
        ),
        (
            "def edit(graph):\n    graph.nodes[0].inputs[0] = graph.nodes[1].outputs[0]\n    return graph",
            r"has a cycle",
        ),
    ],
)
def test_what_goes_wrong_is_one_line_that_says_where(model, edit, body, message):
    with pytest.raises(PassError, match=message) as caught:
        apply_surgery(model, edit(body))
    assert "\n" not in str(caught.value)


def test_an_attribute_that_graphsurgeon_would_drop_is_refused(model, edit):
    model.graph[1].attributes["kind"] = ir.Attr(
        "kind", ir.AttributeType.TYPE_PROTO, ir.TypeAndShape(ir.TensorType(ir.DataType.FLOAT), None)
    )
    with pytest.raises(PassError, match=r"node 'node_1' has attribute 'kind' of type TYPE_PROTO"):
        apply_surgery(model, edit("def edit(graph):\n    return graph"))


def test_a_graph_that_graphsurgeon_cannot_read_is_refused(model, edit):
    model.graph[1].attributes["text"] = ir.AttrString("text", b"\xff\xfe")
    with pytest.raises(PassError, match=r"onnx-graphsurgeon cannot read the graph: UnicodeDecodeError"):
        apply_surgery(model, edit("def edit(graph):\n    return graph"))


def test_the_logger_of_graphsurgeon_is_left_as_it_was(model, edit):
    severity = gs.logger.G_LOGGER.severity
    apply_surgery(model, edit("def edit(graph):\n    return graph"))
    assert gs.logger.G_LOGGER.severity == severity


@pytest.mark.parametrize("name", ["qwen2-dynamo-sdpa", "qwen3-optimum", "qwen2-dynamo-opset23"])
def test_the_example_keeps_the_last_logits(name, tmp_path):
    model = load_model(DATA / "graphs" / f"{name}.onnx")
    changed = apply_surgery(model, f"{EXAMPLES / 'last_token_logits.py'}:last_token_logits")
    save_model(changed, tmp_path / "changed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "changed.onnx", providers=["CPUExecutionProvider"])
    reference = np.load(DATA / "reference" / f"tiny-{name[:5]}.npz")
    feeds = {i.name: reference[f"batch_prefill/{i.name}"] for i in session.get_inputs()}
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits, reference["batch_prefill/logits"][:, -1:], atol=2e-5)


def test_memory_does_not_grow_with_the_weights(tmp_path, edit):
    """640 MiB of weights, of which the surgery reads one (64 MiB): peak memory stays far below."""
    spec = edit("""
        def edit(graph):
            assert graph.tensors()["w0"].values.shape == (4096, 4096)
            graph.nodes[0].op = "Neg"
            return graph
    """)
    program = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        import onnx_ir as ir
        from qcompile.model_reader import load_model
        from qcompile.surgeon import apply_surgery

        text = "<ir_version: 10, opset_import: [\\"\\" : 18]> m (float[1, 4096] x) => (float[1, 4096] y) {{"
        text += "h0 = Identity (x)" + "".join(f" h{{i + 1}} = MatMul (h{{i}}, w{{i}})" for i in range(10))
        model = ir.from_onnx_text(text + " y = Neg (h10) }}")
        data = Path({str(tmp_path)!r}) / "w.data"
        with data.open("wb") as stream:
            stream.truncate(10 << 26)
        for node in list(model.graph)[1:-1]:
            weight = node.inputs[1]
            weight.const_value = ir.ExternalTensor(
                data.name, int(weight.name[1:]) << 26, 1 << 26, ir.DataType.FLOAT,
                shape=ir.Shape([4096, 4096]), name=weight.name, base_dir=str(data.parent))
            model.graph.register_initializer(weight)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        changed = apply_surgery(model, {spec!r})
        assert len(changed.graph.initializers) == 10
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 320
