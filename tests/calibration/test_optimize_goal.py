"""`qcompile optimize --quality KL` and `--size MB`, as a user types them."""

import json

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from qcompile.runtime.manifest import Manifest


def run(*arguments):
    return CliRunner().invoke(cli, ["optimize", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("passes", ["fuse,int4", "fuse,int8-dynamic", "fuse,int8-static"])
def test_a_quality_chooses_bits_and_the_report_says_why(directories, tmp_path, passes):
    report, chart = tmp_path / "report.json", tmp_path / "why.html"
    arguments = ["--quality", 0.02, "--report", report, "--layer-chart", chart, "--verify", "off"]
    result = run(directories["plain"], "-o", tmp_path / "out", "--passes", passes, *arguments)
    assert result.exit_code == 0, result.output
    assert "KL of 0.02 at most:" in result.output
    steps = json.loads(report.read_text(encoding="utf-8"))["passes"]
    decided = next(step["detail"]["mixed_precision"] for step in steps if "mixed_precision" in step["detail"])
    assert decided["allocation"]["measured_kl"] <= 0.02
    assert len(decided["ranking"]) == 13
    assert decided["ranking"][0] in chart.read_text(encoding="utf-8")
    manifest = Manifest.load(tmp_path / "out")
    schemes = {(t["bits"], t["group_size"], t["activations"]) for t in manifest.quantization["tensors"]}
    assert len(schemes) >= 2


def test_a_size_is_kept_on_disk(directories, tmp_path):
    sizes = {}
    for megabytes in (0.16, 0.2, 1e308):
        arguments = ["--passes", "fuse,int4", "--size", megabytes, "--target", "portable", "--verify", "off"]
        result = run(directories["plain"], "-o", tmp_path / f"{megabytes}", *arguments)
        assert result.exit_code == 0, result.output
        sizes[megabytes] = sum(f.size_bytes for f in Manifest.load(tmp_path / f"{megabytes}").graph().data)
    # Tensors begin at multiples of 64 bytes in the file.
    assert sizes[0.16] <= 160_000 * 1.02 < sizes[0.2] <= 200_000 * 1.02 < sizes[1e308]


@pytest.mark.parametrize(
    "options",
    [
        ["--keep-float", "layers.0.mlp.down_proj"],
        ["--keep-float", "embed_tokens"],
        ["--layer", "*o_proj*:bits=8"],
        ["--layer", "*:group_size=16"],
        ["--layer", "*o_proj*:bits=8", "--layer", "*:algorithm=mse"],
    ],
)
def test_a_size_counts_the_layers_that_the_user_spoke_of(directories, tmp_path, options):
    arguments = ["--passes", "fuse,int4", "--size", 0.23, "--target", "portable", "--verify", "off", *options]
    report = tmp_path / "report.json"
    result = run(directories["plain"], "-o", tmp_path / "out", "--report", report, *arguments)
    assert result.exit_code == 0, result.output
    on_disk = sum(f.size_bytes for f in Manifest.load(tmp_path / "out").graph().data)
    steps = json.loads(report.read_text(encoding="utf-8"))["passes"]
    said = next(
        step["detail"]["mixed_precision"]["size_bytes"] for step in steps if "mixed_precision" in step["detail"]
    )
    assert on_disk <= said * 1.02  # tensors begin at multiples of 64 bytes in the file
    assert said <= 230_000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--passes", "fuse,int4", "--size", "0.16", "--keep-float", "lm_head"],
            "cannot be reached: the smallest found",
        ),
        (["--passes", "fuse,int4", "--quality", "1e-12", "--keep-float", "nothing"], "no layer is called 'nothing'"),
        (["--passes", "fuse,int4", "--size", "0.001"], "cannot be reached: the smallest found is"),
        (["--passes", "fuse,int4", "--size", "1", "--quality", "1"], "give one of them"),
        (["--passes", "fuse,int4", "--quality", "-1"], "a positive number"),
        (["--passes", "fuse,int8-static", "--quality", "1e-12", "--keep-float", "nothing"], "no layer is called"),
        (["--passes", "fuse", "--quality", "1"], "no quantization pass"),
        (["--passes", "fuse,int4", "--layer-chart", "x.svg"], "--layer-chart shows how --quality or --size chose"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(directories, tmp_path, arguments, reason):
    result = run(directories["plain"], "-o", tmp_path / "out", "--verify", "off", *arguments)
    assert result.exit_code == 1
    assert reason in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the calibration file is empty"),
        (b"a\xff", "not UTF-8: byte 0xff at offset 1"),
        (b'{"text": 1}', 't.jsonl:1: "text" is not a string'),
    ],
)
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_bad_calibration_file_is_refused_at_once_even_if_not_needed(
    directories, tmp_path, content, reason, algorithm
):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    arguments = ["--passes", "fuse,int4", "--algorithm", algorithm, "--calibration", path, "--verify", "off"]
    result = run(directories["plain"], "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert reason in result.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_calibration_without_a_name_is_refused(directories, tmp_path):
    result = run(directories["plain"], "-o", tmp_path / "out", "--passes", "fuse,int4", "--calibration", "")
    assert result.exit_code == 1
    assert "--calibration is empty; name a file, builtin or self" in result.output


def test_short_or_needless_text_is_a_warning(directories, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("The quick brown fox. " * 30, encoding="utf-8")
    arguments = ["--passes", "fuse,int4", "--calibration", path, "--verify", "off"]
    calibrated = run(directories["plain"], "-o", tmp_path / "a", *arguments, "--algorithm", "gptq")
    assert calibrated.exit_code == 0, calibrated.output
    assert "32768 were asked for; all of them are used" in " ".join(calibrated.output.split())
    needless = run(directories["plain"], "-o", tmp_path / "b", *arguments)
    assert "the calibration text was not needed" in " ".join(needless.output.split())


def test_a_recipe_says_the_same(directories, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('passes = ["fuse", "int4"]\nverify = "off"\n[quantize]\nsize = 1\n', encoding="utf-8")
    result = run(directories["plain"], "-o", tmp_path / "out", "--recipe", recipe)
    assert result.exit_code == 0, result.output
    assert "1 MB at most:" in result.output
