"""The custom operator's sources against what can be checked without CANN: tiles, arguments, and one run on stand-ins."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qcompile.errors import KernelError
from qcompile.kernel_check.bisheng import compile_linalg
from qcompile.kernel_check.environment import find_environment
from qcompile.kernel_check.lowering import Job, lower
from qcompile.kernels.tile_table import ROOT, table

FOLDER = ROOT / "plugins/custom_op"
HERE = Path(__file__).parent
SOURCE = (FOLDER / "add_rms_norm_op.cc").read_text(encoding="utf-8")
KERNEL = table("add_rms_norm", "add_rms_norm_kernel")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the sources of the custom operator cannot be compiled")
    program = tmp_path_factory.mktemp("custom_op") / "drive"
    includes = ["-I", HERE / "stand_in", "-I", FOLDER, "-I", ROOT / "plugins/src"]
    sources = [FOLDER / "add_rms_norm_op.cc", FOLDER / "add_rms_norm_onnx.cc", HERE / "drive_custom_op.cc"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unused-variable"]
    done = subprocess.run(
        ["g++", *flags, *includes, *sources, "-o", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def run(driver: Path, rows: int, columns: int, folder: Path) -> list[str]:
    environ = {"QCOMPILE_NPUBIN": str(folder)}
    command = [driver, str(rows), str(columns)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_tiles_are_those_of_the_table() -> None:
    written = [(int(columns), int(rows)) for columns, rows in re.findall(r"\{(\d+), (\d+)\}", SOURCE)]
    tiles = [tile.constants for tile in KERNEL.tiles if tile.expect == "ok"]
    assert written == [(tile["BLOCK_COLS"], tile["BLOCK_ROWS"]) for tile in tiles]


def test_the_arguments_are_those_of_the_kernels_entry() -> None:
    """In order and size: three addresses, the signature, the grid; read from the planned IR, where there is a compiler."""
    try:
        environment = find_environment()
    except KernelError as missing:
        pytest.skip(str(missing))
    tile = KERNEL.tiles[0]
    source = (ROOT / "add_rms_norm/kernel.py").resolve()
    job = Job(source, KERNEL.function, KERNEL.typed_signature("fp16"), tile.constants)
    (lowered,) = lower([job], "Ascend910B4", environment)
    planned = compile_linalg(lowered.linalg, "Ascend910B4", environment).planned
    (entry,) = re.findall(rf"func\.func @{KERNEL.function}\((.*?)\) attributes", planned)
    kinds = re.findall(r"%arg\d+: (memref|i64|i32|f32)", entry)
    (struct,) = re.findall(r"struct __attribute__\(\(packed\)\) Arguments \{(.*?)\};", SOURCE, re.DOTALL)
    fields = re.findall(r"^  (?:const )?(void \*|int32_t |float )(\w+)", struct, re.MULTILINE)
    sizes = {"memref": "void *", "i64": "void *", "i32": "int32_t ", "f32": "float "}
    assert [sizes[kind] for kind in kinds] == [kind for kind, _ in fields]
    assert [name for _, name in fields[-3:]] == ["grid_x", "grid_y", "grid_z"]
    named = [
        name.removesuffix("_ptr").replace("n_rows", "num_rows").replace("n_cols", "num_columns")
        for name in KERNEL.signature
    ]
    assert [name for _, name in fields[3:-3]] == [name.replace("eps", "epsilon") for name in named]


def test_a_binary_goes_through_the_om_and_is_launched(driver: Path, tmp_path: Path) -> None:
    (tmp_path / "add_rms_norm_kernel.fp16.1024.npubin").write_text("DEVICE CODE")
    lines = run(driver, 10, 896, tmp_path)  # 10 rows in tiles of 4
    launched = "launch blocks=3 size=96 pointers 1111 0 0 a0 a1 a2 b0 b1 numbers 10 896 896 896 0.25 3 1 1"
    assert lines == [
        "compile ok serialize ok",
        "load DEVICE CODE",
        "function add_rms_norm_kernel",
        launched,
        "execute ok",
        launched,
        "execute ok",
        "unload",
    ]


def test_there_are_no_more_programs_than_cores(driver: Path, tmp_path: Path) -> None:
    (tmp_path / "add_rms_norm_kernel.fp16.4096.npubin").write_text("DEVICE CODE")
    assert any(line.startswith("launch blocks=40 ") for line in run(driver, 1000, 3584, tmp_path))


@pytest.mark.parametrize(("columns", "name"), [(896, ""), (9000, "add_rms_norm_kernel.fp16.8192.npubin")])
def test_a_missing_binary_or_a_row_too_long_is_refused(driver: Path, tmp_path: Path, columns: int, name: str) -> None:
    if name:
        (tmp_path / name).write_text("DEVICE CODE")
    assert run(driver, 4, columns, tmp_path) == ["compile failed serialize failed"]
