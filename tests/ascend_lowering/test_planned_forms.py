"""What `qcompile plan` says of int8 and int4 before they are made, beside the graphs that the passes and the lowering make."""

from collections import Counter

import pytest

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.chips import chip_named
from qcompile.ascend.lowering.lower import AscendOptions
from qcompile.ascend.plan import AFTER, BUILT, INT4, INT8, plan_model
from tests.ascend_lowering.lowered import fuse_tiny
from tests.optimized import optimize_tiny

SHAPES = BucketOptions((1,), (64,), (16,))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 1024}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return {kind: fuse_tiny(tmp_path_factory.mktemp(kind), kind, **WIDE) for kind in ("qwen2", "qwen3")}


def rows(directory, chip):
    return {(row.bucket.name, row.form): row for row in plan_model(directory, chip_named(chip), SHAPES).rows}


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])  # tied with biases, and neither
@pytest.mark.parametrize(
    ("scheme", "form", "chip"),
    [
        ("int8", INT8, "ascend910b4"),
        ("int4", INT4, "ascend910b4"),
        ("int8", INT8, "ascend310p3"),
        ("int8", INT8, "ascend310b4"),
    ],
)
def test_a_planned_form_is_what_is_built(fused, kind, scheme, form, chip, tmp_path):
    options = {"target": chip, "ascend": AscendOptions(buckets=SHAPES), "verify": "off"}
    optimize_tiny(fused[kind], tmp_path / "float", "fuse", **options)
    optimize_tiny(fused[kind], tmp_path / "built", "fuse", scheme, **options)
    planned, built = rows(tmp_path / "float", chip), rows(tmp_path / "built", chip)
    assert {form for _, form in built} == {BUILT}
    for bucket in ("decode_b1_t64", "prefill_s16_t64"):
        guess, seen = planned[bucket, form], built[bucket, BUILT]
        assert guess.cost.kernels == seen.cost.kernels
        assert guess.cost.flops == pytest.approx(seen.cost.flops)
        # constants of norms, angles and masks are a few per cent of so small a model
        assert guess.cost.weight_bytes == pytest.approx(seen.cost.weight_bytes, rel=0.01)
        assert guess.cost.moved_bytes == pytest.approx(seen.cost.moved_bytes, rel=0.02)
        assert guess.memory.weights == pytest.approx(seen.memory.weights, rel=0.06)
        assert guess.memory.weights < planned[bucket, AFTER].memory.weights


def test_a_form_without_kernels_is_not_planned(fused, tmp_path):
    forms = {form for _, form in rows(fused["qwen2"], "ascend310p3")}
    assert INT8 in forms
    assert INT4 not in forms


def test_memory_of_what_is_built_counts_the_table_of_the_embedding(fused, tmp_path):
    options = {"target": "ascend910b4", "ascend": AscendOptions(buckets=SHAPES), "verify": "off"}
    optimize_tiny(fused["qwen3"], tmp_path / "built", "fuse", "int8", **options)
    on_disk = (tmp_path / "built" / "weights.data").stat().st_size
    for row in rows(tmp_path / "built", "ascend910b4").values():
        assert row.memory.weights == pytest.approx(on_disk, rel=0.05)
    assert Counter(row.form for row in rows(tmp_path / "built", "ascend910b4").values()) == {BUILT: 2}
