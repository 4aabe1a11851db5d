"""The runtime folder works without the rest of qcompile, under any name, on Python 3.9, and imports fast."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qcompile.runtime

FOLDER = Path(qcompile.runtime.__file__).parent
MODULES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"numpy", "tokenizers", "jinja2", "onnxruntime", "acl"}
LAZY = {"tokenizers", "jinja2", "onnxruntime", "torch", "transformers", "onnx", "click", "rich"}
PYTHON39 = os.environ.get("QCOMPILE_PYTHON39")  # a Python 3.9 with the runtime's dependencies

SCRIPT = """
import sys
from shipped_alone import Engine, SamplingParams
assert not any(name == "qcompile" or name.startswith("qcompile.") for name in sys.modules)
with Engine(sys.argv[1], threads=1) as engine:
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    print([c.token_ids for c in engine.generate(["Hello", "x"], params)])
    chat = engine.chat([{"role": "user", "content": "Hi"}], params)[0]
    again = engine.chat([{"role": "user", "content": "Hi"}], params)[0]
    assert chat.token_ids == again.token_ids
    sampled = engine.sampling_params(seed=1, max_new_tokens=8, ignore_eos=True)
    assert len(engine.generate("x", sampled)[0].token_ids) == 8
"""


def imports(path: Path) -> set[str]:
    """Every module a file imports, absolute names only."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, f"{path}: an import from outside the folder"
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_it_imports_only_what_it_may(path: Path) -> None:
    assert imports(path) <= ALLOWED | sys.stdlib_module_names


def test_it_is_python_39() -> None:
    pytest.importorskip("vermin")
    start = "import sys, vermin; sys.argv[0] = 'vermin'; vermin.main()"
    command = [sys.executable, "-c", start, "-t=3.9-", "--eval-annotations", "--violations", str(FOLDER)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, qcompile.runtime; print(*sys.modules)"
    loaded = set(run(sys.executable, ["-c", code]).split())
    assert not loaded & (LAZY | {"numpy"})
    code = "import sys; from qcompile.runtime import Engine, SamplingParams; print(*sys.modules)"
    assert not set(run(sys.executable, ["-c", code]).split()) & LAZY


def test_a_copy_of_the_folder_works_under_another_name(model: Path, tmp_path: Path) -> None:
    check_copy(sys.executable, model, tmp_path)


@pytest.mark.skipif(PYTHON39 is None, reason="QCOMPILE_PYTHON39 names no interpreter")
@pytest.mark.parametrize("style", ["shared", "concat"])
def test_the_copy_works_on_python_39(compiled: object, tmp_path: Path, style: str) -> None:
    assert PYTHON39 is not None
    check_copy(PYTHON39, compiled(kv_cache=style), tmp_path)  # type: ignore[operator]


def check_copy(python: str, model: Path, directory: Path) -> None:
    shutil.copytree(FOLDER, directory / "shipped_alone", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, directory / "model")
    (directory / "script.py").write_text(SCRIPT, encoding="utf-8")
    printed = run(python, ["-E", "-s", str(directory / "script.py"), str(directory / "model")])
    with qcompile.runtime.Engine(model, threads=1) as engine:
        params = qcompile.runtime.SamplingParams(max_new_tokens=12, ignore_eos=True)
        expected = [c.token_ids for c in engine.generate(["Hello", "x"], params)]
    assert printed.strip() == str(expected)


def run(python: str, arguments: list[str]) -> str:
    result = subprocess.run([python, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_its_public_names() -> None:
    for name in qcompile.runtime.__all__:
        assert getattr(qcompile.runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qcompile.runtime.nothing
