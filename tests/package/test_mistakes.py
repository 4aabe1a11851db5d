"""The judge's known mistakes, seeded one by one into a package that is otherwise right: each is found with its cure."""

import errno
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from qcompile.errors import PackageError
from qcompile.package import unpack
from qcompile.package.check_contest import CheckRequest, check_contest
from qcompile.package.findings import INFERENCE, NO_SUCCESS, NOT_EXIST, PIP, TIMEOUT, UNZIP, Report
from tests.package.made_packages import MODEL, make_package, make_wheel, make_zip

NAME = "competition_submission.zip"


def edit(old: str, new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        text = (root / "competition_model.py").read_text()
        assert old in text
        (root / "competition_model.py").write_text(text.replace(old, new, 1))

    return spoil


def nested(root: Path) -> None:
    make_zip(root, root.parent / NAME, prefix="competition_submission/")


def wrong_file(root: Path) -> None:
    with tarfile.open(root.parent / NAME, "w:gz") as archive:
        archive.add(root / "competition_model.py")


def wrong_zip(root: Path) -> None:
    with zipfile.ZipFile(root.parent / NAME, "w") as archive:
        archive.writestr("results.json", "{}")


def link_that_leaves(root: Path) -> None:
    make_zip(root, root.parent / NAME)
    with zipfile.ZipFile(root.parent / NAME, "a") as archive:
        link = zipfile.ZipInfo("model/passwords")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")


def path_that_leaves(root: Path) -> None:
    make_zip(root, root.parent / NAME)
    with zipfile.ZipFile(root.parent / NAME, "a") as archive:
        archive.writestr("../outside.txt", "x")


def bomb(root: Path) -> None:
    with zipfile.ZipFile(root.parent / NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/zeros.bin", b"\0" * (64 << 20))


def second_model(root: Path) -> None:
    (root / "old").mkdir()
    (root / "old" / "competition_model.py").write_text(MODEL)


def second_requirements(root: Path) -> None:
    (root / "model" / "requirements.txt").write_text("x==1\n")


def stray_file(root: Path) -> None:
    (root / "dependencies" / "README.md").write_text("notes")


def no_wheel(root: Path) -> None:
    (root / "requirements.txt").write_text("tinydep==1.0\nother==2.0\n")


def other_version(root: Path) -> None:
    (root / "requirements.txt").write_text("tinydep==1.1\n")


def wrong_machine(root: Path) -> None:
    (root / "requirements.txt").write_text("tinydep==1.0\nfast==2.0\n")
    make_wheel(root / "dependencies", "fast", "2.0", "cp39-cp39-manylinux_2_17_x86_64")


def wrong_python(root: Path) -> None:
    (root / "requirements.txt").write_text("tinydep==1.0\nfast==2.0\n")
    make_wheel(root / "dependencies", "fast", "2.0", "cp311-cp311-manylinux_2_17_aarch64")


def needed_only_there(root: Path) -> None:
    (root / "dependencies" / "tinydep-1.0-py3-none-any.whl").unlink()
    make_wheel(root / "dependencies", "tinydep", requires=["zipp>=3; python_version < '3.10'"])


def in_the_image(root: Path) -> None:
    (root / "requirements.txt").write_text("tinydep==1.0\ntorch==2.5.1\n")


def only_for_windows(root: Path) -> None:
    (root / "requirements.txt").write_text("pywin32==306; sys_platform == 'win32'\n")
    shutil.rmtree(root / "dependencies")


def bare_folder(root: Path) -> None:
    edit("self.forms = {", "self.model_path = 'model'; T.from_pretrained(self.model_path)\n        self.forms = {")(
        root
    )


def deep_kernel(root: Path) -> None:
    (root / "custom_kernels" / "build").mkdir(parents=True)
    (root / "custom_kernels" / "build" / "op.run").write_text("#!/bin/sh\n")


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def rename(name: str, new: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / name).rename(root / new)

    return spoil


INIT = "    def __init__(self):\n"
RETURN = 'return {"result": {"results": results}}'
IMPORT = "import sys\n"
# name, how it is made, the file that is named, the judge's words, a word of the cure
STATIC = [
    ("nested folder", nested, "competition_submission/competition_model.py", NOT_EXIST, "cd competition_submission"),
    ("not a zip", wrong_file, NAME, UNZIP, "zip -r"),
    ("wrong zip", wrong_zip, "competition_model.py", NOT_EXIST, "qcompile package"),
    ("link that leaves", link_that_leaves, "model/passwords", UNZIP, "file itself"),
    ("path that leaves", path_that_leaves, "../outside.txt", UNZIP, "relative names"),
    ("zip bomb", bomb, "model/zeros.bin", UNZIP, "only the model"),
    ("two model files", second_model, "old/competition_model.py", NOT_EXIST, "delete or rename"),
    ("another name", rename("competition_model.py", "Competition_Model.py"), "Competition_Model.py", NOT_EXIST, "rename"),
    ("two requirements", second_requirements, "model/requirements.txt", PIP, "delete or rename"),
    ("requirements by another name", rename("requirements.txt", "pip-requirements.txt"), "pip-requirements.txt", PIP, "rename"),
    ("no dependencies", lambda r: (r / "dependencies").rename(r / "deps"), "dependencies/", PIP, "pip download"),
    ("stray file in dependencies", stray_file, "dependencies/README.md", PIP, "move it out"),
    ("missing wheel", no_wheel, "requirements.txt", PIP, "pip download 'other==2.0'"),
    ("other version", other_version, "requirements.txt", PIP, "pip download 'tinydep==1.1'"),
    ("wheel for another machine", wrong_machine, "dependencies/fast-2.0", PIP, "manylinux_2_28_aarch64"),
    ("wheel for another Python", wrong_python, "dependencies/fast-2.0", PIP, "--python-version 3.9"),
    ("missing only on Python 3.9", needed_only_there, "dependencies/", PIP, "add its wheel"),
    ("what the image has", in_the_image, "requirements.txt", PIP, "take the line out"),
    ("absolute path", edit("self.forms", "self.at = '/home/ma-user/work/model'\n        self.forms"), "competition_model.py:8", INFERENCE, "./model"),
    ("hub id", edit("self.forms", "self.model = 'Qwen/Qwen2.5-3B'\n        self.forms"), "competition_model.py:8", INFERENCE, "./Qwen2.5-3B"),
    ("folder without a slash", bare_folder, "competition_model.py:8", INFERENCE, "./model"),
    ("download", edit(IMPORT, IMPORT + "from modelscope import snapshot_download\nsnapshot_download('Qwen/x')\n"), "competition_model.py:5", INFERENCE, "no network"),
    ("root needed", edit(IMPORT, IMPORT + "import os\nos.system('sudo apt install x')\n"), "competition_model.py:5", INFERENCE, "no root"),
    ("class by another name", edit("class Competition", "class Infer"), "competition_model.py", INFERENCE, "Competition"),
    ("constructor with arguments", edit("def __init__(self)", "def __init__(self, path)"), "competition_model.py:7", INFERENCE, "default"),
    ("method by another name", edit("def get_results", "def infer"), "competition_model.py:6", INFERENCE, "get_results"),
    ("newer syntax", edit(INIT, INIT + "        match 1:\n            case _: pass\n"), "competition_model.py:10", INFERENCE, "3.9"),
    ("newer annotation", edit("(self, jsondata_list)", "(self, jsondata_list) -> dict | None"), "competition_model.py:11", INFERENCE, "Optional"),
    ("newer annotation of a field", edit("    def __init__", "    x: int | None = None\n\n    def __init__"), "competition_model.py:7", INFERENCE, "Optional"),
    ("newer module", edit(IMPORT, IMPORT + "import tomllib\n"), "competition_model.py:4", INFERENCE, "3.9"),
    ("newer function", edit(IMPORT, IMPORT + "from itertools import pairwise\n"), "competition_model.py:4", INFERENCE, "3.9"),
    ("newer argument", edit("self.forms", "list(zip('a', 'b', strict=True))\n        self.forms"), "competition_model.py:8", INFERENCE, "3.9"),
    ("newer isinstance", edit("self.forms", "isinstance(1, int | str)\n        self.forms"), "competition_model.py:8", INFERENCE, "3.9"),
    ("parameters not printed", edit("Total parameters", "Size"), "competition_model.py", INFERENCE, "Total parameters"),
    ("kernel too deep", deep_kernel, "custom_kernels/build/op.run", INFERENCE, "custom_kernels/"),
]  # fmt: skip
DYNAMIC = [
    ("network at import", edit(IMPORT, IMPORT + "import urllib.request\nurllib.request.urlopen('http://example.com', timeout=3)\n"), "competition_model.py:5", INFERENCE, "no network"),
    ("missing module", edit(IMPORT, IMPORT + "import vllm_of_ours\n"), "competition_model.py:4", INFERENCE, "requirements.txt"),
    ("missing file", edit("self.forms", "open('./model/weights.safetensors')\n        self.forms"), "competition_model.py:8", INFERENCE, "into the zip"),
    ("result is a list", edit(RETURN, "return results"), "competition_model.py", NO_SUCCESS, '"results"'),
    ("ids are numbers", edit('"id": one["id"]', '"id": len(results)'), "competition_model.py", NO_SUCCESS, "as a string"),
    ("ids are missing", edit(RETURN, RETURN.replace("results}", "results[1:]}")), "competition_model.py", NO_SUCCESS, "every question"),
    ("a list where a string belongs", edit('"content": content}', '"content": [content]}'), "competition_model.py", NO_SUCCESS, "one string"),
    ("no answer at all", edit('"content": content}', '"content": ""}'), "competition_model.py", NO_SUCCESS, "log"),
    ("not JSON", edit(RETURN, 'return {"result": {"results": results, "at": {1}}}'), "competition_model.py", NO_SUCCESS, "return {"),
    ("NaN", edit('"content": content}', '"content": content, "duration": float("nan")}'), "competition_model.py", NO_SUCCESS, "return {"),
    ("nested without end", edit(RETURN, "return '[' * 100_000"), "competition_model.py", NO_SUCCESS, "return {"),
    ("parameters that are no number", edit("{0.5:.2f}", "1.2.3"), "competition_model.py", INFERENCE, "n / 1e9"),
    ("an argument too many", edit("(self, jsondata_list)", "(self, jsondata_list, x)"), "competition_model.py", INFERENCE, "the judge calls"),
    ("too slow", edit("results = []", "import time; time.sleep(60); results = []"), "competition_model.py", TIMEOUT, "--budget"),
    ("it exits", edit("results = []", "import os; os._exit(0); results = []"), "competition_model.py", INFERENCE, "must not exit"),
    ("too large", edit("{0.5:.2f}", "{7.6:.2f}"), "competition_model.py", "", "3B or fewer"),
]  # fmt: skip


def checked(
    tmp_path: Path, spoil: Callable[[Path], object], *, is_static: bool, is_bare: bool = False, limit_s: float = 60
) -> Report:
    root = make_package(tmp_path / "root", is_bare=is_bare)
    spoil(root)
    if not (tmp_path / NAME).exists():
        make_zip(root, tmp_path / NAME)
    wheels = root / "dependencies"
    request = CheckRequest(
        tmp_path / NAME,
        wheels=wheels if wheels.is_dir() else None,
        is_offline=True,
        limit_s=limit_s,
        is_static=is_static,
    )
    return check_contest(request)


def test_nothing_is_wrong_with_the_package_itself(tmp_path: Path) -> None:
    report = checked(tmp_path, lambda root: None, is_static=False)
    assert report.findings == []
    assert report.figures["format"] == {"passed": 6, "total": 6}
    assert len(report.figures["seconds"]) == 2
    assert len(report.passed) == 8


GUARDED = """
try:
    import tomllib
except ImportError:
    tomllib = None
if sys.version_info >= (3, 10):
    from itertools import pairwise


def local():
    x: int | None = None
    return x
"""


def static(root: Path) -> None:
    edit("(self, jsondata_list):\n", "(jsondata_list):\n        self = Competition()\n")(root)
    edit("    def get_results", "    @staticmethod\n    def get_results")(root)


def for_other_machines(root: Path) -> None:
    make_wheel(root / "dependencies", "tinydep")
    (root / "requirements.txt").write_text(
        "x==1; platform_machine == 'x86_64'\ntinydep==1.0; python_version < '3.10'\n"
    )


FINE = [
    ("a long log", edit('2f}B")\n', "2f}B\")\n        print('x' * 30_000)\n")),
    ("a static method", static),
    ("any arguments", edit("(self, jsondata_list):", "(self, *given):\n        jsondata_list = given[0]")),
    ("newer, but tried", edit(IMPORT, IMPORT + GUARDED)),
    ("for other machines", for_other_machines),
    ("for other machines only", only_for_windows),
]


@pytest.mark.parametrize("spoil", [row[1] for row in FINE], ids=[row[0] for row in FINE])
def test_it_is_no_mistake(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    assert checked(tmp_path, spoil, is_static=False, is_bare=True).findings == []


@pytest.mark.parametrize(
    ("spoil", "file", "judge", "cure"), [row[1:] for row in STATIC], ids=[row[0] for row in STATIC]
)
def test_it_is_seen_without_running(
    tmp_path: Path, spoil: Callable[[Path], object], file: str, judge: str, cure: str
) -> None:
    expect(checked(tmp_path, spoil, is_static=True, is_bare=judge != PIP), file, judge, cure)
    assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize(
    ("spoil", "file", "judge", "cure"), [row[1:] for row in DYNAMIC], ids=[row[0] for row in DYNAMIC]
)
def test_it_is_seen_by_running(
    tmp_path: Path, spoil: Callable[[Path], object], file: str, judge: str, cure: str
) -> None:
    limit_s = 4 if judge == TIMEOUT else 60
    expect(checked(tmp_path, spoil, is_static=False, is_bare=True, limit_s=limit_s), file, judge, cure)


def expect(report: Report, file: str, judge: str, cure: str) -> None:
    found = [f for f in report.findings if f.file.startswith(file) and f.judge == judge and cure in f.cure]
    assert found, [str(finding) for finding in report.findings]
    assert len(report.findings) <= 2, [str(finding) for finding in report.findings]


def test_a_package_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_ZIP_BYTES", 100)
    report = checked(tmp_path, lambda root: None, is_static=True)
    assert "the judge takes 10" in report.findings[0].message
    assert report.findings[0].judge == UNZIP


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        ("--check package --cases c.jsonl --static", 2, "--static runs nothing"),
        ("--check engine --cases c.jsonl", 2, "engine is one for ModelArts, which is sent requests of its own"),
        ("--check package --cases nowhere.jsonl", 1, "nowhere.jsonl: "),
    ],
)
def test_cases_that_nobody_can_ask_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, exit_code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_package(tmp_path / "package")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "Dockerfile").touch()
    (tmp_path / "c.jsonl").write_text('{"id": "m", "type": "math", "prompt": "1 + 1?"}\n')
    monkeypatch.setattr("qcompile.package.check_contest.unpack_package", None)
    result = CliRunner().invoke(cli, ["package", *words.split()])
    assert result.exit_code == exit_code, result.output
    assert said in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18, b"x" * 1000])
def test_damaged_zips(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    report = check_contest(CheckRequest(tmp_path / NAME, is_static=True))
    assert report.findings


@pytest.mark.parametrize(
    ("names", "said", "cure"),
    [
        (["/".join(["d"] * 2000)], "1999 folders deep", "fewer"),
        (["a", "a/b"], "makes a file of its folder", "make the zip again"),
        (["a/b", "a"], "cannot be unpacked", "make the zip again"),
        (["x.txt", "./x.txt"], "twice", "make the zip again"),
        (["d/x.txt", "d//x.txt"], "twice", "make the zip again"),
        (["."], "names no file", "make the zip again"),
    ],
)
def test_names_that_are_no_places(tmp_path: Path, names: list[str], said: str, cure: str) -> None:
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    report = check_contest(CheckRequest(tmp_path / NAME, is_static=True))
    assert said in report.findings[0].message
    assert cure in report.findings[0].cure


def test_a_strangers_name_does_not_steer_the_terminal(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / NAME, "w") as archive:
        archive.writestr("../\x1b[31m\nall is well", "x")
    result = CliRunner().invoke(cli, ["package", "--check", str(tmp_path / NAME), "--static"])
    assert result.exit_code == 1
    assert "FAIL  ../\\x1b[31m\\nall is well: its path leaves" in result.stdout


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_full_disk_is_no_fault_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    root = make_package(tmp_path / "root", is_bare=True)
    package = make_zip(root, tmp_path / NAME) if is_zip else root
    monkeypatch.setattr(shutil, "copyfileobj" if is_zip else "copy2", full)
    with pytest.raises(PackageError, match=r"No space left on device; free some space there, or set TMPDIR"):
        check_contest(CheckRequest(package, is_static=True))


def test_a_folder_that_cannot_be_copied(tmp_path: Path) -> None:
    root = make_package(tmp_path / "root", is_bare=True)
    os.mkfifo(root / "model" / "pipe")
    report = check_contest(CheckRequest(root, is_static=True))
    assert [(finding.file, "named pipe" in finding.message) for finding in report.findings] == [("model/pipe", True)]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    report = check_contest(CheckRequest(tmp_path / "nothing.zip"))
    assert [finding.message for finding in report.findings] == ["there is no such file"]
