"""Reading tile tables, the compiler's log and its planned IR: no kernels environment is needed."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.cli import kernels_check
from qcompile.cli.main import cli
from qcompile.errors import KernelError
from qcompile.kernel_check import check as check_module
from qcompile.kernel_check.bisheng import Overflow, read_log
from qcompile.kernel_check.check import Result, cases
from qcompile.kernel_check.environment import PINS, VARIABLE, KernelsEnv, find_environment
from qcompile.kernel_check.lowering import Lowered
from qcompile.kernel_check.operators import read_operators
from qcompile.kernel_check.planned_module import Buffer, planned_buffers, planned_facts
from qcompile.kernels.tile_table import CHIPS, ROOT

MISSING_HIVMC = """
[ERROR] Cannot find hivmc under $PATH
[ERROR] Failed to run `hivmc --version`.
[WARNING] Failed to detect hivmc version for backward compatibility
loc("./kernel.mlir":1:1): error: External hivmc run fails, returning module before running external compiler
[ERROR] Failed to run BiShengIR pipeline
"""
OVERFLOW = """
loc("./kernel.mlir":1:1): error: Failed to run BiShengHIR pipeline
loc("./kernel.mlir":2:3): error: ub overflow, requires 2097152 bits while 1572864 bits available! (possible reason: ...)
[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying
[ERROR] Failed to run BiShengIR pipeline
"""
PLANNED = """
module attributes {dlti.target_system_spec = #dlti.target_system_spec<"NPU" : #hacc.target_device_spec<\
#dlti.dl_entry<"VECTOR_CORE_COUNT", 40 : i32>, #dlti.dl_entry<"UB_SIZE", 1572864 : i32>>>, \
hivm.module_core_type = #hivm.module_core_type<MIX>} {
  func.func @k_infer_workspace_shape_function() -> index attributes {hacc.function_kind = #hacc.function_kind<HOST>} {
    %c524288 = arith.constant 524288 : index
    return %c524288 : index
  }
  func.func private @vadd_1d_float(memref<?xf32, #hivm.address_space<ub>>) attributes {hivm.func_core_type = 1}
  func.func @k(%arg0: i64) {
    %c0_i64 = arith.constant 0 : i64
    %c64_i64 = arith.constant 64 : i64
    %c1024_i64 = arith.constant 1024 : i64
    %0 = hivm.hir.pointer_cast(%c64_i64) : memref<10xf32, #hivm.address_space<ub>>
    %1 = hivm.hir.pointer_cast(%c0_i64, %c1024_i64) : memref<3x5xi1, strided<[5, 1]>, #hivm.address_space<ub>>
    %2 = hivm.hir.pointer_cast(%c1024_i64) : memref<0xf32, #hivm.address_space<ub>>
    %3 = hivm.hir.pointer_cast(%c0_i64) : memref<4x8x16x16xf16, #hivm.address_space<cbuf>>
    hivm.hir.set_flag[<PIPE_S>, <PIPE_V>, <EVENT_ID0>]
    hivm.hir.wait_flag[<PIPE_S>, <PIPE_V>, <EVENT_ID0>]
    hivm.hir.pipe_barrier[<PIPE_V>]
    func.call @load_gm_to_ubuf_1d_half(%0) : (memref<?xf16>) -> ()
    call @vadd_1d_float(%0) : (memref<?xf32>) -> ()
    func.call @mma_tile_half_to_float(%3) : (memref<?xf16>) -> ()
    func.call @fixpipe_nz2nd_float_to_float_4d_to_2d(%3) : (memref<?xf16>) -> ()
    %4 = memref.load %arg3[%c0] : memref<?xf16, #hivm.address_space<gm>>
    memref.store %4, %0[%c0] {DiscreteMemAccess} : memref<10xf32, #hivm.address_space<ub>>
    return
  }
}
"""


def test_a_missing_hivmc_is_no_fault() -> None:
    compiled = read_log(MISSING_HIVMC, PLANNED)
    assert (compiled.verdict, compiled.errors, compiled.lost_double_buffering) == ("ok", (), False)


def test_an_overflow_is_read_in_bytes() -> None:
    compiled = read_log(OVERFLOW, "")
    assert (compiled.verdict, compiled.overflow) == ("overflow", Overflow("ub", 262144, 196608))
    assert compiled.lost_double_buffering
    assert "ub overflow" in compiled.errors[0]


def test_an_overflow_that_a_retry_mended_is_ok() -> None:
    note = "[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying\n"
    compiled = read_log(note + MISSING_HIVMC, PLANNED)
    assert (compiled.verdict, compiled.lost_double_buffering) == ("ok", True)


@pytest.mark.parametrize(
    ("log", "planned"),
    [
        (MISSING_HIVMC + "error: something else", PLANNED),
        (MISSING_HIVMC, ""),
        ("", ""),
        ("LLVM ERROR: unsupported datatype", ""),
    ],
)
def test_anything_else_is_the_compilers_refusal(log: str, planned: str) -> None:
    compiled = read_log(log, planned)
    assert compiled.verdict == "compiler"
    assert compiled.errors


def test_facts_of_planned_ir() -> None:
    facts = planned_facts(PLANNED)
    assert facts.used_bytes == {"ub": 1024 + 2, "cbuf": 4 * 8 * 16 * 16 * 2}
    assert (facts.vector_calls, facts.cube_calls, facts.gm_loads, facts.gm_stores) == (1, 1, 1, 1)
    assert (facts.set_flags, facts.wait_flags, facts.barriers, facts.block_syncs) == (1, 1, 1, 0)
    assert (facts.scalar_gm, facts.scalar_ub, facts.discrete) == (1, 1, 1)
    assert (facts.workspace_bytes, facts.cores) == (524288, "MIX")
    assert facts.chip == {"VECTOR_CORE_COUNT": 40, "UB_SIZE": 196608}


def test_planned_ir_that_cannot_be_read_costs_its_own_kernel_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = cases(read_operators(table(tmp_path, GOOD.replace("BLOCK = 1024 }", "BLOCK = 1 }"))), ("Ascend910B4",)) * 2
    planned = iter([PLANNED.replace("module_core_type", "else"), PLANNED])
    monkeypatch.setattr(check_module, "lower", lambda jobs, *_: [Lowered("linalg")] * len(jobs))
    monkeypatch.setattr(check_module, "compile_linalg", lambda *_: read_log(MISSING_HIVMC, next(planned)))
    bad, good = check_module.check(wanted, KernelsEnv(tmp_path, tmp_path), jobs=1)
    assert (bad.verdict, good.verdict) == ("compiler", "ok")
    assert bad.reason.startswith("error: planned IR without a core type")


def test_buffers_of_planned_ir() -> None:
    assert planned_buffers(PLANNED)[1] == Buffer("ub", (0, 1024), 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        PLANNED.replace("#hivm.module_core_type<MIX>", "1"),
        PLANNED.replace("pointer_cast(%c64_i64)", "pointer_cast(%unknown)"),
        PLANNED.replace("memref<10xf32", "memref<10xf8"),
        PLANNED.replace("memref<10xf32", "memref<?xf32"),
    ],
)
def test_ir_of_another_form_is_refused_not_misread(text: str) -> None:
    with pytest.raises(KernelError, match="planned IR"):
        planned_facts(text)


GOOD = """
chips = ["Ascend910B4"]
[[kernel]]
function = "k"
core = "vector"
[kernel.signature]
x_ptr = "*T"
n = "i32"
[kernel.variants]
fp16 = { T = "fp16" }
[[kernel.tile]]
constants = { BLOCK = 1024 }
budget_bytes = { ub = 2048 }
expect = "ok"
"""


def table(tmp_path: Path, text: str) -> Path:
    folder = tmp_path / "operators" / "one"
    folder.mkdir(parents=True)
    (folder / "kernel.py").write_text("")
    (folder / "tiles.toml").write_text(text)
    return folder.parent


def test_a_table_is_read(tmp_path: Path) -> None:
    (operator,) = read_operators(table(tmp_path, GOOD))
    assert (operator.name, operator.summary) == ("one", "")
    assert operator.kernels[0].typed_signature("fp16") == {"x_ptr": "*fp16", "n": "i32"}
    assert operator.kernels[0].tiles[0].label == "BLOCK=1024"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('chips = ["Ascend910B4"]', "", "chips = None"),
        ('["Ascend910B4"]', '["Ascend310P3"]', r"chips = \['Ascend310P3'\], wanted some of Ascend910B1, "),
        ('["Ascend910B4"]', '["Ascend910B4"]\nchipz = []', "a tile table has no chipz; it has chips, kernel"),
        ("[[kernel]]", "[[kernels]]", "a tile table has no kernels"),
        ("[[kernel]]", "[[kernel]]\nexpct = 'x'", "k: a kernel has no expct; it has core, function, signature, tile,"),
        ('"k"', '"k; import os"', "function = 'k; import os'"),
        ('"vector"', '"scalar"', "core = 'scalar', wanted one of vector, cube, mix"),
        ('"i32"', '"int"', r"k: n is 'int' in variant fp16"),
        ('"*T"', '"*U"', r"x_ptr is '\*U' in variant fp16"),
        ('"*T"', "7", "x_ptr is '7'"),
        ('{ T = "fp16" }', "3", "variant fp16 = 3"),
        ("{ BLOCK = 1024 }", '{ BLOCK = "big" }', "constants = .*wanted whole numbers"),
        ("{ BLOCK = 1024 }", "{ BLOCK = true }", "constants = .*wanted whole numbers"),
        ('expect = "ok"', 'expect = "overflow"', "expect = 'overflow' with budget_bytes; what must overflow has no"),
        ("ub = 2048", "ub = -1", "budget_bytes = .*wanted bytes of ub, cbuf, cc"),
        ("ub = 2048", "l1 = 2048", "budget_bytes = "),
        ('expect = "ok"', 'expect = "fine"', "expect = 'fine', wanted one of ok, overflow"),
        ('expect = "ok"', "", "expect = None"),
        ('expect = "ok"', 'expect = "ok"\nvariants = ["bf16"]', r"variants = \['bf16'\], wanted some of fp16"),
        ('expect = "ok"', 'expect = "ok"\ntypo = 1', "a tile has no typo"),
        ("[[kernel.tile]]", "[kernel.tile]", r"no \[\[kernel.tile\]\]"),
        ("[kernel.signature]", "[kernel.signature", "not TOML"),
        (GOOD[GOOD.index("[[kernel]]") :], "", r"no \[\[kernel\]\]"),
    ],
)
def test_a_wrong_table_is_told(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(KernelError, match=message) as told:
        read_operators(table(tmp_path, GOOD.replace(old, new)))
    assert "tiles.toml" in str(told.value)


def test_a_table_is_checked_for_its_own_chips_only(tmp_path: Path) -> None:
    folder = table(tmp_path, GOOD.replace('"Ascend910B4"', '"Ascend910B1", "Ascend910B4"'))
    assert [case.chip for case in cases(read_operators(folder), CHIPS)] == ["Ascend910B1", "Ascend910B4"]
    other = CliRunner().invoke(cli, ["kernels", "check", "--kernels", str(folder), "--chip", "ascend910b2"])
    assert other.exit_code == 1
    assert "tiles.toml: chips = Ascend910B1, Ascend910B4, not Ascend910B2; add it" in other.output


def test_qcompiles_own_tables_name_every_chip() -> None:
    assert [o.name for o in read_operators() for k in o.kernels if set(k.chips) != set(CHIPS)] == []


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no operator found"):
        read_operators(tmp_path)
    folder = table(tmp_path, GOOD)
    with pytest.raises(KernelError, match=f"one: is an operator itself; give the folder that it lies in, {folder}"):
        read_operators(folder / "one")
    with pytest.raises(KernelError, match="no operator 'two'; there are one"):
        read_operators(folder, ("two",))
    (folder / "one" / "kernel.py").unlink()
    with pytest.raises(KernelError, match=r"kernel\.py is missing"):
        read_operators(folder)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["check", "--chip", "Ascend310P3"], 2, "'Ascend310P3' is no chip the compiler knows; it knows Ascend910B1"),
        (["check", "--types", "fp8"], 2, "'fp8' is no variant of these kernels"),
        (["check", "no_such_operator"], 1, "no operator 'no_such_operator'; there are add_"),
        (["list", "--kernels", "/nowhere"], 1, "no operator found"),
        (["check", "--jobs", "0"], 2, "--jobs"),
        (["frobnicate"], 2, "No such command"),
    ],
)
def test_wrong_arguments(arguments: list[str], code: int, message: str) -> None:
    result = CliRunner().invoke(cli, ["kernels", *arguments])
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_no_environment_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    result = CliRunner().invoke(cli, ["kernels", "check"])
    assert result.exit_code == 1
    assert "make kernels-env" in result.output
    assert "Traceback" not in result.output


def test_an_environment_without_the_packages_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, sys.executable)
    with pytest.raises(KernelError, match=r"triton-ascend is missing, wanted 3\.2\.0; run `make kernels-env`"):
        find_environment()


def test_the_pins_are_those_make_installs() -> None:
    text = (ROOT / "environment.txt").read_text(encoding="utf-8")
    assert PINS.items() <= dict(re.findall(r"^([\w-]+)==(\S+)", text, re.MULTILINE)).items()


def test_the_list_names_every_operator() -> None:
    result = CliRunner().invoke(cli, ["kernels", "list"])
    assert result.exit_code == 0, result.output
    assert [o.name for o in read_operators() if o.name not in result.output] == []


def test_the_list_is_whole_in_a_pipe() -> None:
    output = CliRunner().invoke(cli, ["kernels", "list"], env={"COLUMNS": "80"}).output
    row = next(line for line in output.splitlines() if "matmul_bias_residual_kernel" in line)
    assert "  fp16 bf16 fp32  " in row
    assert "BLOCK_M=16,BLOCK_N=128,BLOCK_K=128,GROUP_M=8,HAS_BIAS=1,HAS_RESIDUAL=1" in row


def test_the_checks_table_is_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tile table of GOOD under a name that rich would take for markup."""
    folder = table(tmp_path, GOOD)
    (folder / "one").rename(folder / "[red]one")
    (case,) = cases(read_operators(folder), ("Ascend910B4",))
    fits = Result(case, "ok", facts=replace(planned_facts(PLANNED), used_bytes={"ub": 165376, "cbuf": 73728}))
    big = Result(case, "overflow", overflow=Overflow("cc", 262144, 131072), errors=("error: cc overflow",))
    monkeypatch.setattr(kernels_check, "find_environment", lambda: None)
    monkeypatch.setattr(kernels_check, "check", lambda *_, **__: [fits, big])
    output = CliRunner().invoke(cli, ["kernels", "check", "--kernels", str(folder)], env={"COLUMNS": "80"}).output
    assert "[red]one: k" in output
    first, second = (line.split() for line in output.splitlines() if line.startswith(" fp16"))
    assert first[2:6] == ["ok", "165376", "73728", "-"]
    assert second[2] == "overflow"
    assert "needs 262144 bytes, has 131072" in " ".join(output.split())


def test_a_summary_is_the_first_line_of_formulas_without_their_columns(tmp_path: Path) -> None:
    folder = table(tmp_path, GOOD)
    (folder / "one" / "README.md").write_text("# one\n\n    h      = x + y   q = h / scale\n    second = 1\n")
    assert read_operators(folder)[0].summary == "h = x + y, q = h / scale"
