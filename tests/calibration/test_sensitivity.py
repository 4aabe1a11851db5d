import json
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import BlockRunner
from qcompile.calibration.sensitivity import FLOAT, choose, label_of, measure_sensitivity
from qcompile.calibration.trial import Trials, tensors_of
from qcompile.errors import QuantError
from qcompile.passes.base import PassContext
from qcompile.passes.quantize_int8 import QuantizeInt8Dynamic, QuantizeInt8Static
from qcompile.quant import WeightScheme, quantize_weight
from qcompile.quantize_options import LinearScheme, QuantizeOptions

ROWS = [np.arange(24, dtype=np.int64) * 13 % 400, np.arange(16, dtype=np.int64) * 29 % 400]
INT4 = LinearScheme(4, 32, False, "float", "rtn")
INT8 = LinearScheme(8, "channel", True, "float", "rtn")
W8A8 = LinearScheme(8, "channel", True, "dynamic", "rtn")
STATIC = LinearScheme(8, "channel", True, "static", "rtn")


def logits_of(model, rows=ROWS):
    value = next(v for v in model.graph.outputs if v.name == "logits")
    found = []
    BlockRunner(model, [value]).run(rows, lambda r, v, a: found.append(a[0]), lambda i: None, lambda *p: None)
    return np.concatenate(found).astype(np.float64)


def kl_of(reference, other):
    p, q = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in (reference, other)
    )
    return (np.exp(p) * (p - q)).sum(axis=-1)


def with_weight(model, name, scheme):
    """Put the dequantized weight of one tensor into the graph itself."""
    tensor = next(t for t in tensors_of(model.graph) if t.name == name)
    weight = tensor.uses[0].rows(0, tensor.shape[0])
    group = None if scheme.group_size == "channel" else scheme.group_size
    restored = quantize_weight(weight, WeightScheme(scheme.bits, group, scheme.symmetric, "float16")).dequantize()
    source = tensor.uses[0].source
    if tuple(source.const_value.shape.numpy()) != restored.shape:
        restored = np.ascontiguousarray(restored.T)
    source.const_value = ir.tensor(restored, name=source.name)


@pytest.mark.parametrize("kind", ["fused", "plain", "qwen3"])
@pytest.mark.parametrize("which", ["down_proj", "first", "last"])
def test_a_trial_is_the_model_with_the_weight_exchanged(models, kind, which):
    model = models[kind]
    trials = Trials(model, ROWS, num_positions=1000)
    names = [t.name for t in trials.tensors]
    picks = {"down_proj": next(n for n in names if "down_proj" in n), "first": names[0], "last": names[-1]}
    name = picks[which]
    reference = logits_of(model)
    found = trials.compare({name: INT4})
    with_weight(model, name, INT4)
    wanted = kl_of(reference, logits_of(model))
    assert found.mean == pytest.approx(wanted.mean(), rel=1e-2, abs=1e-7)
    assert found.p99 == pytest.approx(np.quantile(wanted, 0.99), rel=2e-2, abs=1e-6)
    assert found.mean > 0


def test_rounded_activations_are_those_of_the_w8a8_pass(models):
    model = models["fused"]
    trials = Trials(model, ROWS, num_positions=1000)
    names = [t.name for t in trials.tensors if not any(use.is_lookup for use in t.uses)]
    found, only_weights = (trials.compare(dict.fromkeys(names, scheme)) for scheme in (W8A8, INT8))
    reference = logits_of(model)
    keep = tuple({n for t in trials.tensors if t.name not in names for use in t.uses for n in use.names})
    QuantizeInt8Dynamic(QuantizeOptions(group_size="channel", activations="dynamic", algorithm="rtn", keep_float=keep))(
        PassContext(model)
    )
    wanted = kl_of(reference, logits_of(model))
    assert found.mean == pytest.approx(wanted.mean(), rel=0.1)
    assert found.mean > 1.5 * only_weights.mean


class LargestOf:
    """Statistics of the rows that the trials are made of."""

    def __init__(self, trials):
        self.trials = trials

    def prepare(self, model):
        pass

    def __call__(self, projection):
        tensor = next(t for t in self.trials.tensors if projection.node in [use.node for use in t.uses])
        return self.trials.statistics(tensor)

    def record(self):
        return {}


def test_rounding_by_one_step_is_that_of_the_static_pass(models):
    model = models["fused"]
    trials = Trials(model, ROWS, num_positions=1000)
    names = [t.name for t in trials.tensors if not any(use.is_lookup for use in t.uses)]
    found, per_token = (trials.compare(dict.fromkeys(names, scheme)) for scheme in (STATIC, W8A8))
    reference = logits_of(model)
    keep = tuple({n for t in trials.tensors if t.name not in names for use in t.uses for n in use.names})
    options = QuantizeOptions(group_size="channel", activations="static", algorithm="rtn", keep_float=keep)
    QuantizeInt8Static(options, LargestOf(trials))(PassContext(model))
    wanted = kl_of(reference, logits_of(model))
    assert found.mean == pytest.approx(wanted.mean(), rel=0.1)
    assert found.mean > 1.2 * per_token.mean


def test_nothing_changed_is_no_divergence_and_positions_are_counted(models):
    trials = Trials(models["fused"], ROWS, num_positions=7)
    assert trials.num_positions == 7
    found = trials.compare({})
    assert found.mean == 0
    assert found.same_top == 1


def test_a_tied_embedding_and_head_are_one_tensor(models):
    tied = tensors_of(models["fused"].graph)
    assert [len(t.uses) for t in tied].count(2) == 1
    assert len({t.name for t in tied}) == len(tied) == 3 * 4 + 1
    untied = tensors_of(models["qwen3"].graph)
    assert all(len(t.uses) == 1 for t in untied)


@pytest.fixture
def measured(models):
    trials = Trials(models["fused"], ROWS)
    return trials, measure_sensitivity(trials, [INT8, INT4, W8A8], num_checks=4)


def test_every_tensor_is_measured_once_and_estimates_are_near_the_truth(measured):
    _, found = measured
    assert list(found.schemes) == [label_of(INT4), label_of(W8A8), label_of(INT8)]
    for own in found.findings.values():
        assert own[0].is_measured
        assert own[0].divergence > own[-1].divergence
    checks = found.checks()
    assert len(checks) == 4
    for check in checks:
        assert check.divergence / 3 < check.estimate < check.divergence * 3
    ranking = found.ranking()
    assert [f.divergence for f in ranking] == sorted((f.divergence for f in ranking), reverse=True)


def test_a_fragile_tensor_comes_out_on_top_without_being_named(models):
    model = models["fused"]
    weight = next(v for v in model.graph.initializers.values() if v.name.endswith("1.mlp.down_proj.weight"))
    changed = np.array(weight.const_value.numpy())
    changed[::32] *= 40
    before = measure_sensitivity(Trials(models["fused"], ROWS), [INT4], num_checks=0).ranking()
    weight.const_value = ir.tensor(changed, name=weight.name)
    after = measure_sensitivity(Trials(model, ROWS), [INT4], num_checks=0).ranking()
    assert before[1].tensor != "layers.1.mlp.down_proj"
    # A random model's head is its most fragile tensor: it has no other layer behind it.
    assert [f.tensor for f in after[:2]] == ["lm_head", "layers.1.mlp.down_proj"]


def test_a_size_is_kept_and_better_than_giving_everyone_the_same(measured):
    trials, found = measured
    choices = found.choices(with_float=False)
    smallest, largest = (sum(f(c.size_bytes for c in own) for own in choices.values()) for f in (min, max))
    budget = (smallest + largest) // 2
    chosen = choose(found, trials, size_bytes=budget, with_float=False)
    assert chosen.size_bytes <= budget
    assert set(chosen.labels().values()) > {label_of(INT4)}
    assert chosen.measured < trials.compare(dict.fromkeys(found.findings, INT4)).mean


def test_a_quality_is_reached_as_measured_with_fewer_bytes_than_the_best(measured):
    trials, found = measured
    worst = trials.compare(dict.fromkeys(found.findings, INT4)).mean
    chosen = choose(found, trials, quality=worst / 4)
    assert chosen.measured <= worst / 4
    changes = {n: found.schemes[label] for n, label in chosen.labels().items() if label != FLOAT}
    assert trials.compare(changes).mean == pytest.approx(chosen.measured)
    everything = sum(max(c.size_bytes for c in own) for own in found.choices(with_float=False).values())
    assert chosen.size_bytes < everything
    layers, kept = found.layer_options(chosen, list(found.findings))
    assert len(layers) + len(kept) == len(found.findings)
    options = QuantizeOptions(layers=layers, keep_float=kept)
    for tensor in trials.tensors:
        scheme = options.scheme_for(tensor.reader.names, ())
        assert scheme == (
            None if chosen.labels()[tensor.name] == FLOAT else found.schemes[chosen.labels()[tensor.name]]
        )


def test_what_cannot_be_reached_or_makes_no_sense_is_one_line(measured, models):
    trials, found = measured
    with pytest.raises(QuantError, match=r"KL of 1e-12 cannot be reached .*the best found is .* MB"):
        choose(found, trials, quality=1e-12, with_float=False)
    with pytest.raises(QuantError, match=r"KL of 1e-12 cannot be reached with anything quantized: .* alone in int8"):
        choose(found, trials, quality=1e-12)
    with pytest.raises(QuantError, match="the smallest found is"):
        choose(found, trials, size_bytes=10)
    with pytest.raises(QuantError, match="either a quality"):
        choose(found, trials)
    with pytest.raises(QuantError, match="different schemes"):
        measure_sensitivity(trials, [INT4, INT4])
    headless = models["fused"]
    head = next(n for n in headless.graph if n.name == "lm_head")
    head.name, head.outputs[0].name = "scores", "scores"
    with pytest.raises(QuantError, match="no projection gives the logits"):
        Trials(headless, ROWS)


def test_the_report_shows_ranking_and_choice(measured):
    trials, found = measured
    chosen = choose(found, trials, size_bytes=10**9)
    table = found.table(chosen)
    assert len(table.rows) == len(found.findings)
    assert table.rows[0][0] == found.ranking()[0].tensor
    assert table.rows[0][-1] == FLOAT
    chart = found.chart(chosen)
    ElementTree.fromstring(chart)
    assert found.ranking()[0].tensor[-30:] in chart
    json.dumps(found.record(chosen))


def test_gptq_is_tried_with_the_statistics_of_the_rows(models):
    trials = Trials(models["fused"], ROWS)
    name = next(t.name for t in trials.tensors if "down_proj" in t.name)
    plain = trials.compare({name: LinearScheme(4, 32, True, "float", "rtn")}).mean
    assert trials.compare({name: LinearScheme(4, 32, True, "float", "gptq")}).mean < plain
