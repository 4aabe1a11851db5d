"""The plugin sources against what can be checked without CANN: they compile, register and parse as the tables say."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcompile.ascend.operators import operator_table
from qcompile.ascend.plugins import PLUGINS
from qcompile.kernels.tile_table import ROOT

FOLDER = ROOT / "plugins"
HERE = Path(__file__).parent
OPSETS = range(11, 19)
GE_OPS = {"NPUFusedInferAttentionScore": "PartitionedCall"}  # a subgraph with the operator in it


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugins and a driver, built against stand-ins of CANN's headers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the plugin sources cannot be compiled")
    program = tmp_path_factory.mktemp("plugins") / "drive"
    sources = [*sorted((FOLDER / "src").glob("*.cc")), HERE / "drive_plugins.cc"]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O0", "-I", HERE / "stand_in", "-I", FOLDER / "src"]
    done = subprocess.run([*command, *sources, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(driver: Path, *arguments: str) -> list[str]:
    return subprocess.run([driver, *arguments], capture_output=True, text=True, check=True).stdout.splitlines()


def parse(driver: Path, op: str, num_inputs: int, attributes: list[dict[str, object]] | None) -> list[str]:
    text = "" if attributes is None else json.dumps({"attribute": attributes})
    return [line for line in run(driver, op, str(num_inputs), text) if not line.startswith("registered")]


def test_the_names_are_those_the_compiler_writes(driver: Path) -> None:
    table = operator_table(frozenset(PLUGINS))
    wanted = set()
    for op_type in PLUGINS.values():
        operator = table.get(op_type)
        assert operator is not None
        registration = operator.registrations[""]
        assert (registration.first, registration.last) == (OPSETS[0], OPSETS[-1])
        ge_op = GE_OPS.get(op_type, operator.ge_ops[0])
        wanted |= {f"registered {ge_op} 5 ai.onnx::{opset}::{op_type}" for opset in OPSETS}
    assert set(run(driver)) == wanted


def test_no_name_is_one_that_cann_registers() -> None:
    """The parser that is found first would win, and what a node means would depend on the order of libraries."""
    assert [op for op in PLUGINS.values() if operator_table().get(op) is not None] == []


def test_every_way_the_sources_spell_a_name_agrees() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((FOLDER / "src").glob("*_plugin.cc")))
    assert sorted(re.findall(r'QCOMPILE_ORIGINS\("(\w+)"\)', sources)) == sorted(PLUGINS.values())
    script = (FOLDER / "install.sh").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^for op in (.*); do$", script, re.MULTILINE)
    assert sorted(loop.split()) == sorted(PLUGINS.values())
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, op_type in PLUGINS.items():
        assert re.search(rf"^\| {name} \| {op_type} \|", readme, re.MULTILINE)
    cmake = (FOLDER / "CMakeLists.txt").read_text(encoding="utf-8")
    assert sorted(re.findall(r"src/(\w+\.cc)", cmake)) == sorted(p.name for p in (FOLDER / "src").glob("*.cc"))


def test_what_was_not_built_says_so() -> None:
    for path in [*FOLDER.rglob("*.cc"), *FOLDER.rglob("*.h"), *FOLDER.rglob("*.sh"), *FOLDER.rglob("CMakeLists.txt")]:
        head = " ".join(path.read_text(encoding="utf-8").replace("//", " ").replace("#", " ").split())[:700].lower()
        assert "not built here" in head or "not run here" in head, path.name
    for path in FOLDER.rglob("README.md"):
        assert "Not built here, not run on a device" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("value", ["1e-05", 1e-05, "0.00001"])
def test_epsilon_is_handed_on(driver: Path, value: object) -> None:
    (line,) = parse(
        driver, "NPURmsNormEpsilon", 2, [{"name": "other", "f": 3}, {"name": "epsilon", "f": value, "type": "FLOAT"}]
    )
    assert line == "parsed NPURmsNormEpsilon ok epsilon=float:0.000010"


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("NPURmsNormEpsilon", None),
        ("NPURmsNormEpsilon", []),
        ("NPURmsNormEpsilon", [{"name": "epsilon", "f": "small"}]),
        ("NPURmsNormEpsilon", [{"name": "epsilon", "i": 1}]),
        ("NPUApplyRotaryPosEmb", [{"name": "layout", "i": 3}]),
        ("NPUFusedInferAttentionScore", [{"name": "num_heads", "i": 4}]),
    ],
)
def test_what_cannot_be_meant_is_refused(driver: Path, op: str, attributes: list[dict[str, object]] | None) -> None:
    (line,) = parse(driver, op, 3, attributes)
    assert line.startswith(f"parsed {op} failed")


def test_defaults(driver: Path) -> None:
    assert parse(driver, "NPUSwiGlu", 1, None) == ["parsed NPUSwiGlu ok dim=int:-1"]
    assert parse(driver, "NPUSwiGlu", 1, [{"name": "dim", "i": "1"}]) == ["parsed NPUSwiGlu ok dim=int:1"]
    assert parse(driver, "NPUApplyRotaryPosEmb", 4, []) == ["parsed NPUApplyRotaryPosEmb ok layout=int:1"]


@pytest.mark.parametrize("layout", ["BNSD", "BNSD_BSND"])
@pytest.mark.parametrize("is_encoded", [True, False])
@pytest.mark.parametrize("num_inputs", [3, 4])
def test_attention_becomes_a_subgraph(driver: Path, layout: str, is_encoded: bool, num_inputs: int) -> None:
    word = base64.b64encode(layout.encode()).decode() if is_encoded else layout
    numbers = {"num_heads": 14, "num_key_value_heads": 2, "sparse_mode": 0, "inner_precise": 0}
    attributes: list[dict[str, object]] = [{"name": name, "i": value} for name, value in numbers.items()]
    attributes += [{"name": "scale", "f": "0.125"}, {"name": "input_layout", "s": word}]
    parsed, graph = parse(driver, "NPUFusedInferAttentionScore", num_inputs, attributes)
    assert parsed.startswith("parsed NPUFusedInferAttentionScore ok")
    assert parsed.endswith(f"x*{num_inputs} y*1")
    assert f"graph NPUFusedInferAttentionScore ok {num_inputs} inputs FusedInferAttentionScore" in graph
    for wanted in (
        f"input_layout=string:{layout}",
        "num_heads=int:14",
        "num_key_value_heads=int:2",
        "scale=float:0.125",
        "pre_tokens=int:2147483647",
        "query<-data_0 value0<-data_2",
        "key*1 value*1",
    ):
        assert wanted in graph
    assert ("atten_mask<-data_3" in graph) == (num_inputs == 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to"], "--to wants a folder"),
        (["--to", ""], "--to wants a folder"),
        (["--to", "--remove"], "--to wants a folder, not '--remove'"),
        (["--frob"], "unknown option --frob; --help lists them"),
        ([], "ASCEND_OPP_PATH is not set"),
    ],
)
def test_the_install_script_refuses(arguments: list[str], message: str) -> None:
    environ = {"PATH": "/usr/bin:/bin"}
    command = ["bash", str(FOLDER / "install.sh"), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, message in done.stderr) == (1, True), done.stderr


def install(tools: Path, opp: Path, *arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    """Run the script, from a folder, with a cmake that copies a library."""
    names = " ".join(f"ai.onnx::16::{op}" for op in PLUGINS.values())
    tools.mkdir(exist_ok=True)
    (tools / "cmake").write_text(
        "#!/usr/bin/env bash\n"
        f'case "$1" in -S) ;; --build) echo "{names}" >"$2/libqcompile_onnx_plugin.so" ;; '
        '--install) mkdir -p "$4/framework/onnx"; cp "$2"/*.so "$4/framework/onnx" ;; esac\n'
    )
    (tools / "cmake").chmod(0o755)
    environ = {"PATH": f"{tools}:/usr/bin:/bin", "ASCEND_OPP_PATH": str(opp)}
    command = ["bash", str(FOLDER / "install.sh"), *arguments]
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=False)


def test_the_install_script_takes_a_folder_as_the_caller_means_it(tmp_path: Path) -> None:
    done = install(tmp_path / "bin", tmp_path / "opp", "--to", "mine", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/framework/onnx/libqcompile_onnx_plugin.so").is_file()
    assert not (FOLDER / "mine").exists()
    assert f"ASCEND_CUSTOM_OPP_PATH={tmp_path / 'mine'}" in done.stdout
    assert not (tmp_path / "opp").exists()


@pytest.mark.parametrize("folder", ["", "--remove"])
def test_the_install_script_installs_nowhere_else(tmp_path: Path, folder: str) -> None:
    opp = tmp_path / "opp"
    opp.mkdir()
    assert install(tmp_path / "bin", opp, "--to", folder).returncode == 1
    assert list(opp.iterdir()) == []


def test_the_install_script_removes_only_what_is_there(tmp_path: Path) -> None:
    opp = tmp_path / "opp"
    (opp / "vendors").mkdir(parents=True)
    (opp / "vendors/config.ini").write_text("load_priority=mine\n")
    done = install(tmp_path / "bin", opp, "--remove")
    assert (done.returncode, "there is nothing to remove" in done.stderr) == (1, True)
    assert (opp / "vendors/config.ini").read_text() == "load_priority=mine\n"


def test_the_install_script_has_help(tmp_path: Path) -> None:
    done = install(tmp_path / "bin", tmp_path, "--help", folder=tmp_path)
    assert (done.returncode, done.stdout.count("bash install.sh")) == (0, 3)
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize("before", [None, "load_priority=mine,other\n", "load_priority=mine,qcompile\nkeep=1\n"])
def test_the_install_script_installs_and_removes(tmp_path: Path, before: str | None) -> None:
    """What is placed where, and that other vendors stay."""
    opp = tmp_path / "opp"
    (opp / "vendors").mkdir(parents=True)
    config = opp / "vendors/config.ini"
    if before is not None:
        config.write_text(before)
    done = install(tmp_path / "bin", opp)
    assert done.returncode == 0, done.stderr
    assert (opp / "vendors/qcompile/framework/onnx/libqcompile_onnx_plugin.so").is_file()
    rest = "" if before is None else ",mine,other" if "other" in before else ",mine"
    assert f"load_priority=qcompile{rest}\n" in config.read_text()
    assert ("keep=1" in config.read_text()) == (before is not None and "keep" in before)
    done = install(tmp_path / "bin", opp, "--remove")
    assert done.returncode == 0, done.stderr
    assert not (opp / "vendors/qcompile").exists()
    assert "qcompile" not in config.read_text()
    assert ("mine" in config.read_text()) == (before is not None)
