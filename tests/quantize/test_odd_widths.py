"""Inputs that no block of a kernel divides: said with a cure, refused when nothing else is left, and nobody else's harm."""

import pytest

from qcompile.calibration.mixed_precision import candidate_schemes
from qcompile.errors import QuantError, VerifyError
from qcompile.quantize_options import GROUP_SIZES, LinearScheme, QuantizeOptions
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Every width is odd: 72 and 100."""
    shape = {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6, "num_key_value_heads": 3}
    return export_tiny(tmp_path_factory.mktemp("odd"), **shape)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """16 divides 80, and nothing 200, the inputs of both down projections."""
    shape = {"hidden_size": 80, "intermediate_size": 200, "num_attention_heads": 5, "num_key_value_heads": 1}
    return export_tiny(tmp_path_factory.mktemp("mixed"), **shape)


@pytest.mark.parametrize("scheme", ["int4", "int8-weight"])
def test_a_model_of_which_nothing_can_be_quantized_is_refused(odd, tmp_path, scheme):
    with pytest.raises(
        QuantError, match=rf"{scheme}: no weight can be .* its 72 inputs are not .*--group-size channel"
    ):
        optimize_tiny(odd, tmp_path / "out", "fuse", scheme)
    assert not (tmp_path / "out").exists()


def test_the_cure_works_and_is_no_promise_of_speed(odd, tmp_path):
    report = optimize_tiny(odd, tmp_path / "out", "fuse", "int4", quantize=QuantizeOptions(group_size="channel"))
    assert report.count("int4") == 10
    (warning,) = [w for w in report.warnings if "made float when ONNX Runtime loads" in w]
    assert warning.endswith("lower-quantized-blocks-to-ort says why no kernel takes them")


def test_some_weights_that_stay_float_are_a_warning_and_strictly_an_error(mixed, tmp_path):
    report = optimize_tiny(mixed, tmp_path / "out", "fuse", "int4")
    wanted = (
        "int4: 2 of 10 weights stay float, such as 'layers.0.mlp.down_proj': its 200 inputs are not divisible by any"
    )
    assert [w.startswith(wanted) for w in report.warnings] == [True]
    assert report.loaded.quantized == 8
    with pytest.raises(VerifyError, match="2 of 10 weights stay float"):
        optimize_tiny(mixed, tmp_path / "strict", "fuse", "int4", strict=True)


def test_what_was_kept_float_as_asked_is_no_warning(mixed, tmp_path):
    options = QuantizeOptions(keep_float=("*down_proj*",))
    assert not optimize_tiny(mixed, tmp_path / "out", "fuse", "int4", quantize=options).warnings


@pytest.mark.parametrize("goal", [{"size": 0.4}, {"quality": 0.02}])
def test_an_odd_width_does_not_spoil_the_choice_for_the_others(mixed, tmp_path, goal):
    report = optimize_tiny(mixed, tmp_path / "out", "fuse", "int4", quantize=QuantizeOptions(**goal))
    assert report.loaded.dequantized == ()
    assert report.loaded.quantized == report.count("int4") > 0
    chosen = next(r.detail["mixed_precision"] for r in report.results if "mixed_precision" in r.detail)
    assert len(chosen["ranking"]) == 7
    assert not any("down_proj" in name for name in chosen["ranking"])


def test_nothing_can_be_chosen_where_nothing_fits(odd, tmp_path):
    with pytest.raises(QuantError, match="fits any weight; give --group-size channel"):
        optimize_tiny(odd, tmp_path / "out", "fuse", "int4", quantize=QuantizeOptions(quality=0.05))


@pytest.mark.parametrize(
    ("own", "width", "groups"),
    [
        (LinearScheme(4, 32, False, "float", "mse"), 896, [(4, 32), (4, 16), (4, 64), (4, 128), (8, 128)]),
        (LinearScheme(4, 64, False, "float", "mse"), 4864, [(4, 64), (4, 32), (4, 16), (4, 128), (8, 128)]),
        (LinearScheme(4, 16, False, "float", "mse"), 80, [(4, 16), (8, 16)]),
        (LinearScheme(8, 32, True, "float", "rtn"), 896, [(8, 32), (8, 16)]),
        (LinearScheme(8, 256, True, "float", "rtn"), 4864, [(8, 256), (8, 128)]),
        (LinearScheme(8, "channel", True, "float", "rtn"), 896, [(8, "channel"), (8, 128)]),
        (LinearScheme(8, "channel", True, "dynamic", "rtn"), 80, [(8, "channel"), (8, 16)]),
        (LinearScheme(8, "channel", True, "dynamic", "rtn"), 200, [(8, "channel")]),
    ],
)
def test_every_width_gets_the_largest_groups_that_divide_it(own, width, groups):
    found = candidate_schemes(own, width, GROUP_SIZES[0])
    assert [(s.bits, s.group_size) for s in found] == groups
    assert {s.algorithm for s in found} == {own.algorithm}
