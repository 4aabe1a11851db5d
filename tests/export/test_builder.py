"""The graph builder: its interface, its spelling, and its agreement with transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.errors import ExportError
from qcompile.export.export_checkpoint import export_checkpoint, open_checkpoint
from qcompile.export.qwen import build_model
from qcompile.model_config import ModelConfig
from tests.export.onnx_decoder import OnnxDecoder, TorchDecoder, steps_of
from tests.tiny_checkpoints import random_tensors, tiny_config, write_safetensors, write_tiny_checkpoint

DATA = Path(__file__).parents[1] / "data"
LEFT = [[1] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1]]
RIGHT = [[1] * 9, [1, 1, 1, 1, 1, 0, 0, 0, 0]]
FULL = [[1] * 9] * 2


def exported(tmp_path: Path, source: Path, **options: Any) -> tuple[Path, ModelConfig]:
    export_checkpoint(str(source), tmp_path / "out", **options)
    return tmp_path / "out" / "model.onnx", ModelConfig.from_file(source / "config.json")


def largest_difference(tmp_path: Path, source: Path, mask: list[list[int]], offset: int = 0, **options: Any) -> float:
    """Return the largest logit difference to transformers over prefill and decode, at real tokens."""
    graph, config = exported(tmp_path, source, **options)
    ours, theirs = OnnxDecoder(graph, config), TorchDecoder(source)
    worst = 0.0
    for ids, full_mask, positions in steps_of(mask, (1, 1, 3), vocab=config.vocab_size, offset=offset):
        difference = np.abs(ours.step(ids, full_mask, positions) - theirs.step(ids, full_mask, positions))
        worst = max(worst, float(difference[full_mask[:, -ids.shape[1] :].astype(bool)].max()))
    return worst


# against reference outputs of transformers that are stored with the tests


@pytest.mark.parametrize("name", ["tiny-qwen2", "tiny-qwen3"])
def test_stored_reference_outputs(tmp_path: Path, name: str) -> None:
    graph, config = exported(tmp_path, DATA / "checkpoints" / name)
    reference = np.load(DATA / "reference" / f"{name}.npz")
    cases = sorted({key.split("/")[0] for key in reference.files})
    assert len(cases) >= 6
    session = OnnxDecoder(graph, config).session
    for case in cases:
        feeds = {value.name: reference[f"{case}/{value.name}"] for value in session.get_inputs()}
        wanted = [value.name for value in session.get_outputs()]
        for output, array in zip(wanted, session.run(wanted, feeds), strict=True):
            np.testing.assert_allclose(array, reference[f"{case}/{output}"], atol=2e-5, err_msg=f"{case} {output}")


# against transformers itself


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("mask", [FULL, LEFT, RIGHT], ids=["full", "left", "right"])
def test_prefill_and_decode_equal_transformers(tmp_path: Path, model_type: str, mask: list[list[int]]) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", model_type)
    assert largest_difference(tmp_path, source, mask) < 5e-5


@pytest.mark.torch
@pytest.mark.parametrize(
    "overrides",
    [
        {"head_dim": 128},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 1e-5},
    ],
)
def test_qwen3_variants_equal_transformers(tmp_path: Path, overrides: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", "qwen3", **overrides)
    assert largest_difference(tmp_path, source, LEFT) < 5e-5


@pytest.mark.torch
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 0.8},
        {"rope_type": "dynamic", "factor": 4.0},
    ],
    ids=["linear", "yarn", "yarn-factor", "dynamic"],
)
@pytest.mark.parametrize("offset", [0, 500], ids=["short", "long"])
def test_rope_types_equal_transformers(tmp_path: Path, rope: dict[str, Any], offset: int) -> None:
    """At positions beyond max_position_embeddings (256) too, where dynamic NTK changes its base."""
    pytest.importorskip("torch")
    overrides: dict[str, Any] = {"rope_scaling": rope, "rope_theta": 10000.0, "max_position_embeddings": 256}
    source = write_tiny_checkpoint(tmp_path / "in", "qwen3", **overrides)
    assert largest_difference(tmp_path, source, FULL, offset) < 1e-4


@pytest.mark.torch
@pytest.mark.parametrize("options", [{"shards": 3}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_storage_does_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2", **options)
    assert largest_difference(tmp_path, source, LEFT) < 5e-5


@pytest.mark.torch
def test_no_tie_gives_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2")
    assert largest_difference(tmp_path, source, LEFT, tie=False) < 5e-5
    names = set(load_model(tmp_path / "out" / "model.onnx").graph.initializers)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names


# other dtypes


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_float16_follows_float32(tmp_path: Path, model_type: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "in", model_type, dtype="float16")
    config = ModelConfig.from_file(source / "config.json")
    for dtype in ("fp32", "fp16"):
        export_checkpoint(str(source), tmp_path / dtype, dtype=dtype)
    wide = OnnxDecoder(tmp_path / "fp32" / "model.onnx", config)
    narrow = OnnxDecoder(tmp_path / "fp16" / "model.onnx", config, np.float16)
    for step in steps_of(LEFT, (1, 2), vocab=config.vocab_size):
        reference = wide.step(*step)
        difference = np.abs(narrow.step(*step) - reference)
        assert difference.max() < 0.02 * np.abs(reference).max()
        assert not np.isnan(difference).any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_narrow_graphs_compute_norms_and_softmax_in_float32(tmp_path: Path, dtype: str) -> None:
    graph, _ = exported(tmp_path, write_tiny_checkpoint(tmp_path / "in", "qwen3"), dtype=dtype)
    model = load_model(graph)
    narrow = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    for node in model.graph:
        if node.op_type in {"Pow", "ReduceMean", "Reciprocal", "Softmax", "Cos", "Sin"}:
            assert node.outputs[0].dtype == ir.DataType.FLOAT, node.name
        if node.op_type == "MatMul":
            assert node.outputs[0].dtype == narrow, node.name
    assert {value.dtype for value in model.graph.outputs} == {narrow}
    onnx.checker.check_model(str(graph), full_check=True)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2")
    tensors = random_tensors(config)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    write_safetensors(source / "model.safetensors", tensors, "float32")
    with pytest.raises(ExportError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' .*float16.*--dtype bf16"):
        export_checkpoint(str(source), tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


# how the graph is spelled


@pytest.fixture(params=["qwen2", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> ir.Model:
    source = write_tiny_checkpoint(tmp_path / "in", request.param)
    return build_model(open_checkpoint(str(source)), ir.DataType.FLOAT)


def test_inputs_and_outputs_in_order(model: ir.Model) -> None:
    caches = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)]
    assert [value.name for value in model.graph.inputs] == inputs
    assert [value.name for value in model.graph.outputs] == [
        "logits",
        *(f"present.{name}" for name in caches),
    ]
    shapes = {str(value.name): str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["attention_mask"] == "[batch_size,total_sequence_length]"
    assert shapes["position_ids"] == "[batch_size,sequence_length]"
    assert shapes["past_key_values.1.key"].startswith("[batch_size,2,past_sequence_length,")
    assert shapes["present.1.value"].startswith("[batch_size,2,total_sequence_length,")
    assert shapes["logits"] == "[batch_size,sequence_length,512]"


def test_standard_operators_one_opset_and_no_casts(model: ir.Model, tmp_path: Path) -> None:
    assert dict(model.opset_imports) == {"": 18}
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    casts = {node.name for node in model.graph if node.op_type == "Cast"}
    assert casts == {"rotary.positions", "mask.not_padding"}


def test_every_value_is_named_typed_and_shaped(model: ir.Model) -> None:
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "layers.0.attn.q_proj" in names
    for node in model.graph:
        for value in node.outputs:
            assert value.dtype is not None
            assert value.shape is not None
            assert value.name


def test_declared_shapes_are_what_runs(tmp_path: Path, model: ir.Model) -> None:
    """Every intermediate value has the shape the builder wrote down."""
    from qcompile.artifact import save_model

    known = {"batch_size": 2, "sequence_length": 3, "past_sequence_length": 4, "total_sequence_length": 7}
    wanted = {
        str(value.name): [known.get(str(dim), dim) if not isinstance(dim, int) else dim for dim in value.shape.dims]
        for node in model.graph
        for value in node.outputs
        if value.shape is not None and value.dtype == ir.DataType.FLOAT
    }
    outputs = {value.name for value in model.graph.outputs}
    for node in list(model.graph):
        model.graph.outputs.extend(
            value for value in node.outputs if value.name in wanted and value.name not in outputs
        )
    save_model(model, tmp_path / "all.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "all.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        dims = [known.get(dim, dim) for dim in value.shape]
        is_float = value.type == "tensor(float)"
        feeds[value.name] = rng.standard_normal(dims).astype(np.float32) if is_float else np.ones(dims, np.int64)
    names = list(wanted)
    for name, array in zip(names, session.run(names, feeds), strict=True):
        assert list(array.shape) == wanted[name], name


def test_the_checker_accepts_it(tmp_path: Path) -> None:
    graph, _ = exported(tmp_path, write_tiny_checkpoint(tmp_path / "in", "qwen2"))
    onnx.checker.check_model(str(graph), full_check=True)


def test_a_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    graph, config = exported(tmp_path, write_tiny_checkpoint(tmp_path / "in", "qwen2"))
    names = set(load_model(graph).graph.initializers)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    weights = sum(array.nbytes for array in random_tensors(tiny_config("qwen2")).values())
    assert weights <= graph.with_name("model.onnx.data").stat().st_size + 4096 < weights * 1.2
    assert config.tie_word_embeddings


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "in", "qwen3", shards=2)
    for name in ("a", "b"):
        export_checkpoint(str(source), tmp_path / name)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


# checkpoints that do not fit their config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\..*' is missing: .* 3 layers, the checkpoint has 2"),
        ({"num_hidden_layers": 2**31 - 1}, r"says 2147483647 layers, the checkpoint has 2"),
        ({"head_dim": 1 << 30}, r"q_proj\.weight' has shape"),
        ({"intermediate_size": 161}, r"has shape \[160, 64\], the config means \[161, 64\]"),
        ({"vocab_size": 511}, r"'model\.embed_tokens\.weight' has shape"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight' has shape \[32, 64\]"),
    ],
)
def test_a_config_of_another_model(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2")
    (source / "config.json").write_text(json.dumps(tiny_config("qwen2", **change)))
    with pytest.raises(ExportError, match=reason):
        export_checkpoint(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fewer_layers_than_stored_is_noted(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2")
    write_tiny_checkpoint(tmp_path / "other", "qwen2", num_hidden_layers=1)
    (tmp_path / "other" / "config.json").replace(source / "config.json")
    result = export_checkpoint(str(source), tmp_path / "out")
    assert any("12 tensors of the checkpoint are not used" in note for note in result.notes)
