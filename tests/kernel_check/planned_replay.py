"""Level 4: the memory-planned IR of a vector kernel, run on this CPU with every buffer at its planned address.

The unified buffer is one array of 192 KiB, poisoned with 0xFF before each program and lying between guard bands. Pipes run in
program order, so a plan that only races (two pipes on one buffer, a missing event) computes the right numbers here.
"""

import ctypes
import re
from typing import Any

import numpy as np

from qcompile.kernel_check.lowering import Job
from tests.kernel_check import x86
from tests.kernel_check.stand_in import POISON, StandIn

UB_BYTES = 196608
UB_GUARD_BYTES = 1 << 16
_ORDERING = ("hivm.hir.set_flag", "hivm.hir.wait_flag", "hivm.hir.pipe_barrier", "hivm.hir.set_mask_norm")
_BUFFER = re.compile(r"\s*(%\w+) = hivm\.hir\.pointer_cast\((%[\w-]+)\) : (memref<.*>)$")
_COLLAPSE = re.compile(
    r"(\s*)(%\w+) = (memref\.collapse_shape %\w+ \[(\[.*\])\]) : "
    r"(memref<([0-9?x]+)x\w+, strided<\[.*\](?:, offset: \S+)?>>) into (memref<[0-9?x]+x\w+, strided<\[(.*)\])(.*)$"
)


def runnable_planned(text: str, entry: str) -> str:
    """Planned IR as standard MLIR: buffers become views of an argument, synchronisation goes, library calls stay."""
    lines = []
    for line in text.splitlines():
        if not line.strip().startswith(_ORDERING):
            lines += _translated(line, entry)
    return "\n".join(lines) + "\n"


def _translated(line: str, entry: str) -> list[str]:
    line = re.sub(r", #hivm\.address_space<\w+>", "", line)
    line = re.sub(r"memref<([0-9?x]*)xi1\b", r"memref<\1xi8", line)  # packed; only the library reads masks
    stripped = line.strip()
    if stripped.startswith("module"):
        return ["module {"]
    if stripped.startswith("func.func private"):
        return [re.sub(r" attributes \{.*$", " attributes {llvm.emit_c_interface}", line)]
    if stripped.startswith("func.func"):
        line = re.sub(r" attributes \{.*\{$", " {", line)
        line = re.sub(r" \{(?:hacc|tt)\.[^}]*\}", "", line)
        named = line.replace(f"@{entry}(", f"@{entry}(%ub: memref<{UB_BYTES}xi8>, %block: i64, ")
        return [named, "    %no_offset = arith.constant 0 : i64"]
    buffer = _BUFFER.match(line)
    if buffer:
        result, address, kind = buffer.groups()
        index = f"%at_{result[1:]}"
        return [
            f"    {index} = arith.index_cast {address} : i64 to index",
            f"    {result} = memref.view %ub[{index}][] : memref<{UB_BYTES}xi8> to {kind}",
        ]
    collapse = _COLLAPSE.match(line)
    if collapse:
        return _collapsed(*collapse.groups())
    line = line.replace("hivm.hir.get_block_idx -> i64", "arith.addi %block, %no_offset : i64")
    assert "hivm.hir" not in line, f"the replay does not know {stripped}"
    return [line]


def _collapsed(
    indent: str, result: str, operation: str, groups: str, source: str, sizes: str, target: str, strides: str, rest: str
) -> list[str]:
    """A collapse whose stride this MLIR calls unknown: a group of several dimensions that ends in a dynamic one."""
    size_of = sizes.split("x")
    found = strides.split(", ")
    for index, group in enumerate(re.findall(r"\[([^\[\]]*)\]", groups)):
        dimensions = [int(dimension) for dimension in group.split(", ")]
        while len(dimensions) > 1 and size_of[dimensions[-1]] == "1":
            dimensions.pop()
        if len(dimensions) > 1 and size_of[dimensions[-1]] == "?":
            found[index] = "?"
    unknown = target.replace(f"strided<[{strides}]", f"strided<[{', '.join(found)}]")
    between = f"{result}_unknown"
    return [
        f"{indent}{between} = {operation} : {source} into {unknown}{rest}",
        f"{indent}{result} = memref.cast {between} : {unknown}{rest} to {target}{rest}",
    ]


class PlannedStandIn(StandIn):
    """Level 4 in the place of a kernel; `mutated` changes the plan first."""

    def mutated(self, planned: str) -> str:
        """The plan to replay."""
        return planned

    def execute(self, job: Job, grid: tuple[int, ...], arguments: list[Any]) -> None:
        _, planned = self.store.texts(job)
        text = runnable_planned(self.mutated(planned), job.function)
        function = self.library("planned", text, (), "device_library.c")
        for program in range(grid[0]):
            memory = np.full(UB_BYTES + 2 * UB_GUARD_BYTES, POISON, dtype=np.uint8)
            start = memory.ctypes.data + UB_GUARD_BYTES
            head = [*x86.memref(start, UB_BYTES), ctypes.c_int64(program)]
            head += [ctypes.c_int64(0), *x86.memref(0, 0), *x86.memref(0, 0)]  # ffts address, lock, workspace
            function(*head, *arguments, *(ctypes.c_int32(size) for size in [*grid, 1, 1][:3]))
            guards = (memory[:UB_GUARD_BYTES], memory[-UB_GUARD_BYTES:])
            assert all((guard == POISON).all() for guard in guards), "the plan writes outside the unified buffer"
