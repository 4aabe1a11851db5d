"""What the check says of kernels that are wrong in one way each."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from qcompile.kernel_check.check import Result, cases, check
from qcompile.kernel_check.environment import KernelsEnv
from qcompile.kernel_check.operators import read_operators
from qcompile.kernels.tile_table import CHIPS

OneKernel = Callable[..., Path]
TWO_POINTERS = """p = x_ptr
    for i in range(n):
        if tl.load(p) > 0:
            p = o_ptr
    tl.store(o_ptr + o, tl.load(p + o))"""
COPY = "tl.store(o_ptr + o, tl.load(x_ptr + o, mask=o < n), mask=o < n)"


def results_of(folder: Path, environment: KernelsEnv, time_limit_s: float = 120) -> dict[str, Result]:
    wanted = cases(read_operators(folder), ("Ascend910B4",))
    return {r.case.operator.name: r for r in check(wanted, environment, time_limit_s=time_limit_s)}


@pytest.mark.parametrize(
    ("body", "verdict", "reason"),
    [
        (
            "tl.store(o_ptr + o, nonsense(o))",
            "frontend",
            r"^bad/kernel.py:7: k: NameError\('nonsense is not defined'\)$",
        ),
        ("tl.store(o_ptr + o, tl.load(x_ptr + o).to(tl.float64))", "compiler", "unsupported datatype"),
        (TWO_POINTERS, "adapter", "triton-adapter-opt crashed"),
    ],
)
def test_the_stage_that_refuses_is_named(
    one_kernel: OneKernel, environment: KernelsEnv, body: str, verdict: str, reason: str
) -> None:
    result = results_of(one_kernel("bad", body), environment)["bad"]
    assert (result.verdict, result.facts, result.is_expected) == (verdict, None, False)
    assert re.search(reason, result.reason), result.reason
    assert "\n" not in result.reason


def test_an_overflow_tells_the_bytes(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    result = results_of(one_kernel("big", COPY, "BLOCK = 131072"), environment)["big"]
    assert result.verdict == "overflow"
    assert result.overflow is not None
    assert (result.overflow.space, result.overflow.available_bytes) == ("ub", 196608)
    assert result.overflow.needed_bytes >= 131072 * 2
    assert result.reason == f"UB needs {result.overflow.needed_bytes} bytes, has 196608"


def test_lost_double_buffering_is_told(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    body = (
        "for t in range(tl.program_id(0), n, tl.num_programs(0)):\n"
        "        tl.store(o_ptr + t * BLOCK + o, tl.exp(tl.load(x_ptr + t * BLOCK + o).to(tl.float32)).to(tl.float16))"
    )
    folder = one_kernel("roomy", body, "BLOCK = 2048")
    one_kernel("tight", body, "BLOCK = 32768")
    results = results_of(folder, environment)
    assert (results["roomy"].verdict, results["roomy"].lost_double_buffering) == ("ok", False)
    assert (results["tight"].verdict, results["tight"].lost_double_buffering) == ("ok", True)


def test_access_element_by_element_is_counted(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    folder = one_kernel("whole", COPY)
    one_kernel("gather", "tl.store(o_ptr + o, tl.load(x_ptr + o % 7 * 3))")
    one_kernel("scatter", "tl.store(o_ptr + (o ^ 3), tl.load(x_ptr + o))")
    facts = {name: result.facts for name, result in results_of(folder, environment).items()}
    assert all(found is not None for found in facts.values())
    assert [facts["whole"].scalar_gm, facts["whole"].discrete, facts["whole"].gm_loads] == [0, 0, 1]
    assert facts["gather"].scalar_gm == 1
    assert facts["gather"].gm_loads == 0
    assert facts["scatter"].discrete > 0


def test_a_crash_or_a_hang_costs_its_own_kernel_only(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    folder = one_kernel("a_good", COPY)
    one_kernel("b_crash", COPY, head="import os\nos.abort()")
    one_kernel("c_good", COPY)
    one_kernel(
        "d_exit", COPY, head="import sys\nsys.stderr.write('enough')\nsys.stderr.flush()\nimport os\nos._exit(3)"
    )
    one_kernel("e_good", COPY)
    one_kernel("f_hang", COPY, head="import time\ntime.sleep(999)")
    one_kernel("g_noisy", COPY, head="print('hello')")
    results = results_of(folder, environment, time_limit_s=8)
    verdicts = {name: result.verdict for name, result in results.items()}
    bad = {"b_crash", "d_exit", "f_hang"}
    assert verdicts == {name: "frontend" if name in bad else "ok" for name in verdicts}
    assert "ended with signal 6" in results["b_crash"].reason
    assert "ended with exit code 3: enough" in results["d_exit"].reason
    assert "not done after 8 s" in results["f_hang"].reason


def test_a_stated_budget_is_kept_to(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    folder = one_kernel("small", COPY, more="budget_bytes = { ub = 2048 }")
    assert results_of(folder, environment)["small"].is_expected
    one_kernel("over", COPY, more="budget_bytes = { ub = 1024 }")
    over = results_of(folder, environment)["over"]
    assert (over.verdict, over.over_budget, over.is_expected) == ("ok", {"ub": (2048, 1024)}, False)
    one_kernel("unstated", COPY, more="budget_bytes = { cbuf = 1024 }")
    unstated = results_of(folder, environment)["unstated"]
    assert (unstated.verdict, unstated.over_budget, unstated.is_expected) == ("ok", {"ub": (2048, 0)}, False)


def test_the_stated_core_is_kept_to(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    folder = one_kernel("fits", COPY)
    table = folder / "fits" / "tiles.toml"
    table.write_text(table.read_text().replace('core = "vector"', 'core = "cube"'))
    result = results_of(folder, environment)["fits"]
    assert (result.verdict, result.other_core, result.is_expected) == ("ok", "vector", False)


def test_a_tile_that_should_overflow_and_does_not_is_unexpected(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    folder = one_kernel("fits", COPY)
    table = folder / "fits" / "tiles.toml"
    table.write_text(table.read_text().replace('expect = "ok"', 'expect = "overflow"'))
    assert not results_of(folder, environment)["fits"].is_expected


@pytest.mark.usefixtures("environment")
def test_the_command(one_kernel: OneKernel) -> None:
    folder = one_kernel("fine", COPY)
    good = CliRunner().invoke(cli, ["kernels", "check", "--kernels", str(folder)])
    assert good.exit_code == 0, good.output
    assert "20 cube and 40 vector cores; UB 196608 bytes, L1 524288 bytes, L0C 131072 bytes" in good.output
    assert "all 1 are what the tile tables say" in good.output
    assert "nothing was run on a device" in good.output
    one_kernel("wrong", "tl.store(o_ptr + o, nonsense(o))")
    bad = CliRunner().invoke(cli, ["kernels", "check", "--kernels", str(folder), "--chip", "ascend910b1", "--json"])
    assert bad.exit_code == 1
    record = json.loads(bad.stdout)
    assert [(r["operator"], r["verdict"], r["is_expected"]) for r in record["results"]] == [
        ("fine", "ok", True),
        ("wrong", "frontend", False),
    ]
    assert record["expected"] is False
    assert record["results"][0]["facts"]["chip"]["VECTOR_CORE_COUNT"] == 48
    one = CliRunner().invoke(cli, ["kernels", "check", "fine", "--kernels", str(folder), "--types", "fp16"])
    assert one.exit_code == 0


def test_the_chips_are_those_the_compiler_names(environment: KernelsEnv) -> None:
    said = subprocess.run([str(environment.compiler), "--help"], capture_output=True, text=True, check=False).stdout
    named = re.findall(r"^\s+=(Ascend910B\S+|Ascend910_93\d\d)\s", said, re.MULTILINE)
    assert sorted(CHIPS) == sorted(named)


def test_every_chip_is_compiled_for(one_kernel: OneKernel, environment: KernelsEnv) -> None:
    results = check(cases(read_operators(one_kernel("fine", COPY)), CHIPS), environment)
    assert [r.case.chip for r in results] == list(CHIPS)
    assert {r.verdict for r in results} == {"ok"}
    cores = {r.case.chip: r.facts.chip["VECTOR_CORE_COUNT"] for r in results if r.facts is not None}
    assert (cores["Ascend910B1"], cores["Ascend910B4"]) == (48, 40)
