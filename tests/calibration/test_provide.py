import numpy as np
import pytest

from qcompile.artifact import load_model
from qcompile.calibration.calibrate import CalibrationSettings
from qcompile.calibration.provide import CalibratedStatistics, TextSource
from qcompile.calibration.text import BUILT_IN
from qcompile.errors import QuantError
from qcompile.passes.base import PassContext
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8Static
from qcompile.passes.quantize_projections import find_projections
from qcompile.quantize_options import QuantizeOptions
from qcompile.runtime.manifest import Manifest
from tests.calibration.test_sensitivity import kl_of, logits_of

SETTINGS = CalibrationSettings(num_tokens=600, row_length=100)


def source(directories, where=BUILT_IN, kind="fused"):
    return TextSource(directories[kind], Manifest.load(directories[kind]), where)


@pytest.mark.parametrize("where", [BUILT_IN, "file", "self"])
def test_every_projection_gets_the_statistics_of_its_inputs(models, directories, tmp_path, where):
    if where == "file":
        where = tmp_path / "text.txt"
        where.write_text("The quick brown fox jumps over the lazy dog. 你好，世界！\n" * 50, encoding="utf-8")
    statistics = CalibratedStatistics(source(directories, where), SETTINGS, cache=tmp_path / "cache")
    projections = [p for p in find_projections(models["fused"].graph) if not p.is_lookup]
    with pytest.raises(QuantError, match="has not been calibrated"):
        statistics(projections[0])
    assert statistics.record() == {}
    calibration = statistics.prepare(models["fused"])
    assert 500 <= calibration.num_tokens <= 600
    for projection in projections:
        found = statistics(projection)
        assert found.num_inputs == projection.num_inputs
        assert found.count == calibration.num_tokens
        assert found.hessian.shape == (projection.num_inputs,) * 2
    assert statistics.record()["source"] == str(where)
    again = CalibratedStatistics(source(directories, where), SETTINGS, cache=tmp_path / "cache")
    assert again.prepare(models["fused"]).was_cached


def test_the_int4_pass_with_gptq_keeps_the_outputs_closer_than_rounding(models, directories, tmp_path):
    rows = source(directories).rows(SETTINGS).rows
    reference = logits_of(models["fused"], rows)
    found = {}
    for algorithm in ("rtn", "gptq"):
        changed = load_model(directories["fused"] / "model.onnx")
        statistics = CalibratedStatistics(source(directories), SETTINGS, cache=tmp_path)
        statistics.prepare(changed)
        options = QuantizeOptions(algorithm=algorithm, keep_float=("lm_head", "embed_tokens"))
        QuantizeInt4(options, statistics)(PassContext(changed))
        found[algorithm] = kl_of(reference, logits_of(changed, rows)).mean()
    assert found["gptq"] < 0.8 * found["rtn"]


def test_static_activations_need_no_second_moments(models, directories, tmp_path):
    statistics = CalibratedStatistics(source(directories), SETTINGS, with_hessians=False, cache=tmp_path)
    calibration = statistics.prepare(models["fused"])
    assert calibration.statistics(calibration.names[0]).hessian is None
    reference = logits_of(models["fused"])
    QuantizeInt8Static(QuantizeOptions(), statistics)(PassContext(models["fused"]))
    assert np.isfinite(kl_of(reference, logits_of(models["fused"]))).all()


def test_a_bare_graph_has_no_tokenizer_to_read_text_with(directories):
    with pytest.raises(QuantError, match=r"give the directory that `qcompile export` wrote"):
        TextSource(directories["fused"], None).rows(SETTINGS)
