"""`--plugins`: the operators of kernels/plugins in lowered graphs; the numbers stay, and `check` knows them when told."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from qcompile.artifact import load_model
from qcompile.ascend.chips import Cann, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.legality.rule import AtcOptions
from qcompile.ascend.lowering.static_graph import dims
from qcompile.ascend.plugins import METADATA_KEY, PLUGINS, parse_plugins
from qcompile.cli.main import cli
from qcompile.errors import UnsupportedOpError
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import BucketOptions, fuse_tiny, lower_tiny
from tests.ascend_lowering.test_reference_bodies import FLOAT, normal, run

SMALL = BucketOptions((1, 2), (128,), (16,))
ALL = frozenset(PLUGINS)
CHIP = chip_named("ascend910b4")
WIDE = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}  # heads of 128


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse_tiny(tmp_path_factory.mktemp("wide"), "qwen2", **WIDE)


def ops(directory: Path, name: str = "decode_b2_t128") -> list[str]:
    return [node.op_type for node in load_model(directory / f"{name}.onnx").graph]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_same_tokens_legal_and_fewer_kernels(fused: Path, tmp_path: Path, dtype: str) -> None:
    plain = lower_tiny(fused, tmp_path / "plain", buckets=SMALL, dtype=dtype).ascend
    report = lower_tiny(fused, tmp_path / "out", buckets=SMALL, dtype=dtype, plugins=ALL).ascend
    agreement = compare_directories(fused, tmp_path / "out", num_tokens=24)
    assert agreement.mean_kl < (1e-5 if dtype == "fp16" else 1e-3)
    kernels = [r["graphs"]["decode_b2_t128"]["kernels_per_layer"] for r in (plain, report)]
    assert kernels[1] < kernels[0] - 15  # of which the spelled-out norms are most
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, CHIP, Cann(8, 1), AtcOptions(plugins=ALL)).findings == ()
        refused = {finding.op for finding in check_model(path, CHIP, Cann(8, 1)).findings}
        assert refused == set(PLUGINS.values())
        assert load_model(path).metadata_props[METADATA_KEY] == ",".join(PLUGINS)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_each_plugin_alone(fused: Path, tmp_path: Path, plugin: str) -> None:
    lower_tiny(fused, tmp_path / "out", buckets=SMALL, plugins=frozenset({plugin}))
    assert compare_directories(fused, tmp_path / "out", num_tokens=8).mean_kl < 1e-5
    for name in ("decode_b2_t128", "prefill_s16_t128"):
        found = {op for op in ops(tmp_path / "out", name) if op in PLUGINS.values()}
        assert found == {PLUGINS[plugin]}


def test_the_forms_the_kernels_want(fused: Path, tmp_path: Path) -> None:
    lower_tiny(fused, tmp_path / "out", buckets=SMALL, plugins=ALL)
    for name, b, s in (("decode_b2_t128", 2, 1), ("prefill_s16_t128", 1, 16)):
        graph = load_model(tmp_path / "out" / f"{name}.onnx").graph
        by_op = {node.op_type: node for node in graph}
        rotary, attention = by_op["NPUApplyRotaryPosEmb"], by_op["NPUFusedInferAttentionScore"]
        assert [dims(v) for v in rotary.inputs if v] == [(b, s, 4, 128), (b, s, 2, 128), (b, s, 1, 128), (b, s, 1, 128)]
        assert [dims(v) for v in rotary.outputs] == [(b, s, 4, 128), (b, s, 2, 128)]
        assert [dims(v) for v in attention.inputs if v] == [(b, 4, s, 128), *[(b, 2, 160, 128)] * 2, (b, 1, s, 160)]
        layout = attention.attributes["input_layout"].as_string()
        assert layout == ("BNSD" if s == 1 else "BNSD_BSND")
        assert dims(attention.outputs[0]) == ((b, 4, 1, 128) if s == 1 else (b, s, 4, 128))
        assert by_op["NPURmsNormEpsilon"].attributes["epsilon"].as_float() == pytest.approx(1e-5)
        glu = by_op["NPUSwiGlu"]
        assert glu.inputs[0] is not None
        assert dims(glu.inputs[0])[-1] == 2 * dims(glu.outputs[0])[-1]
        assert not {"Sigmoid", "NPURotaryMul", "NPUPromptFlashAttention", "Softmax", "ReduceMean"} & set(by_op)
        names = [v.name for node in graph for v in node.outputs]
        assert len(names) == len(set(names))


def test_what_a_plugin_does_not_take_is_told(tmp_path: Path) -> None:
    fused = fuse_tiny(tmp_path, "qwen2")  # heads of 16
    report = lower_tiny(fused, tmp_path / "out", buckets=SMALL, plugins=ALL)
    assert any("ApplyRotaryPosEmb: heads of 16; 128 is what every release takes" in text for text in report.warnings)
    assert "NPURotaryMul" in ops(tmp_path / "out")
    older = lower_tiny(fused, tmp_path / "older", "ascend310b4", SMALL, plugins=ALL)
    assert any("SwiGlu: the 310B has no such kernel" in text for text in older.warnings)
    assert any("--plugins attention: the 310B has no such kernel" in text for text in older.warnings)
    assert not set(ops(tmp_path / "older")) & set(PLUGINS.values())


def test_a_qwen3_with_head_norms(tmp_path: Path) -> None:
    fused = fuse_tiny(tmp_path, "qwen3", head_dim=128)
    lower_tiny(fused, tmp_path / "out", buckets=SMALL, plugins=ALL)
    assert compare_directories(fused, tmp_path / "out", num_tokens=16).mean_kl < 1e-5
    assert {"NPUSwiGlu", "NPUFusedInferAttentionScore"} <= set(ops(tmp_path / "out"))


def test_the_commands(fused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lowered = ["--target", "ascend910b4", "--plugins", "swiglu,rms-norm", "--verify", "off", "-o", str(out)]
    shapes = ["--batch", "1", "--kv-len", "64", "--prefill-len", "16"]
    done = CliRunner().invoke(cli, ["optimize", str(fused), *lowered, *shapes])
    assert done.exit_code == 0, done.output
    assert {"NPUSwiGlu", "NPURmsNormEpsilon"} <= set(ops(out, "decode_b1_t64"))
    told = CliRunner().invoke(cli, ["check", str(out), "--target", "ascend910b4", "--plugins", "all"])
    assert told.exit_code == 0, told.output
    untold = CliRunner().invoke(cli, ["check", str(out), "--target", "ascend910b4"])
    assert untold.exit_code == 1
    assert "NPUSwiGlu" in untold.output
    assert "kernels/plugins" in untold.output
    assert "needs the parser plugins rms-norm, swiglu of kernels/plugins" in told.output
    atc = CliRunner().invoke(cli, ["atc", str(out), "--soc-version", "Ascend910B4", "--dry-run"])
    assert atc.exit_code == 0, atc.output
    assert "needs the parser plugins rms-norm, swiglu" in atc.output
    wrong = CliRunner().invoke(cli, ["check", str(out), "--target", "ascend910b4", "--plugins", "swigloo"])
    assert wrong.exit_code == 2
    assert "there is no such plugin; wanted all, or some of rms-norm, swiglu, rotary, attention" in wrong.output


def test_names_of_plugins() -> None:
    assert parse_plugins("all") == ALL
    assert parse_plugins(" swiglu, rotary") == {"swiglu", "rotary"}
    assert parse_plugins("swiglu,all") == parse_plugins("all,") == ALL
    assert parse_plugins("") == frozenset()
    for text in (",", " , "):
        with pytest.raises(UnsupportedOpError, match="names no plugin; wanted all, or some of rms-norm"):
            parse_plugins(text)
    with pytest.raises(UnsupportedOpError, match="gelu: there is no such plugin"):
        parse_plugins("all,gelu")
    with pytest.raises(UnsupportedOpError, match="--plugins gelu"):
        parse_plugins("gelu")


# the definitions, against NumPy


def test_rms_norm_with_its_own_epsilon() -> None:
    x, gamma = 1e-2 * normal(2, 3, 8), normal(8)
    (y,) = run("NPURmsNormEpsilon", {"x": x}, {"gamma": gamma}, [(2, 3, 8)], dtypes=[FLOAT], epsilon=0.5)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5) * gamma
    np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_swiglu_takes_the_gate_from_the_first_half() -> None:
    x = normal(2, 3, 8)
    (y,) = run("NPUSwiGlu", {"x": x}, {}, [(2, 3, 4)], dtypes=[FLOAT], dim=-1)
    gate, up = x[..., :4].astype(np.float64), x[..., 4:]
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-5)


def test_both_are_turned() -> None:
    q, k, angle = normal(2, 1, 3, 8), normal(2, 1, 2, 8), normal(2, 1, 1, 4)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    feeds = {"query": q, "key": k, "cos": cos, "sin": sin}
    turned = run("NPUApplyRotaryPosEmb", feeds, {}, [q.shape, k.shape], dtypes=[FLOAT, FLOAT], layout=1)
    for x, y in zip((q, k), turned, strict=True):
        pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
        np.testing.assert_allclose(y, np.concatenate([pairs.real, pairs.imag], -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("new", [1, 3])
def test_attention_over_grouped_heads(new: int) -> None:
    q, k, v = normal(2, 4, new, 8), normal(2, 2, 32, 8), normal(2, 2, 32, 8)
    mask = (np.random.default_rng(3).random((2, 1, new, 32)) < 0.4).astype(np.int8)
    by_head = new == 1
    shape = (2, 4, 1, 8) if by_head else (2, new, 4, 8)
    options = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.3, "sparse_mode": 0, "inner_precise": 0}
    options["input_layout"] = "BNSD" if by_head else "BNSD_BSND"
    feeds = {"query": q, "key": k, "value": v, "atten_mask": mask}
    (y,) = run("NPUFusedInferAttentionScore", feeds, {}, [shape], dtypes=[FLOAT], **options)
    scores = 0.3 * q.astype(np.float64) @ np.repeat(k, 2, 1).swapaxes(2, 3)
    weights = np.exp(np.where(mask != 0, -np.inf, scores))
    wanted = weights / weights.sum(-1, keepdims=True) @ np.repeat(v, 2, 1)
    np.testing.assert_allclose(y, wanted if by_head else wanted.swapaxes(1, 2), rtol=1e-4, atol=1e-6)
