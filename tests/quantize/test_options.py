"""One spelling on the command line, in a recipe and in Python."""

import json

import pytest
from click.testing import CliRunner

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.lowering.lower import AscendOptions
from qcompile.cli.main import cli
from qcompile.errors import PassError, QuantError, ShapeError
from qcompile.optimize_recipe import load_optimize_recipe
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.pipeline import OptimizeOptions
from qcompile.quantize_options import LayerOptions, QuantizeOptions, parse_layer
from qcompile.runtime.manifest import Manifest

RECIPE = """
passes = ["fuse", "int4"]
target = "ort"
verify = "off"
[quantize]
group_size = 16
symmetric = true
algorithm = "mse"
keep_float = ["layers.1.attn.*"]
calibration = "self"
[[quantize.layer]]
pattern = "*down_proj*"
bits = 8
group_size = "channel"
[[quantize.layer]]
pattern = "lm_head"
symmetric = false
"""
PYTHON = OptimizeOptions(
    passes=("fuse", "int4"),
    target="ort",
    verify="off",
    quantize=QuantizeOptions(
        group_size=16,
        symmetric=True,
        algorithm="mse",
        keep_float=("layers.1.attn.*",),
        layers=(LayerOptions("*down_proj*", bits=8, group_size="channel"), LayerOptions("lm_head", symmetric=False)),
        calibration="self",
    ),
)
COMMAND = [
    *("--passes", "fuse,int4", "--target", "ort", "--verify", "off", "--group-size", "16", "--symmetric"),
    *("--algorithm", "mse", "--keep-float", "layers.1.attn.*", "--calibration", "self"),
    *("--layer", "*down_proj*:bits=8,group-size=channel", "--layer", "lm_head: symmetric=false"),
]


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def tensors(directory):
    return Manifest.load(directory).quantization["tensors"]


def test_recipe_and_python_say_the_same(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert load_optimize_recipe(tmp_path / "recipe.toml") == PYTHON
    (tmp_path / "windows.toml").write_bytes(RECIPE.replace("\n", "\r\n").encode("utf-8-sig"))
    assert load_optimize_recipe(tmp_path / "windows.toml") == PYTHON


def test_recipe_and_command_line_make_the_same_model(exported, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    first = run("optimize", exported["qwen2"], "--recipe", tmp_path / "recipe.toml", "-o", tmp_path / "a", "--json")
    second = run("optimize", exported["qwen2"], *COMMAND, "-o", tmp_path / "b")
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    assert (tmp_path / "a" / "model.onnx.data").read_bytes() == (tmp_path / "b" / "model.onnx.data").read_bytes()
    seen = {t["name"]: t for t in tensors(tmp_path / "a")}
    assert len(seen) == 8
    assert seen["layers.0.mlp.down_proj"]["group_size"] == "channel"
    assert seen["lm_head"]["symmetric"] is False
    assert json.loads(first.stdout)["target"] == "ort"


def test_the_example_of_the_options_makes_a_model(exported, tmp_path):
    arguments = ("--passes", "fuse,int4", "--group-size", "16", "--asymmetric", "--layer", "*down_proj*:bits=8")
    done = run("optimize", exported["qwen2"], *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    seen = {t["name"]: (t["bits"], t["symmetric"]) for t in tensors(tmp_path / "out")}
    assert seen["layers.0.mlp.down_proj"] == (8, True)
    assert seen["layers.0.attn.qkv_proj"] == (4, False)


def test_a_recipe_for_ascend(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "target = 'ascend910b4'\n[ascend]\nbatch = [4, 1]\nkv_len = [128]\ndtype = 'bf16'\nattention = 'pfa'\ntop_k = 8"
    )
    options = load_optimize_recipe(path)
    assert options.ascend == AscendOptions(BucketOptions((1, 4), (128,)), "bf16", 8, attention="pfa")


def test_the_command_line_overrides_a_recipe(exported, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    arguments = ("--recipe", tmp_path / "recipe.toml", "--group-size", "32", "--layer", "lm_head:bits=8,symmetric=true")
    done = run("optimize", exported["qwen2"], *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    seen = {t["name"]: (t["bits"], t["group_size"]) for t in tensors(tmp_path / "out")}
    assert seen["lm_head"] == (8, 32)
    assert seen["layers.0.attn.qkv_proj"] == (4, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = 'int8'", "passes = 'int8'; wanted a list of names"),
        ("passes = []", "passes = [] names no pass; leave it out for fuse, or name some of clean"),
        ("passes = [' ']", "passes = [' '] names no pass"),
        ("pases = ['int8']", "unknown key 'pases'"),
        ("strict = 1", "wanted true or false"),
        ("[quantize]\nbits = '4'", "bits = '4'; wanted a number"),
        ("[quantize]\nbits = true", "bits = True; wanted a number"),
        ("[quantize]\ngroupsize = 32", "unknown key 'groupsize'"),
        ("[quantize]\nsize = '1'", "size = '1'; wanted a number"),
        ("[quantize]\ngroup_size = 'row'", "wanted a number or channel"),
        ("[quantize]\nkeep_float = 'lm_head'", "wanted a list of patterns"),
        ("[[quantize.layer]]\nbits = 4", "wanted a table with a pattern"),
        ("[[quantize.layer]]\npattern = 'x'", "changes nothing"),
        ("[quantize]\nlayer = 3", "is not a list of tables"),
        ("quantize = 3", "is not a table"),
        ("passes = [", "is not TOML"),
        ("ascend = 3", "wanted a table"),
        ("[ascend]\nbatch = 4", "batch = 4; wanted a list of whole numbers"),
        ("[ascend]\nbatch = [0]", "batch 0: numbers from 1 to"),
        ("[ascend]\ntop_k = 'all'", "top_k = 'all'; wanted a whole number"),
        ("[ascend]\nkv = [1]", "unknown key 'kv' in [ascend]"),
    ],
)
def test_a_damaged_recipe_is_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises((PassError, QuantError, ShapeError)) as caught:
        load_optimize_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).split("is not TOML")[0]


def scheme_of(text, **general):
    options = QuantizeOptions(**general, layers=(parse_layer(text),) if text else ())
    scheme = options.scheme_for(["layers.0.mlp.down_proj"], QuantizeInt4.defaults)
    return scheme.bits, scheme.group_size, scheme.symmetric


@pytest.mark.parametrize(
    ("text", "general", "wanted"),
    [
        ("*down_proj*:bits=8", {}, (8, 128, True)),
        ("", {"bits": 8}, (8, 128, True)),
        ("*down_proj*:bits=8", {"group_size": 64, "symmetric": False}, (8, 64, True)),
        ("*down_proj*:bits=4", {"bits": 8}, (4, 32, False)),
        ("*down_proj*:bits=4", {"bits": 8, "symmetric": True}, (4, 32, True)),
        ("*lm_head*:bits=8", {"symmetric": False}, (4, 32, False)),
    ],
)
def test_zero_points_that_4_bits_have_end_where_8_bits_are_asked_for(text, general, wanted):
    assert scheme_of(text, **general) == wanted


@pytest.mark.parametrize(
    ("text", "general"),
    [
        ("", {"bits": 8, "symmetric": False}),
        ("*down_proj*:bits=8,symmetric=false", {}),
        ("*down_proj*:symmetric=false", {"bits": 8}),
    ],
)
def test_zero_points_that_are_asked_for_at_8_bits_are_refused(text, general):
    with pytest.raises(QuantError, match=r"layers.0.mlp.down_proj: 8-bit weights are symmetric"):
        scheme_of(text, **general)


@pytest.mark.parametrize(
    "text",
    ["lm_head", "lm_head:", ":bits=4", "lm_head:bits", "lm_head:bits=x", "lm_head:colour=4", "lm_head:bits=8,bits=4"],
)
def test_a_layer_that_cannot_be_read_is_refused(text):
    with pytest.raises(QuantError, match="--layer"):
        parse_layer(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "many"], "group_size = 'many'"),
        (["--group-size", ""], "group_size = ''; wanted a number or channel"),
        (["--group-size", "64"], "does not divide"),
        (["--layer", "nothing:bits=8"], "no layer is called 'nothing'"),
        (["--calibration", "absent.txt", "--algorithm", "gptq"], "absent.txt"),
    ],
)
def test_the_command_ends_in_one_line_and_writes_nothing(exported, tmp_path, arguments, message):
    done = run("optimize", exported["qwen2"], "--passes", "fuse,int4", *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert message in done.output
    assert len([line for line in done.output.splitlines() if line.startswith("Error")]) == 1
    assert not (tmp_path / "out").exists()
