"""Paths on the command line: an empty one is refused, and no output takes the place of what is read."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from qcompile.cli.given_path import refuse_to_overwrite
from qcompile.cli.main import cli
from tests.runtime.toy_compiler import compile_tiny

CASE = '{"id": "m", "type": "math", "prompt": "1 + 1?", "answer": 2}\n'
PART = "is a file of .*, which is read"
READ = "is what is read"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_tiny(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cases.jsonl").write_text(CASE)
    (tmp_path / "p.zip").write_bytes(b"a package")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "own" / "config.json")


def refused(words: list[str], wanted: str) -> None:
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert re.search(wanted, line), line


def digests(*folders: Path) -> list[str]:
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("eval MODEL cases.jsonl -o MODEL/qcompile.json", PART),
        ("eval -o MODEL/qcompile.json MODEL cases.jsonl", PART),
        ("eval MODEL cases.jsonl --html MODEL/model.onnx", PART),
        ("eval MODEL cases.jsonl --html MODEL/../LAST/tokenizer.json", PART),
        ("optimize MODEL -o out --report MODEL/qcompile.json", PART),
        ("optimize MODEL/model.onnx -o out --report MODEL/qcompile.json", PART),
        ("inspect MODEL --html MODEL/model.onnx", PART),
        ("inspect MODEL/model.onnx --html MODEL/model.onnx", READ),
        ("judge p.zip --cases cases.jsonl -o p.zip", READ),
        ("judge p.zip --cases cases.jsonl --html cases.jsonl", READ),
        ("judge own --cases cases.jsonl -o own/config.json", PART),
        ("judge own --cases cases.jsonl -o link.json", PART),
        ("package MODEL --target contest -o MODEL/model.onnx", PART),
        ("package MODEL --target contest --checkpoint own -o own/config.json", PART),
    ],
)
def test_no_output_takes_the_place_of_what_is_read(model: Path, tmp_path: Path, words: str, wanted: str) -> None:
    before = digests(model, tmp_path)
    refused(words.replace("MODEL", str(model)).replace("LAST", model.name).split(), wanted)
    assert digests(model, tmp_path) == before


def test_the_default_output_is_looked_at_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = (model / "qcompile.json").read_text().replace("tokenizer.json", f"{model.name}-cases.json")
    (tmp_path / model.name).mkdir()
    (tmp_path / model.name / "qcompile.json").write_text(record)
    monkeypatch.chdir(tmp_path / model.name)
    refused(["eval", ".", str(tmp_path / "cases.jsonl")], PART)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A graph with its weights in weights.json and no manifest, beside an earlier report and a broken graph."""
    tensor = ir.tensor(np.ones(300, np.float32), name="w")
    weight = ir.Value(name="w", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    x = ir.Value(name="x", type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    node = ir.node("Add", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 18}, name="bare")
    folder = tmp_path / "bare"
    folder.mkdir()
    ir.save(ir.Model(graph, ir_version=10), folder / "g.onnx", external_data="weights.json", size_threshold_bytes=0)
    (folder / "report.json").write_text("{}")
    (folder / "broken.onnx").write_text("{}")
    return folder


@pytest.mark.parametrize("output", ["bare/weights.json", "bare/../bare/weights.json"])
def test_external_data_of_a_bare_graph_is_not_overwritten(bare: Path, output: str) -> None:
    before = digests(bare)
    refused(["optimize", "bare/g.onnx", "-o", "out", "--report", output], PART)
    refused(["optimize", "--report", output, "bare/g.onnx", "-o", "out"], PART)
    assert digests(bare) == before


def test_what_else_stands_beside_a_bare_graph_may_be_written_again(bare: Path) -> None:
    refuse_to_overwrite(bare / "report.json", bare / "g.onnx")
    refuse_to_overwrite(bare / "weights.json", bare / "broken.onnx")
    refuse_to_overwrite(bare / "new.json", bare / "g.onnx")


def test_results_may_stand_beside_the_files_of_a_model(model: Path) -> None:
    words = ["eval", str(model), "cases.jsonl", "-o", f"{model}/results.json", "--html", f"{model}/page.html"]
    for _ in range(2):
        result = CliRunner().invoke(cli, [*words, "--max-new-tokens", "2", "--threads", "1"])
        assert result.exit_code == 0, result.output


def test_a_folder_or_zip_made_before_may_be_made_again_beside_what_is_read(tmp_path: Path) -> None:
    for name in ("own", "p.zip", "new.json"):
        refuse_to_overwrite(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["package", "--check", ""],
        ["judge", "", "--cases", "cases.jsonl"],
        ["plan", "", "--target", "ascend910b4"],
        ["optimize", ""],
        ["verify", "", ""],
        ["eval", "", "cases.jsonl"],
        ["eval", "own", "cases.jsonl", "-o", ""],
        ["export", "own", "-o", ""],
        ["check", "", "--target", "ascend910b4"],
        ["bench", ""],
        ["generate", "", "Hello"],
        ["kernels", "list", "--kernels", ""],
        ["package", "own", "--target", "contest", "-o", "a.zip", "--wheels", ""],
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(words: list[str]) -> None:
    refused(words, "the path is empty")
