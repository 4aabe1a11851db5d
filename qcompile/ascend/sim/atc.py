"""A stand-in for CANN's atc: same flags, log lines and exit codes; it checks the graph and writes a simulated .om.

    python -m qcompile.ascend.sim.atc --framework=5 --model=m.onnx --output=m --soc_version=Ascend910B4 ...

It compiles nothing: the file holds the lowered graph and says `simulated` where CANN's release stands. What `qcompile check`
finds, it refuses with the code ATC would give. QCOMPILE_SIMULATED_CANN is the release whose rules hold (8.1).
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompile.ascend.atc_options import options_of
from qcompile.ascend.chips import cann_version, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.legality.finding import Effect, Finding
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.shapes import Shape, parse_input_shapes
from qcompile.ascend.sim.gears import Dims, GearError, gears_of
from qcompile.ascend.sim.model_file import compile_graph
from qcompile.errors import QCompileError

RELEASE_VARIABLE = "QCOMPILE_SIMULATED_CANN"
_DEFAULT_RELEASE = "8.1"
_FAILED = 255
_BEGIN = "ATC start working now, please wait for a moment."
_SUCCESS = "ATC run success, welcome to the next use."
_FAILURE = "ATC run failed, Please check the detail log, Try 'atc --help' for more information"
_ONNX = "5"
_LOG_LEVELS = {"null", "debug", "info", "warning", "error"}
# What is honoured, and what only says how a real compiler would work.
_HONOURED = {
    "mode", "framework", "model", "output", "soc_version", "input_format", "input_shape", "precision_mode",
    "precision_mode_v2", "op_precision_mode", "external_weight", "host_env_os", "host_env_cpu", "log",
    "dynamic_batch_size", "dynamic_image_size", "dynamic_dims",
}  # fmt: skip
_IGNORED = {
    "op_select_implmode", "optypelist_for_implmode", "modify_mixlist", "keep_dtype", "customize_dtypes", "deterministic",
    "is_weight_clip", "fusion_switch_file", "optimization_switch", "oo_level", "enable_single_stream", "buffer_optimize",
    "disable_reuse_memory", "tiling_schedule_optimize", "jit_compile", "op_compiler_cache_mode", "op_compiler_cache_dir",
    "debug_dir", "op_debug_level", "check_report", "display_model_info", "output_type", "out_nodes", "aicore_num",
    "virtual_type", "core_type", "input_shape_range", "allow_hf32", "quant_dumpable",
}  # fmt: skip


@dataclass
class AtcError(Exception):
    """A failure as ATC reports one: code and line."""

    code: str
    line: str


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit code."""
    sys.stdout.write(f"{_BEGIN}\n")
    try:
        warnings = _compile(arguments)
    except AtcError as error:
        stamp = time.strftime("%Y-%m-%d-%H:%M:%S.000.000")
        sys.stdout.write(f"{_FAILURE}\n{error.code}: [PID: {os.getpid()}] {stamp} {error.line}\n")
        return _FAILED
    for warning in warnings:
        sys.stdout.write(f"{warning}\n")
    sys.stdout.write(f"{_SUCCESS}\n")
    return 0


def _compile(arguments: Sequence[str]) -> list[str]:
    flags = _flags(arguments)
    _require(flags)
    model = Path(flags["model"])
    if not model.is_file():
        raise AtcError("E10410", f"Cfg file {model} does not exist.")
    try:
        chip = chip_named(flags["soc_version"])
    except QCompileError as error:
        raise AtcError(
            "E10001", f"Value [{flags['soc_version']}] for parameter [--soc_version] is invalid. Reason: {error}"
        ) from None
    shapes, gears = _require_inputs(flags, model)
    warnings = _check(flags, model, chip.name)
    output = Path(f"{flags['output']}.om")
    try:
        command = shlex.join(["atc", *arguments])
        outside = flags.get("external_weight", "0") != "0"
        compile_graph(model, output, chip.name, command, outside=outside, shapes=shapes, gears=gears)
    except (QCompileError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AtcError("E13004", f"Failed to write file[{output}]: {reason}") from None
    return warnings


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    for argument in arguments:
        name, separator, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--") or not separator or name not in _HONOURED | _IGNORED:
            raise AtcError("E10001", f"unknown command line flag '{name}'")
        flags[name] = value
    return flags


def _require(flags: Mapping[str, str]) -> None:
    """What ATC says of the flags alone."""
    for name in ("framework", "model", "output"):
        if name not in flags:
            raise AtcError("E10007", f"[--{name}] is required. The value must be set.")
    if not flags.get("soc_version"):
        raise AtcError("E10054", "The value of required parameter [--soc_version] is empty.")
    if flags.get("mode", "0") != "0" or flags["framework"] != _ONNX:
        raise AtcError("E10001", "the simulated compiler takes --mode=0 and --framework=5 (ONNX) only")
    if flags.get("log", "null") not in _LOG_LEVELS:
        raise AtcError("E10010", f"Value [{flags['log']}] for parameter [--log] is invalid.")
    if "precision_mode" in flags and "precision_mode_v2" in flags:
        raise AtcError("E10047", "[--precision_mode] and [--precision_mode_v2] cannot be configured together.")


def _require_inputs(flags: Mapping[str, str], model: Path) -> tuple[dict[str, Shape], tuple[tuple[Dims, ...], ...]]:
    """Check the shapes that are given; returns those of the inputs, and of all inputs in every gear."""
    try:
        view = GraphView(read_onnx(model))
    except QCompileError as error:
        raise AtcError("E16004", f"The model {model} has no graph: {error}") from None
    known: dict[str, Shape] = {value.name: value.shape or () for value in view.inputs}
    for name, shape in parse_input_shapes(flags.get("input_shape", "")).items():
        if name not in known:
            raise AtcError(
                "E10016",
                f"Opname {name} specified in --input_shape is not found in the model. Confirm whether this node name "
                "exists, or the node is not split with the specified delimiter ';'.",
            )
        known[name] = shape
    try:
        gears = gears_of(flags, list(known.values()))
    except GearError as error:
        raise AtcError(*error.args) from None
    for name, shape in known.items():
        if not gears and any(size is None for size in shape):
            raise AtcError("E10011", f"Shape of input {name} is invalid: a dimension is not a positive number.")
    return known, gears


def _check(flags: Mapping[str, str], model: Path, soc_version: str) -> list[str]:
    """Refuse what ATC would refuse; returns its warnings."""
    release = cann_version(os.environ.get(RELEASE_VARIABLE) or _DEFAULT_RELEASE)
    options = options_of([f"--{name}={value}" for name, value in flags.items()])
    try:
        report = check_model(model, chip_named(soc_version), release, options)
    except QCompileError as error:
        raise AtcError("E13003", f"Failed to read file: {error}") from None
    refused = [finding for finding in report.findings if finding.effect is Effect.REFUSED and finding.certain]
    if refused:
        first = refused[0]
        raise AtcError(first.code or "E19999", _line(first))
    slow = [finding for finding in report.findings if finding.effect is Effect.SLOW]
    return [f"W11001: Op [{f.node}] does not hit the high-priority operator information library" for f in slow]


def _line(finding: Finding) -> str:
    """The line of ATC for the codes that name a node, in its words."""
    if finding.code in {"E16002", "E19010"}:
        return f"No ONNX parser is registered for optype ai.onnx::16::{finding.op}."
    if finding.code.startswith("EZ300"):
        return f"No supported Ops kernel and engine are found for [{finding.node}], optype [{finding.op}]."
    return f"node [{finding.node}]: {finding.seen}; wanted: {finding.wanted}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
