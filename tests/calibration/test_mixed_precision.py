import json
import math

import pytest

from qcompile.artifact import load_model
from qcompile.calibration.mixed_precision import Goal, decide
from qcompile.calibration.sensitivity import FLOAT, label_of, measure_sensitivity
from qcompile.calibration.trial import Trials
from qcompile.errors import QuantError
from qcompile.passes.base import PassContext
from qcompile.passes.narrow_scales import NarrowScales
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.quantize_options import LayerOptions, LinearScheme, QuantizeOptions
from tests.calibration.test_provide import source
from tests.calibration.test_sensitivity import INT4, ROWS, W8A8, kl_of, logits_of

INT8 = LinearScheme(8, 32, True, "float", "rtn")


def weight_bytes(model):
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def test_a_size_is_what_the_pass_then_makes(models, directories, tmp_path):
    model = models["fused"]
    smallest = decide(model, source(directories), [INT4], Goal(quality=5.0), cache=tmp_path).size_bytes
    goal = Goal(size_mb=smallest * 1.3e-6)
    decision = decide(model, source(directories), [INT4, INT8], goal, cache=tmp_path)
    assert decision.size_bytes <= goal.size_mb * 1e6
    assert set(decision.allocation.labels().values()) >= {label_of(INT4), label_of(INT8)}
    context = PassContext(model)
    QuantizeInt4(decision.apply(QuantizeOptions()))(context)
    NarrowScales()(context)
    assert weight_bytes(model) == pytest.approx(decision.size_bytes, rel=0.01)


def test_a_quality_is_kept_by_the_model_that_the_pass_makes(models, directories, tmp_path):
    decision = decide(models["fused"], source(directories), [INT4, INT8], Goal(quality=0.01), cache=tmp_path)
    assert decision.allocation.measured <= 0.01
    reference = logits_of(models["fused"])
    changed = load_model(directories["fused"] / "model.onnx")
    QuantizeInt4(decision.apply(QuantizeOptions()))(PassContext(changed))
    assert kl_of(reference, logits_of(changed)).mean() < 0.02


def test_what_the_user_said_of_a_layer_wins(models, directories, tmp_path):
    decision = decide(models["fused"], source(directories), [INT4, INT8], Goal(quality=1.0), cache=tmp_path)
    options = decision.apply(
        QuantizeOptions(layers=(LayerOptions("*down_proj", bits=8, group_size=32, symmetric=True),))
    )
    scheme = options.scheme_for(["layers.0.mlp.down_proj"], QuantizeInt4.defaults)
    assert (scheme.bits, scheme.group_size) == (8, 32)


def test_schemes_that_do_not_fit_a_tensor_are_not_tried_on_it(models):
    trials = Trials(models["fused"], ROWS)
    wide = LinearScheme(4, 64, False, "float", "rtn")
    found = measure_sensitivity(trials, [wide, INT4, W8A8], num_checks=0)
    for tensor in trials.tensors:
        labels = {f.label for f in found.findings[tensor.name]}
        assert (label_of(wide) in labels) == (tensor.shape[1] % 64 == 0)
        assert (label_of(W8A8) in labels) == (len(tensor.uses) == 1)
    assert any("–" in row for row in found.table().rows)
    with pytest.raises(QuantError, match="none of int8 a8 rtn fits 'lm_head'"):
        measure_sensitivity(trials, [W8A8])


def test_the_page_and_the_record_show_goal_ranking_and_choice(models, directories, tmp_path):
    decision = decide(models["fused"], source(directories), [INT4, INT8], Goal(quality=0.05), cache=tmp_path)
    record = json.loads(json.dumps(decision.record()))
    assert record["goal"]["quality"] == 0.05
    assert record["allocation"]["measured_kl"] <= 0.05
    assert record["source"] == "builtin"
    decision.write_page(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "KL of 0.05 at most" in page
    for finding in decision.sensitivity.ranking():
        assert finding.tensor in page
    decision.write_page(tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "MB at a measured KL of" in decision.summary()
    assert FLOAT not in decision.sensitivity.schemes


def test_goals_that_cannot_be_reached_say_the_best_found(models, directories, tmp_path):
    with pytest.raises(QuantError, match=r"a size of .* cannot be reached: the smallest found is"):
        decide(models["fused"], source(directories), [INT4], Goal(size_mb=0.04), cache=tmp_path)


@pytest.mark.parametrize("wrong", [{}, {"quality": 0.0}, {"quality": 1.0, "size_mb": 3.0}, {"size_mb": float("nan")}])
def test_a_goal_is_one_positive_number(wrong):
    with pytest.raises(QuantError, match="give one of them"):
        Goal(**wrong)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["quality", "size_mb"])
def test_a_goal_is_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(QuantError, match="give one of them, a positive number"):
        Goal(**{name: value})
