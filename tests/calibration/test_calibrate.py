import json

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.accumulate import InputAccumulator, KeyValueStatistics
from qcompile.calibration.calibrate import CalibrationSettings, calibrate
from qcompile.calibration.fingerprint import model_fingerprint
from qcompile.calibration.runner import BlockRunner
from qcompile.calibration.store import open_calibration
from qcompile.calibration.text import TokenRows
from qcompile.errors import QuantError
from qcompile.quant import WeightScheme, quantize_weight
from tests.calibration.test_blocks import ROWS, projection_inputs
from tests.quant.linears import inputs

TOKENS = TokenRows(tuple(ROWS), "test")


def names_of(model):
    return [v.name for v in projection_inputs(model) if v.name != "logits"]


def test_statistics_are_those_of_the_activations(models, tmp_path):
    model = models["fused"]
    wanted = [v for v in projection_inputs(model) if v.name != "logits"]
    caches = [v for v in model.graph.outputs if v.name.startswith("present.")]
    seen = {}
    BlockRunner(model, [*wanted, *caches]).run(
        ROWS, lambda r, v, a: seen.setdefault(v.name, []).append(a), lambda i: None, lambda *p: None
    )
    calibration = calibrate(model, TOKENS, CalibrationSettings(num_first=2), names_of(model), cache=tmp_path)
    assert set(calibration.names) == {v.name for v in wanted}
    for value in wanted:
        x = np.concatenate([a[0] for a in seen[value.name]]).astype(np.float64)
        found = calibration.statistics(value.name)
        assert found.count == len(x) == 19
        assert np.allclose(found.abs_max, np.abs(x).max(axis=0), rtol=1e-5)
        assert np.allclose(found.abs_mean, np.abs(x).mean(axis=0), rtol=1e-4)
        assert np.allclose(found.hessian, x.T @ x, rtol=1e-3, atol=1e-3)
        assert {tuple(row) for row in found.sample} == {tuple(row) for row in x.astype(np.float32)}
    for layer in range(3):
        found = calibration.key_values(layer)
        for kind in ("key", "value"):
            cached = [np.abs(a[0]) for a in seen[f"present.{layer}.{kind}"]]
            rest, first = (np.max([c[:, part].max(axis=1) for c in cached], axis=0) for part in (np.s_[2:], np.s_[:2]))
            assert np.allclose(getattr(found, f"{kind}_abs_max"), rest, rtol=1e-5)
            assert np.allclose(getattr(found, f"first_{kind}_abs_max"), first, rtol=1e-5)
    assert calibration.layers == (0, 1, 2)
    assert calibration.record()["num_tokens"] == 19


def test_what_was_gathered_feeds_the_algorithms(models, tmp_path):
    model = models["fused"]
    calibration = calibrate(model, TOKENS, CalibrationSettings(), names_of(model), cache=tmp_path)
    node = next(n for n in model.graph if n.name == "layers.1.mlp.down_proj")
    weight = node.inputs[1].const_value.numpy().T
    statistics = calibration.statistics(node.inputs[0].name)
    quantized = quantize_weight(weight, WeightScheme(4, 32), "gptq", statistics)
    assert quantized.codes.shape == weight.shape


def test_the_same_again_is_found_and_anything_else_is_not(models, tmp_path):
    model, settings = models["fused"], CalibrationSettings(with_hessians=False)

    def run(**changes):
        arguments = {"model": model, "rows": TOKENS, "settings": settings, "names": names_of(model)} | changes
        return calibrate(**arguments, cache=tmp_path)

    assert not run().was_cached
    again = run()
    assert again.was_cached
    assert again.statistics(names_of(model)[0]).hessian is None
    assert not run(rows=TokenRows(tuple(ROWS[:1]), "test")).was_cached
    assert not run(settings=CalibrationSettings(num_sampled=4, with_hessians=False)).was_cached
    assert not run(names=names_of(model)[:2]).was_cached
    weight = next(v for v in model.graph.initializers.values() if v.name.endswith("down_proj.weight"))
    changed = np.array(weight.const_value.numpy())
    changed[0, 0] += 1
    weight.const_value = ir.tensor(changed, name=weight.name)
    assert not run().was_cached


def test_notes_are_of_the_text_at_hand_and_not_of_one_with_the_same_tokens(models, tmp_path):
    rows = TOKENS.rows
    first, again = TokenRows(rows, "a.txt", ("a.txt: short",)), TokenRows(rows, "b.txt", ("b.txt: cut",))
    settings = CalibrationSettings(with_hessians=False)
    calibrate(models["fused"], first, settings, names_of(models["fused"]), cache=tmp_path)
    found = calibrate(models["fused"], again, settings, names_of(models["fused"]), cache=tmp_path)
    assert found.was_cached
    assert (found.source, found.notes, found.record()["source"]) == ("b.txt", ("b.txt: cut",), "b.txt")


def test_two_runs_at_once_leave_each_other_their_files(models, tmp_path):
    settings = CalibrationSettings(with_hessians=False)
    inside = []

    def beside(what, done, total):
        if not inside:
            inside.append(None)  # the other run begins and ends while this one is under way
            run = calibrate(models["fused"], TOKENS, settings, names_of(models["fused"]), cache=tmp_path)
            inside.append(run.directory.stat().st_ino)

    mine = calibrate(models["fused"], TOKENS, settings, names_of(models["fused"]), cache=tmp_path, say=beside)
    assert mine.directory.stat().st_ino == inside[1]
    assert [path.name for path in tmp_path.iterdir()] == [mine.directory.name]
    assert mine.statistics(mine.names[0]).count


def test_the_fingerprint_sees_structure_attributes_and_weights(models):
    first = model_fingerprint(models["fused"])
    assert first != model_fingerprint(models["plain"])
    norm = next(n for n in models["fused"].graph if n.op_type == "RmsNorm")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
    assert model_fingerprint(models["fused"]) != first


def test_an_interrupted_or_damaged_calibration_is_not_taken_for_a_whole_one(models, tmp_path):
    model = models["fused"]

    def stop(what, done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, TOKENS, CalibrationSettings(), names_of(model), cache=tmp_path, say=stop)
    assert list(tmp_path.iterdir()) == []
    whole = calibrate(model, TOKENS, CalibrationSettings(), names_of(model), cache=tmp_path)
    name = whole.names[0]
    content = (whole.directory / "0.npz").read_bytes()
    for damaged in (b"PK", content[:10], content[: len(content) // 2], b""):
        (whole.directory / "0.npz").write_bytes(damaged)
        with pytest.raises(QuantError, match=r"damaged .*delete it and run again"):
            whole.statistics(name)
    (whole.directory / "kv.0.npz").write_bytes(content[:10])
    with pytest.raises(QuantError, match=r"damaged .*delete it and run again"):
        whole.key_values(0)
    (whole.directory / "index.json").write_text(json.dumps({"version": 0}))
    assert open_calibration(whole.directory) is None
    assert not calibrate(model, TOKENS, CalibrationSettings(), names_of(model), cache=tmp_path).was_cached


def test_what_is_not_there_is_said(models, tmp_path, monkeypatch):
    model = models["fused"]
    with pytest.raises(QuantError, match="computes no value 'nowhere'"):
        calibrate(model, TOKENS, CalibrationSettings(), ["nowhere"], cache=tmp_path)
    with pytest.raises(QuantError, match="num_tokens = 0"):
        CalibrationSettings(num_tokens=0)
    found = calibrate(model, TOKENS, CalibrationSettings(), names_of(model)[:1], cache=tmp_path)
    with pytest.raises(QuantError, match="nothing about 'other'"):
        found.statistics("other")
    with pytest.raises(QuantError, match="KV cache of layer 9"):
        found.key_values(9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10})())
    with pytest.raises(QuantError, match="the calibration needs 0 MiB, 0 MiB are free"):
        calibrate(model, TOKENS, CalibrationSettings(), names_of(model)[:2], cache=tmp_path)


def test_values_that_are_not_finite_are_named_by_who_reads_them(models, tmp_path):
    model = models["fused"]
    weight = next(v for v in model.graph.initializers.values() if v.name.endswith("layers.1.input_layernorm.weight"))
    broken = np.array(weight.const_value.numpy())
    broken[5] = np.inf
    weight.const_value = ir.tensor(broken, name=weight.name)
    with pytest.raises(QuantError, match=r"'input of layers.1.attn.*' has the value .*channel"):
        calibrate(model, TOKENS, CalibrationSettings(), names_of(model), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_accumulator_takes_pieces_of_any_size():
    x = inputs(5000, 24)
    accumulator = InputAccumulator("x", 5000, wants_hessian=True, num_sampled=64)
    for start in range(0, 5000, 700):
        accumulator.add(x[None, start : start + 700])
    found = accumulator.statistics()
    assert np.allclose(found.hessian, x.T.astype(np.float64) @ x, rtol=1e-3, atol=1)
    assert len(found.sample) == 64
    strongest = x[np.argsort(-np.abs(x).max(axis=1))[:8]]
    assert np.array_equal(found.sample[-8:], strongest)
    assert np.array_equal(found.sample[:56], x[:: 5000 // 56][:56])
    with pytest.raises(QuantError, match="saw no tokens"):
        InputAccumulator("y", 0, wants_hessian=False, num_sampled=0).statistics()
    with pytest.raises(QuantError, match=r"'y' has the value nan \(token 1, channel 2\)"):
        InputAccumulator("y", 2, wants_hessian=True, num_sampled=0).add(np.array([[1, 1, 1], [1, 1, np.nan]]))


def test_keys_that_are_not_finite_are_named():
    with pytest.raises(QuantError, match=r"'present.0.key' has NaN or infinite"):
        KeyValueStatistics.empty(1, 2, 0).add(np.full((1, 1, 3, 2), np.inf), "key", "present.0.key")
