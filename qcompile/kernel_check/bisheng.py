"""Run bishengir-compile on linalg for a chip, up to the memory-planned IR, and read what it says.

It always wants to hand over to `hivmc`, which is closed: a good compilation therefore ends with exit code 1, the planned IR
written, and no complaint but the missing hivmc. A real fault writes no planned IR.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import KernelError
from qcompile.kernel_check.environment import KernelsEnv
from qcompile.kernel_check.lowering import end_group
from qcompile.kernels.tile_table import BUFFERS

# the options triton-ascend's own driver passes
_OPTIONS = (
    "--enable-auto-multi-buffer=true",
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
_MIX_MODE = re.compile(
    r', mix_mode\s*=\s*"[^"]*"'
)  # an attribute the compiler does not take; that driver strips it too
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")
_EXPECTED_ERROR = re.compile(r"hivmc|Failed to run BiShengIR pipeline")
_SUMMARY = re.compile(r"Failed to run|ended with signal")
_PLANNED = "module.hivm.opt.mlir"


@dataclass(frozen=True)
class Overflow:
    """A buffer that is too small: its space and bytes."""

    space: str
    needed_bytes: int
    available_bytes: int

    def __str__(self) -> str:
        return f"{BUFFERS.get(self.space, self.space)} needs {self.needed_bytes} bytes, has {self.available_bytes}"


@dataclass(frozen=True)
class Compiled:
    """What the compiler did.

    Attributes:
        planned: Text of the memory-planned IR; "" when it got no further than an error.
        overflow: What did not fit, when that was the error.
        errors: Its error lines, without those about the missing hivmc.
        notes: Its [NOTE] lines: what it changed on its own.
    """

    planned: str
    overflow: Overflow | None
    errors: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Ok, overflow or compiler."""
        if self.planned and not self.errors:
            return "ok"
        return "overflow" if self.overflow is not None and not self.planned else "compiler"

    @property
    def lost_double_buffering(self) -> bool:
        """Whether it silently fell back to one buffer per load and store, so that transfers no longer hide."""
        return any("multi-buffer" in note and "false" in note for note in self.notes)


def compile_linalg(linalg: str, chip: str, env: KernelsEnv, time_limit_s: float = 120) -> Compiled:
    """Compile the adapter's linalg for a chip as far as the open compiler goes.

    Raises:
        KernelError: The compiler cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.mlir")
        source.write_text(_MIX_MODE.sub("", linalg), encoding="utf-8")
        command = [str(env.compiler), str(source), f"--target={chip}", *_OPTIONS]
        command += [f"--save-temps={folder}/steps", "-o", f"{folder}/kernel"]
        log = _run(command, folder, time_limit_s)
        planned = Path(folder, "steps", _PLANNED)
        text = planned.read_text(encoding="utf-8") if planned.is_file() else ""
        return read_log(log.replace(folder, "."), text)


def _run(command: list[str], folder: str, time_limit_s: float) -> str:
    # neither the hivmc of an installed CANN, nor a stub, is called: the verdict is the same on every machine
    environ = {key: value for key, value in os.environ.items() if key != "BISHENG_INSTALL_PATH"} | {"PATH": folder}
    try:
        child = subprocess.Popen(
            command,
            env=environ,
            cwd=folder,
            text=True,
            errors="replace",
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as fault:
        raise KernelError(f"{command[0]}: cannot be started: {fault.strerror}") from None
    try:
        log, _ = child.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        return f"error: not done after {time_limit_s:g} s"
    finally:
        end_group(child)
    return log if child.returncode >= 0 else f"{log}\nerror: the compiler ended with signal {-child.returncode}"


def read_log(log: str, planned: str) -> Compiled:
    """Judge a compilation by its log and the planned IR it wrote."""
    lines = [line.strip() for line in log.splitlines()]
    errors = [line for line in lines if re.search(r"\berror\b|\[ERROR\]", line, re.IGNORECASE)]
    errors = [line for line in errors if not _EXPECTED_ERROR.search(line)]
    errors.sort(key=lambda line: _SUMMARY.search(line) is not None)  # the reason first, then that a step failed
    if not planned and not errors:
        errors = ["no planned IR was written and no reason given: " + (lines[-1] if lines else "no output")]
    found = _OVERFLOW.search(log)
    overflow = None
    if found:
        overflow = Overflow(found[1], int(found[2]) // 8, int(found[3]) // 8)
    notes = tuple(dict.fromkeys(line for line in lines if line.startswith("[NOTE]")))
    return Compiled(planned, overflow, tuple(dict.fromkeys(errors)), notes)
