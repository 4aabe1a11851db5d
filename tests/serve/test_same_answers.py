"""What the optimizer makes for ONNX Runtime gives a request the same numbers, to the bit, whatever is computed beside it."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.quantize_options import LayerOptions, QuantizeOptions
from qcompile.runtime import Completion, Engine, SamplingParams
from qcompile.runtime.ort_options import session_options
from tests.optimized import export_tiny, optimize_tiny

# In larger blocks ONNX Runtime's kernels add in an order that depends on the number of rows.
SMALL_BLOCKS = {"int8": tuple(LayerOptions(name, group_size=64) for name in ("*down_proj*", "lm_head", "o_proj"))}
WIDTHS = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
SYSTEM = "You are a helpful assistant who answers in one line. "
PROMPTS = [SYSTEM + "12 + 30", "def add(a, b):", SYSTEM + "7 * 8 = 56", "Paris", SYSTEM + "The quick brown fox"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("wide"), **WIDTHS)


def exact_groups() -> int:
    """The largest groups of 4 bits whose products on this CPU do not depend on the number of rows: 32 with VNNI, else 16."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 64), np.float32)
    for size in (32, 16):
        codes = ir.tensor(rng.integers(0, 256, (48, 64 // size, size // 2)).astype(np.uint8), name="codes")
        scales = ir.tensor(rng.random((48, 64 // size), np.float32), name="scales")
        weights = [
            ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for t in (codes, scales)
        ]
        rows = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 64]))
        sizes = {"K": 64, "N": 48, "bits": 4, "block_size": size, "accuracy_level": 4}
        node = ir.node("MatMulNBits", [rows, *weights], sizes, domain="com.microsoft")
        node.outputs[0].name, node.outputs[0].type = "y", rows.type
        imports = {"": 18, "com.microsoft": 1}
        graph = ir.Graph([rows], node.outputs, nodes=[node], initializers=weights, opset_imports=imports, name="g")
        model = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
        session = onnxruntime.InferenceSession(
            model, session_options(onnxruntime, 1), providers=["CPUExecutionProvider"]
        )
        alone = np.concatenate([session.run(None, {"x": row[None]})[0] for row in x])
        if np.array_equal(session.run(None, {"x": x})[0], alone):
            return size
    raise AssertionError("no groups of 4 bits are exact on this CPU; docs/serving.md says that those of 16 are")


def numbers(completions: list[Completion]) -> list[object]:
    return [(completion.token_ids, completion.logprobs) for completion in completions]


@pytest.mark.parametrize("scheme", ["", "int8", "int8-weight", "int4"])
def test_batch_chunks_and_reuse_change_no_bit(wide: Path, tmp_path: Path, scheme: str) -> None:
    group_size = exact_groups() if scheme == "int4" else None
    options = QuantizeOptions(group_size=group_size, layers=SMALL_BLOCKS.get(scheme, ()))
    optimize_tiny(wide, tmp_path / "m", "fuse", *scheme.split(), quantize=options)
    with Engine(tmp_path / "m", threads=1, max_batch_size=1, reuse_prefixes=False) as engine:
        alone = numbers([engine.generate([prompt], PARAMS)[0] for prompt in PROMPTS])
    for batch, chunk in ((2, 256), (3, 7), (5, 16)):
        with Engine(tmp_path / "m", threads=1, max_batch_size=batch, prefill_chunk=chunk) as engine:
            assert numbers(engine.generate(PROMPTS, PARAMS)) == alone
            assert numbers(engine.generate(PROMPTS[::-1], PARAMS))[::-1] == alone
