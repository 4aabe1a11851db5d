"""`qcompile kernels bench` as far as it goes without a GPU: every case's numbers, the arithmetic of floors, the page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from qcompile.cli import kernels_bench
from qcompile.cli.main import cli
from qcompile.kernels import OPERATORS
from qcompile.kernels.bench import report, runner, timing
from qcompile.kernels.bench.cases import Setting
from qcompile.kernels.bench.shapes import MODELS, PHASES, TINY, TINY_PHASES
from qcompile.kernels.bench.timing import input_sets

pytestmark = pytest.mark.torch


def test_a_dry_run_checks_every_operator(tmp_path: Path) -> None:
    output = tmp_path / "dry.json"
    done = CliRunner().invoke(cli, ["kernels", "bench", "--dry-run", "--json", "--output", str(output)])
    assert done.exit_code == 0, done.output
    results = json.loads(output.read_text(encoding="utf-8"))
    assert {row["operator"] for row in results["kernels"]} == set(OPERATORS)
    assert all(row["is_right"] for row in results["kernels"])
    assert {result["agree"] for result in results["decode"].values()} == {1.0}
    assert not any("us" in row for row in results["kernels"]), "a dry run has no times"


def test_a_dry_run_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LIMITS", dict.fromkeys(runner.LIMITS, 1e-9))
    done = CliRunner().invoke(cli, ["kernels", "bench", "swiglu", "--dry-run", "--no-decode"])
    assert done.exit_code == 1
    assert "2 cases differ from float64: swiglu (tiny decode), swiglu (tiny prefill)" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["kernels", "bench", "--markdown", str(tmp_path / "page.md")])
    assert done.exit_code == 1
    assert "no CUDA device here; --dry-run" in done.output
    assert list(tmp_path.iterdir()) == []


COMMAND = ["kernels", "bench", "--models", "0.5B", "--phases", "decode b1", "--new-tokens", "16"]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything but the GPU and its clock, at tiny sizes; gathers the names of what would be timed."""
    pytest.importorskip("triton", reason="the page names its version")
    calls: list[str] = []

    def once(functions: dict[str, Any], sets: Any) -> dict[str, float]:
        for name, function in functions.items():
            function(*sets[0])
            calls.append(name)
        return dict.fromkeys(functions, 2.0)

    monkeypatch.setattr(kernels_bench, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(timing, "times_us", once)
    monkeypatch.setattr(timing, "input_sets", lambda size_bytes: 2)
    monkeypatch.setattr(timing, "copy_bytes_per_us", lambda: 1e6)
    monkeypatch.setattr(timing, "operations_per_us", lambda dtype: 1e6)
    monkeypatch.setitem(MODELS, "0.5B", TINY)
    monkeypatch.setitem(PHASES, "decode b1", TINY_PHASES["decode"])
    return calls


def test_a_whole_run_with_the_clock_replaced(tmp_path: Path, timed: list[str]) -> None:
    """Cases, rivals, floors, decode variants, page and JSON."""
    output, page = tmp_path / "raw.json", tmp_path / "page.md"
    done = CliRunner().invoke(cli, [*COMMAND, "--output", str(output), "--markdown", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads(output.read_text(encoding="utf-8"))
    assert {row["operator"] for row in results["kernels"]} == set(OPERATORS)
    assert all(row["is_right"] and row["fraction"] == row["floor_us"] / 2.0 for row in results["kernels"])
    assert len(timed) == sum(len(row["us"]) for row in results["kernels"])
    assert [(row["model"], row["batch"]) for row in results["decode"]] == [("0.5B", 1), ("0.5B", 16)]
    assert set(results["decode"][0]["variants"]) == {"eager", "torch.compile", "patched", "patched + graph"}
    text = page.read_text(encoding="utf-8")
    assert text.count("\n| ") >= len(results["kernels"]) + 8
    assert results["machine"]["torch"] in text


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, timed: list[str]) -> None:
    output = tmp_path / "raw.json"
    command = [*COMMAND, "--output", str(output)]
    CliRunner().invoke(cli, command, catch_exceptions=False)
    results = json.loads(output.read_text(encoding="utf-8"))
    lost = results["kernels"].pop(3)
    output.write_text(json.dumps(results), encoding="utf-8")
    timed.clear()
    CliRunner().invoke(cli, [*command, "--resume"], catch_exceptions=False)
    resumed = json.loads(output.read_text(encoding="utf-8"))
    assert len(timed) == len(lost["us"])
    assert resumed["kernels"] == [*results["kernels"], resumed["kernels"][-1]]
    assert (resumed["kernels"][-1]["operator"], resumed["kernels"][-1]["case"]) == (lost["operator"], lost["case"])
    assert len(resumed["decode"]) == 2


def test_what_cannot_be_resumed(tmp_path: Path, timed: list[str]) -> None:
    output = tmp_path / "raw.json"
    CliRunner().invoke(cli, [*COMMAND, "swiglu", "--no-decode", "--output", str(output)], catch_exceptions=False)
    other = CliRunner().invoke(cli, [*COMMAND, "--dtype", "bf16", "--output", str(output), "--resume"])
    assert other.exit_code == 1
    assert "measured with dtype fp16, this is bf16" in other.output
    output.write_text("{", encoding="utf-8")
    broken = CliRunner().invoke(cli, [*COMMAND, "--output", str(output), "--resume"])
    assert broken.exit_code == 1
    assert "nothing to resume" in broken.output
    unnamed = CliRunner().invoke(cli, [*COMMAND, "--resume"])
    assert unnamed.exit_code == 2
    assert timed.count("kernel") == 1


def test_where_it_cannot_write_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["kernels", "bench", "--dry-run", "--output", str(tmp_path / "no" / "raw.json")])
    assert done.exit_code == 1
    assert "there is no folder" in done.output
    assert "right" not in done.output


@pytest.mark.parametrize("option", ["--output", "--markdown"])
def test_a_folder_in_place_of_a_file_is_told_before_anything_is_measured(
    tmp_path: Path, timed: list[str], option: str
) -> None:
    done = CliRunner().invoke(cli, [*COMMAND, "swiglu", "--no-decode", option, str(tmp_path)])
    assert done.exit_code == 1
    assert f"{tmp_path}: is a folder; name a file in it" in done.output
    assert timed == []


@pytest.mark.parametrize(
    "option",
    [
        ["--models", "7B"],
        ["--phases", "prefill 4096"],
        ["--compile-mode", "default"],
        ["--new-tokens", "136"],
        ["--markdown", "page.md"],
        ["--resume"],
    ],
    ids=lambda option: option[0],
)
def test_what_a_dry_run_would_ignore_is_refused(option: list[str]) -> None:
    done = CliRunner().invoke(cli, ["kernels", "bench", "swiglu", "--dry-run", "--no-decode", *option])
    assert done.exit_code == 2
    assert f"leave out {option[0]}" in done.output
    assert "right" not in done.output


def test_an_unknown_operator_is_a_usage_error() -> None:
    done = CliRunner().invoke(cli, ["kernels", "bench", "softmax"])
    assert done.exit_code == 2
    assert "'softmax' is no operator" in done.output


def test_errors_are_seen() -> None:
    ones = torch.ones(100)
    assert runner.error_of(ones, ones) == 0.0
    assert runner.error_of(ones * 1.1, ones) == pytest.approx(0.1)
    assert runner.error_of(ones * float("nan"), ones) == float("inf")
    q = torch.zeros(1000, dtype=torch.int8)
    one_off, two_off, many = q.clone(), q.clone(), q.clone()
    one_off[0], two_off[0], many[:50] = 1, 2, 1
    assert runner.error_of((one_off, ones), (q, ones)) == 0.0
    assert runner.error_of((two_off, ones), (q, ones)) == float("inf")
    assert runner.error_of((many, ones), (q, ones)) == float("inf")
    assert runner.error_of(torch.tensor([3]), torch.tensor([4])) == float("inf")


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    ceilings = runner.Ceilings(copy=3.0e6, rates={"fp16": 600e6, "int8": 1200e6})  # 3 TB/s, 600 and 1200 T/s
    setting = Setting("7B", MODELS["7B"], PHASES["decode b1"], torch.device("cpu"), torch.float16)
    by_label = {(case.operator, case.label): case for case in runner.cases(setting)}
    gemv = by_label["gemv_int8", "7B decode b1, down"]
    assert ceilings.floor_us(gemv) == pytest.approx(3584 * 18944 / 3.0e6, rel=1e-2)
    large = Setting("7B", MODELS["7B"], PHASES["prefill 4096"], torch.device("cpu"), torch.float16)
    square = next(c for c in runner.cases(large) if c.operator == "matmul_int8" and "square" in c.label)
    assert ceilings.floor_us(square) == pytest.approx(2 * 4096**3 / 1200e6)


def test_bytes_are_at_least_those_of_the_arguments_and_results() -> None:
    """The least traffic: every input read once, every result written once; caches count what is touched."""
    setting = Setting("tiny", TINY, TINY_PHASES["prefill"], torch.device("cpu"), torch.float16)
    for case in runner.cases(setting):
        if case.operator in ("rope_cache", "sampler"):
            continue
        arguments = case.make()
        results = case.kernel(*arguments)
        tensors = [*arguments, *(results if isinstance(results, tuple) else (results,))]
        moved = sum(one.numel() * one.element_size() for one in tensors if isinstance(one, torch.Tensor))
        assert case.size_bytes <= moved, case.operator
        assert case.size_bytes >= 0.8 * moved, case.operator  # gamma, bias and scales are left out by some


def test_small_inputs_are_rotated_so_that_the_cache_is_not_measured() -> None:
    assert input_sets(1 << 20) == 64
    assert input_sets(64 << 20) == 4
    assert input_sets(1 << 30) == 1


def test_a_graph_holds_many_calls_or_long_ones() -> None:
    assert timing.passes(2, 100.0) == 15  # 30 calls in 1.5 ms
    assert timing.passes(1, 3.0) == 32
    assert timing.passes(5, 20.0) == 7
    assert timing.passes(64, 96.0) == 1
    assert timing.passes(1, 1600.0) == 1
    assert timing.passes(1, 0.0) == 32


def row(kernel_us: float, fraction: float, **changed: Any) -> dict[str, Any]:
    times = {"kernel": kernel_us, "eager": 30.0, "compile": 12.0, "vendor": 11.0}
    made = {"operator": "swiglu", "case": "x", "us": times, "errors": {"kernel": 1e-4}, "is_right": True}
    made |= {"floor_us": 9.0, "fraction": fraction, "vendor": "library", "vendor_computes_less": True}
    return made | {"size_bytes": 1 << 30} | changed


def test_the_page_marks_what_fell_short() -> None:
    results = {
        "machine": {"device": "example"},
        "dtype": "fp16",
        "compile_mode": "default",
        "ceilings": {"copy_gb_per_s": 1.0, "rates_t_per_s": {"fp16": 1.0}},
        "kernels": [row(10.0, 0.9), row(13.0, 0.7), row(10.0, 0.5, size_bytes=1000), row(10.0, 0.95, is_right=False)],
        "decode": [
            {
                "model": "0.5B",
                "batch": 1,
                "variants": {
                    "eager": {"tokens_per_s": 50.0, "agree": 1.0},
                    "patched": {"tokens_per_s": 100.0, "agree": 0.5},
                },
            }
        ],
    }
    page = report.markdown(results)
    assert "| **13.0** | 30.0 | 12.0 | 11.0 library* | 9.0 | **70%** |" in page
    assert "**WRONG**" in page
    assert "4 cases: 1 slower than torch.compile, 1 below their aim." in page
    assert "| 0.5B | 1 | patched | 100 | 2.00x | 50.0% |" in page


def test_the_published_page_has_no_number_that_nobody_measured() -> None:
    page = (Path(report.__file__).parents[1] / "RESULTS.md").read_text(encoding="utf-8")
    assert "Not measured yet" in page or "Ceilings measured here" in page
