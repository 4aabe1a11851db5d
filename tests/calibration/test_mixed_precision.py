import json
import math
import re
from dataclasses import replace

import pytest

from qcompile.artifact import load_model
from qcompile.calibration.mixed_precision import Decision, Given, Goal, candidate_schemes, decide
from qcompile.calibration.provide import CalibratedStatistics
from qcompile.calibration.sensitivity import FLOAT, Finding, Sensitivity, label_of, measure_sensitivity
from qcompile.calibration.trial import Trials, tensors_of
from qcompile.errors import QuantError
from qcompile.passes.base import PassContext, PassResult
from qcompile.passes.narrow_scales import NarrowScales
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt8Norm
from qcompile.passes.quantize_rotation import RotateResidual
from qcompile.quant.allocation import Allocation, Choice
from qcompile.quantize_options import LayerOptions, LinearScheme, QuantizeOptions
from tests.calibration.test_provide import source
from tests.calibration.test_sensitivity import INT4, ROWS, W8A8, kl_of, logits_of

INT8 = LinearScheme(8, 32, True, "float", "rtn")


class Decided:
    """Statistics whose decision is known."""

    def __init__(self, decision):
        self.decision = decision

    def decide(self, model, candidates, goal, given=None):
        return self.decision


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
    given = Given({"layers.0.mlp.down_proj": INT8, "layers.1.mlp.down_proj": None})
    goal = Goal(quality=1.0)
    decision = decide(models["fused"], source(directories), [INT4], goal, given, cache=tmp_path)
    assert decision.allocation.labels()["layers.0.mlp.down_proj"] == label_of(INT8)
    assert "layers.1.mlp.down_proj" not in decision.allocation.labels()
    assert {decision.allocation.labels()[name] for name in ("layers.2.mlp.down_proj", "lm_head")} == {label_of(INT4)}
    layers = (LayerOptions("*0.mlp.down_proj", bits=8, group_size=32, symmetric=True), LayerOptions("*", group_size=16))
    options = decision.apply(QuantizeOptions(layers=layers))
    schemes = [options.scheme_for([f"layers.{i}.mlp.down_proj"], QuantizeInt4.defaults) for i in (0, 2)]
    assert [(scheme.bits, scheme.group_size) for scheme in schemes] == [(8, 16), (4, 32)]


def test_nothing_is_chosen_where_every_layer_is_kept_float(models, directories, tmp_path):
    kept = Given({tensor.name: None for tensor in tensors_of(models["fused"].graph)})
    with pytest.raises(QuantError, match="every layer is kept float: there is nothing to choose"):
        decide(models["fused"], source(directories), [INT4], Goal(size_mb=1), kept, cache=tmp_path)


def test_schemes_that_do_not_fit_a_tensor_are_not_tried_on_it(models):
    trials = Trials(models["fused"], ROWS)
    wide = LinearScheme(4, 64, False, "float", "rtn")
    found = measure_sensitivity(trials, [wide, INT4, W8A8], num_checks=0)
    for tensor in trials.tensors:
        labels = {f.label for f in found.findings[tensor.name]}
        assert (label_of(wide) in labels) == (tensor.shape[1] % 64 == 0)
        assert (label_of(W8A8) in labels) == (len(tensor.uses) == 1)
    assert any("–" in row for row in found.table().rows)
    alone = measure_sensitivity(trials, [W8A8], num_checks=0)
    assert set(alone.findings) == set(alone.float_bytes) == set(alone.names) == {*found.findings} - {"lm_head"}
    with pytest.raises(QuantError, match="none of int4 g256 asym rtn fits any weight"):
        measure_sensitivity(trials, [LinearScheme(4, 256, False, "float", "rtn")])


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


def test_the_sizes_of_messages_are_those_of_all_weights(models, directories, tmp_path):
    smallest = decide(models["fused"], source(directories), [INT4], Goal(quality=5.0), cache=tmp_path).size_bytes
    said = f"a size of 1e-05 MB cannot be reached: the smallest found is {math.ceil(smallest / 1e3) / 1e3:.3f} MB"
    with pytest.raises(QuantError, match=re.escape(said)):
        decide(models["fused"], source(directories), [INT4], Goal(size_mb=1e-5), cache=tmp_path)


def test_a_quality_that_leaves_everything_float_says_what_one_tensor_costs(models, directories, tmp_path):
    with pytest.raises(QuantError, match=r"KL of 1e-12 cannot be .* anything quantized: the least found is") as caught:
        decide(models["fused"], source(directories), [INT8], Goal(quality=1e-12), cache=tmp_path)
    least = float(re.search(r"least found is (\S+), with", str(caught.value))[1])
    decision = decide(models["fused"], source(directories), [INT8], Goal(quality=least * 1.06), cache=tmp_path)
    assert label_of(INT8) in decision.allocation.labels().values()
    assert decision.allocation.measured <= least * 1.06


def test_a_size_that_holds_everything_float_says_so(models, directories, tmp_path):
    decision = decide(models["fused"], source(directories), [INT8], Goal(size_mb=1000), cache=tmp_path)
    everything = f"{weight_bytes(models['fused']) / 1e6:.1f} MB"
    assert decision.notes == (
        f"1000 MB at most: all weights as they are take {everything}, so nothing was quantized; give a smaller size",
    )
    result = PassResult("int4")
    quantize = QuantizeInt4(QuantizeOptions(size=1000, keep_float=("lm_head",)), Decided(decision))
    quantize.call(PassContext(models["fused"]), result)
    reasons = {rejection.node: rejection.reason for rejection in result.rejected}
    assert reasons["lm_head"] == "kept float, as asked"
    assert reasons["layers.0.mlp.down_proj"] == "kept float by --size"


def test_the_choice_names_the_algorithm_that_will_run(models, directories, tmp_path):
    gptq = replace(INT4, algorithm="gptq")
    decision = decide(models["fused"], source(directories), [gptq], Goal(quality=5.0), cache=tmp_path)
    assert label_of(gptq) in decision.summary()
    assert "mse" not in decision.summary()
    assert label_of(gptq) in decision.record()["allocation"]["chosen"].values()
    assert label_of(gptq) in decision.page().html()


@pytest.mark.parametrize("gptq_first", [True, False])
def test_a_lookup_without_statistics_does_not_take_them_from_the_others(models, directories, tmp_path, gptq_first):
    """Both are tried with scales of least error, and so have one name."""
    mse, gptq = (replace(INT4, algorithm=algorithm) for algorithm in ("mse", "gptq"))
    names = [tensor.name for tensor in tensors_of(models["fused"].graph)]
    odd = names[-1] if gptq_first else names[0]
    candidates = {name: [mse if name == odd else gptq] for name in names}
    decision = decide(models["fused"], source(directories), candidates, Goal(quality=5.0), cache=tmp_path)
    assert {layer.algorithm for layer in decision.apply(QuantizeOptions()).layers} == {"gptq"}


@pytest.mark.parametrize(
    ("options", "smallest_group", "groups"),
    [
        (QuantizeOptions(), 16, {16, 32, 64, 128}),
        (QuantizeOptions(), 32, {32, 64, 128}),
        (QuantizeOptions(group_size=16), 32, {16}),
        (QuantizeOptions(layers=(LayerOptions("*", group_size=64),)), 32, {64}),
    ],
)
def test_only_blocks_that_the_target_takes_are_offered_unless_asked_for(options, smallest_group, groups):
    own = options.scheme_for(("layers.0.attn.qkv_proj",), QuantizeInt4.defaults)
    found = candidate_schemes(own, 256, smallest_group, is_group_asked=options.asks_group_size(("",)))
    assert {scheme.group_size for scheme in found if scheme.bits == 4} == groups


class Asked:
    """Statistics that keep what they are asked to choose from, and choose what the pass does by itself."""

    def __init__(self):
        self.candidates = {}

    def decide(self, model, candidates, goal, given=None):
        self.candidates = candidates
        chosen = {t.name: candidates[t.name][0] for t in tensors_of(model.graph)}
        findings = {
            name: (Finding(name, label_of(scheme), 1, 0.0, is_measured=True),) for name, scheme in chosen.items()
        }
        names = {t.name: t.reader.names for t in tensors_of(model.graph)}
        schemes = {label_of(scheme): scheme for scheme in chosen.values()}
        sensitivity = Sensitivity(schemes, findings, dict.fromkeys(names, 1), names, 1, 1)
        allocation = Allocation({name: Choice(label_of(s), 1, 0.0) for name, s in chosen.items()}, 0.0)
        return Decision(goal, sensitivity, allocation, 0, "builtin")


@pytest.mark.parametrize("scheme", [QuantizeInt4, QuantizeInt8, QuantizeInt8Norm, QuantizeInt8Dynamic])
def test_what_is_chosen_from_is_what_the_pass_writes(directories, tmp_path, scheme):
    """Each place has its own: covering scales for down_proj in 4 bits, whole channels for o_proj behind int8."""
    written = []
    for statistics, options in ((None, QuantizeOptions()), (Asked(), QuantizeOptions(size=1.0))):
        model = load_model(directories["fused"] / "model.onnx")
        RotateResidual()(PassContext(model))
        written.append(scheme(options, statistics)(PassContext(model)).detail["quantized"])
    assert written[0] == written[1]
    offered = {name: [label_of(one) for one in own] for name, own in statistics.candidates.items()}
    assert len(offered) == len(tensors_of(load_model(directories["fused"] / "model.onnx").graph))
    if scheme is QuantizeInt4:
        assert offered["layers.0.mlp.down_proj"] == ["int4 g32 asym rtn", "int4 g16 asym rtn", "int8 g32 rtn"]
        assert offered["layers.0.attn.o_proj"][0] == "int4 g32 asym mse"
    if scheme is QuantizeInt8Norm:
        assert offered["layers.0.attn.o_proj"][0] == "int8 rtn"
        assert offered["layers.0.attn.qkv_proj"][0] == "int8 a8 norm rtn"
        assert offered["layers.0.mlp.down_proj"][0].startswith("int8 g")


def test_a_short_text_is_worth_a_note(models, directories, tmp_path):
    (tmp_path / "short.txt").write_text("hello", encoding="utf-8")
    text = source(directories, tmp_path / "short.txt")
    statistics = CalibratedStatistics(text, cache=tmp_path)
    decision = statistics.decide(models["fused"], [INT4], Goal(quality=50.0))
    assert statistics.notes == decision.notes
    assert "tokens, 384 are wanted; give a longer text" in decision.notes[0]
    builtin = decide(models["fused"], source(directories), [INT4], Goal(quality=50.0), cache=tmp_path)
    assert builtin.notes == ()


@pytest.mark.parametrize(
    "wrong",
    [{}, {"quality": 0.0}, {"quality": 1.0, "size_mb": 3.0}, *({"size_mb": float(v)} for v in ("nan", "inf"))],
)
def test_a_goal_is_one_positive_number(wrong):
    with pytest.raises(QuantError, match="give one of them"):
        Goal(**wrong)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["quality", "size_mb"])
def test_a_goal_is_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(QuantError, match="give one of them, a positive number"):
        Goal(**{name: value})
