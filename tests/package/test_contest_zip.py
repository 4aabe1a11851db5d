"""The zip of the bundled reasoner: its form, its Python, its wheels, and the same texts as `qcompile eval`."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from models.reasoner import data
from qcompile.cli.main import cli
from qcompile.errors import PackageError
from qcompile.evaluate.cases import read_cases
from qcompile.model_config import ModelConfig
from qcompile.package import contest_zip, wheels
from qcompile.package.check_contest import question_of
from qcompile.package.check_results import check_result
from qcompile.package.clean_room import open_room
from qcompile.package.platforms import JUDGE, this_machine
from qcompile.package.unpack import check_zip, unpack
from qcompile.package.vendor import contest_files, runtime_files, service_files
from qcompile.package.wheels import collect_wheels, missing_requirements, read_wheel
from tests.package.made_packages import make_wheel

WEIGHTS = Path(data.__file__).parent / "weights"
CASES = WEIGHTS.parent / "test.jsonl"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reasoner") / "portable"
    result = CliRunner().invoke(cli, ["export", str(WEIGHTS), "-o", str(path)])
    assert result.exit_code == 0, result.output
    return path


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index in miniature: one wheel."""
    (tmp_path / "wheels").mkdir()
    wheel = read_wheel(make_wheel(tmp_path / "wheels", "tinydep"))
    monkeypatch.setattr(contest_zip, "collect_wheels", lambda *_, **__: [wheel])


def pack(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["package", *arguments, "--target", "contest", "--json"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


@pytest.mark.usefixtures("no_index")
def test_the_zip_answers_like_eval(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "competition_submission.zip"
    record = pack(str(exported), "-o", str(path), "--max-new-tokens", "96", "--threads", "1", "--batch-size", "4")
    assert record["ladder"] == ["onnxruntime"]
    names = zipfile.ZipFile(path).namelist()
    assert {"competition_model.py", "requirements.txt", "dependencies/tinydep-1.0-py3-none-any.whl"} <= set(names)
    chosen = [case for case in read_cases(CASES)[0] if case.id.endswith("-005")]
    (tmp_path / "few.jsonl").write_text(
        "".join(line for line in CASES.open(encoding="utf-8") if json.loads(line)["id"].endswith("-005")), "utf-8"
    )
    with open_room() as room:
        assert unpack(path, check_zip(path)[0], room.package) == []
        room.use_this_environment()
        questions = [question_of(case) for case in chosen]
        (room.folder / "test.json").write_text(json.dumps(questions, ensure_ascii=False), "utf-8")
        outcome = room.run_judge([room.folder / "test.json"], 120)
    results, findings = check_result(outcome.answers[0], questions, "test.json")
    assert findings == [], outcome.log
    assert f"Total parameters: {record['total_parameters'] / 1e9:.2f}B" in outcome.log
    arguments = ["--max-new-tokens", "96", "--threads", "1", "--batch-size", "4", "-o", str(tmp_path / "e.json")]
    done = CliRunner().invoke(cli, ["eval", str(exported), str(tmp_path / "few.jsonl"), *arguments])
    assert done.exit_code == 0, done.output
    expected = json.loads((tmp_path / "e.json").read_text())["result"]["results"]
    assert [{"id": r["id"], "content": r["content"]} for r in results] == expected
    assert all(0 < r["duration"] < 120_000 for r in results)


@pytest.mark.usefixtures("no_index")
def test_a_zip_that_the_judge_would_refuse_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest_zip, "MAX_ZIP_BYTES", 1000)
    (tmp_path / "a.zip").write_text("an older one")
    result = CliRunner().invoke(cli, ["package", str(exported), "--target", "contest", "-o", str(tmp_path / "a.zip")])
    assert result.exit_code == 1
    assert "a.zip: would be 0.1 GiB, the judge takes" in result.stderr.splitlines()[-1]
    assert (tmp_path / "a.zip").read_text() == "an older one"
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "wheels"}


@pytest.mark.usefixtures("no_index")
def test_two_runs_make_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        pack(str(exported), "-o", str(tmp_path / name))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_what_ships_is_python_39_and_imports_no_qcompile(tmp_path: Path) -> None:
    pytest.importorskip("vermin")
    for name, text in {**runtime_files(), **contest_files(), **service_files()}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert "import qcompile\n" not in text
        assert "qcompile." not in "".join(
            line for line in text.splitlines() if line.lstrip().startswith(("import", "from"))
        )
    start = "import sys, vermin; sys.argv[0] = 'vermin'; vermin.main()"
    command = [sys.executable, "-c", start, "-t=3.9-", "--eval-annotations", "--violations", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_number_of_parameters_is_that_of_the_checkpoint(exported: Path) -> None:
    config = ModelConfig.from_dict(json.loads((exported / "qcompile.json").read_text())["config"], "reasoner")
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(WEIGHTS / "model.safetensors", framework="numpy") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert config.num_parameters == sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "-o", "x.zip"], "no qcompile.json"),
        (["MODEL", "-o", "x.zip", "--parameters", "7000000000"], "7.00B parameters; the contest takes 3B"),
        (["MODEL", "-o", "x.zip", "--checkpoint", "nowhere"], "--checkpoint takes a Hugging Face directory"),
        (["MODEL", "-o", "x.zip", "--max-new-tokens", "poem=3"], "'poem' is no case type"),
        (["MODEL", "-o", "nowhere.txt/x.zip"], "cannot be written"),
        (["MODEL", "-o", "x.zip", "--kernels", "nowhere"], "no .run file in it"),
        (["MODEL", "-o", "x.zip", "--kernels", "nowhere.txt"], "no .run file in it"),
        (["MODEL", "-o", "x.zip", "--max-model-len", "1025"], "holds 1024 tokens; --max-model-len 1025"),
        (["MODEL", "-o", ""], "the path is empty"),
        (["MODEL", "-o", "."], "is a folder; name a file"),
        (["MODEL", "-o", "x.zip", "--offline", "--pin", "foo"], "--pin foo: names no version; write foo==VERSION"),
    ],
)
def test_bad_input_is_one_line(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.txt").touch()
    words = [str(exported) if word == "MODEL" else word for word in arguments]
    result = CliRunner().invoke(cli, ["package", *words, "--target", "contest"])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".zip", ".tmp"}]


@pytest.mark.usefixtures("no_index")
def test_a_checkpoint_of_links_is_packed_and_a_cut_one_is_not(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in WEIGHTS.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    record = pack(str(exported), "-o", str(tmp_path / "x.zip"), "--checkpoint", str(tmp_path / "snapshot"))
    assert record["ladder"] == ["torch_npu", "onnxruntime"]
    weights = tmp_path / "snapshot" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[: len(content) // 2])
    words = ["package", str(exported), "--target", "contest", "-o", str(tmp_path / "y.zip")]
    result = CliRunner().invoke(cli, [*words, "--checkpoint", str(tmp_path / "snapshot")])
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "y.zip").exists()


@pytest.mark.usefixtures("no_index")
def test_a_model_without_a_chat_template_is_told(exported: Path, tmp_path: Path) -> None:
    model = without(exported, tmp_path / "base", "chat_template.jinja")
    record = pack(str(model), "-o", str(tmp_path / "x.zip"), "--max-new-tokens", "8")
    assert any("asked as plain text" in note for note in record["notes"])


@pytest.mark.usefixtures("no_index")
def test_a_model_without_a_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    model = without(exported, tmp_path / "dumb", "tokenizer.json")
    for target in ("contest", "modelarts"):
        words = ["package", str(model), "--target", target, "-o", str(tmp_path / "x"), "--offline"]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 1
        assert "no tokenizer.json" in result.stderr


def without(model: Path, path: Path, name: str) -> Path:
    """Copy a compiled-model directory, but for one file."""
    shutil.copytree(model, path)
    (path / name).unlink()
    manifest = json.loads((path / "qcompile.json").read_text("utf-8"))
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != name]
    (path / "qcompile.json").write_text(json.dumps(manifest), "utf-8")
    return path


def test_usage() -> None:
    for words in ([], ["x", "--target", "contest"], ["x", "--check", "y"], ["--target", "moon", "x", "-o", "y"]):
        assert CliRunner().invoke(cli, ["package", *words]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "-o", "y", "--target", "modelarts", "--threads", "2"], "--threads is for --target contest"),
        (
            ["x", "-o", "y", "--target", "modelarts-engine", "--engine", "PyTorch"],
            "--engine is for --target modelarts,",
        ),
        (["x", "-o", "y", "--target", "contest", "--image", "z"], "modelarts or --target modelarts-engine"),
        (["x", "-o", "y", "--target", "contest", "--static"], "--static is for --check"),
        (["x", "-o", "y", "--target", "modelarts", "--image", ""], "an image's address is wanted"),
        (["x", "-o", "y", "--target", "modelarts-engine", "--swr", "a b"], "an image's address is wanted"),
        (["--check", "x", "--budget", "5"], "--budget is for --target contest"),
    ],
)
def test_an_option_for_another_use_is_refused(words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["package", *words])
    assert result.exit_code == 2
    assert said in result.stderr


# wheels


def test_tags_of_the_judges_machine() -> None:
    for tag in ("cp39-cp39-manylinux_2_17_aarch64", "cp37-abi3-manylinux2014_aarch64", "py3-none-any"):
        assert wheels.fits(Path(f"x-1.0-{tag}.whl"), JUDGE), tag
    for tag in ("cp39-cp39-manylinux_2_31_aarch64", "cp310-abi3-manylinux_2_17_aarch64", "cp39-cp39-win_amd64"):
        assert not wheels.fits(Path(f"x-1.0-{tag}.whl"), JUDGE), tag


def test_markers_are_those_of_the_judges_machine(tmp_path: Path) -> None:
    wheel = read_wheel(
        make_wheel(
            tmp_path,
            "a",
            requires=["old; python_version < '3.10'", "x86; platform_machine == 'x86_64'", "b<2", "c; extra == 'd'"],
        )
    )
    other = read_wheel(make_wheel(tmp_path, "b", "2.0"))
    assert set(missing_requirements([wheel, other], JUDGE)) == {"old", "b<2"}


def test_wheels_from_a_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    (tmp_path / "w").mkdir()
    make_wheel(tmp_path / "w", "a", requires=["b>=1"])
    with pytest.raises(PackageError, match="pip finds no complete set"):
        collect_wheels(["a"], this_machine(), tmp_path / "w")
    make_wheel(tmp_path / "w", "b", "1.5")
    found = collect_wheels(["a"], this_machine(), tmp_path / "w")
    assert [wheel.pin for wheel in found] == ["a==1.0", "b==1.5"]
    with pytest.raises(PackageError, match="no wheels are kept"):
        collect_wheels(["never-seen"], JUDGE, is_offline=True)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_same_wheels_are_left_where_another_run_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    (tmp_path / "w").mkdir()
    make_wheel(tmp_path / "w", "a")
    (first,) = collect_wheels(["a"], this_machine(), tmp_path / "w")
    with first.path.open("rb") as held:
        collect_wheels(["a"], this_machine(), tmp_path / "w")
        assert os.fstat(held.fileno()).st_ino == first.path.stat().st_ino
    make_wheel(tmp_path / "w", "a", requires=["a"])
    (second,) = collect_wheels(["a"], this_machine(), tmp_path / "w")
    assert [str(requirement) for requirement in second.requires] == ["a"]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + b"\0" * 18])
def test_a_file_that_is_no_wheel(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a-1.0-py3-none-any.whl"
    path.write_bytes(content)
    with pytest.raises(PackageError, match=r"a-1\.0"):
        read_wheel(path)
