"""A stand-in for a @triton.jit function: launched the same way, it runs what the compiler made of it on this CPU.

Level 3 runs the adapter's linalg, level 4 the memory-planned IR. Every tensor is copied to memory of its own between guard
bands of 0xFF bytes (NaN in the float types), so that a read outside is NaN in the result and a write outside is seen.
"""

import ctypes
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qcompile.kernel_check.lowering import Job
from qcompile.kernels.tile_table import ROOT, KernelTable, table
from tests.kernel_check import x86
from tests.kernel_check.compiled import CompiledStore

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
GUARD_BYTES = 4096
POISON = 0xFF
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "fp32": ctypes.c_float,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
}


class GuardedMemory:
    """Copies of tensors' storages, each between guard bands."""

    def __init__(self) -> None:
        self.copies: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def address(self, tensor: torch.Tensor) -> int:
        """Where the tensor's first element is in the copy; tensors that share a storage share a copy."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.copies:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            copy = np.full(len(whole) + 2 * GUARD_BYTES, POISON, dtype=np.uint8)
            copy[GUARD_BYTES:-GUARD_BYTES] = whole.numpy()
            self.copies[key] = (whole, copy)
        start = self.copies[key][1].ctypes.data + GUARD_BYTES
        return start + tensor.storage_offset() * tensor.element_size()

    def write_back(self) -> None:
        """Give the tensors what was computed, after looking at the guard bands."""
        for whole, copy in self.copies.values():
            assert (copy[:GUARD_BYTES] == POISON).all(), "a kernel wrote before a tensor"
            assert (copy[-GUARD_BYTES:] == POISON).all(), "a kernel wrote past a tensor"
            whole.copy_(torch.from_numpy(copy[GUARD_BYTES:-GUARD_BYTES]))


class StandIn:
    """What `kernel[grid](...)` launches in a test."""

    def __init__(self, operator: str, function: str, store: CompiledStore) -> None:
        self.kernel: KernelTable = table(operator, function)
        self.file = (ROOT / operator / "kernel.py").resolve()
        self.store = store
        self.launches: list[Job] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **named: Any) -> None:
            names = list(self.kernel.signature)[len(arguments) :]
            arguments += tuple(named.pop(name) for name in names)
            constants = {name: value for name, value in named.items() if not name.startswith("num_")}
            job = Job(self.file, self.kernel.function, self.signature(arguments), constants)
            self.launches.append(job)
            memory = GuardedMemory()
            self.execute(job, grid, self.passed(arguments, memory))
            memory.write_back()

        return launch

    def signature(self, arguments: tuple[Any, ...]) -> dict[str, str]:
        """The types of a launch; they must be those of a variant in the tile table."""
        names = list(self.kernel.signature)
        assert len(names) == len(arguments), f"{len(arguments)} arguments for {names}"
        found = {}
        for (name, kind), value in zip(self.kernel.signature.items(), arguments, strict=True):
            found[name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else kind
        variants = [self.kernel.typed_signature(variant) for variant in self.kernel.variants]
        assert found in variants, f"{found} is no variant of {self.kernel.function}"
        return found

    def passed(self, arguments: tuple[Any, ...], memory: GuardedMemory) -> list[Any]:
        """The arguments as the C interface takes them."""
        passed: list[Any] = []
        for kind, value in zip(self.kernel.signature.values(), arguments, strict=True):
            if isinstance(value, torch.Tensor):
                passed += x86.memref(memory.address(value), max(1, value.numel()))
            else:
                passed.append(_SCALARS[kind](value))
        return passed

    def execute(self, job: Job, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Run every program of the grid, one after the other."""
        raise NotImplementedError

    def library(self, level: str, text: str, passes: tuple[str, ...], source: str) -> Any:
        """Build the text once for all processes; returns its function."""
        key = hashlib.sha256(json.dumps([level, text]).encode()).hexdigest()
        base = Path(self.store.folder, key)
        with self.store.locked(source):
            compiled = x86.compile_c(source, self.store.folder)
        with self.store.locked(key):
            done = base.with_suffix(".built")
            if not done.exists():
                x86.build(text, passes, compiled, base)
                done.touch()
        function = getattr(ctypes.CDLL(str(base.with_suffix(".so"))), self.kernel.function)
        function.restype = None
        return function


class LinalgStandIn(StandIn):
    """Level 3: the adapter's linalg, before the Ascend compiler has seen it."""

    def execute(self, job: Job, grid: tuple[int, ...], arguments: list[Any]) -> None:
        linalg, _ = self.store.texts(job)
        function = self.library("linalg", runnable_linalg(linalg), x86.BUFFERIZE, "memref_copy.c")
        lock_and_workspace = x86.memref(0, 0) * 2
        sizes = [*grid, 1, 1][:3]
        for program in range(grid[0]):
            tail = [ctypes.c_int32(value) for value in (*sizes, program, 0, 0)]
            function(*lock_and_workspace, *arguments, *tail)


_CUMSUM = re.compile(r"func\.func private (@triton_cumsum_\d+)\((tensor<(\d+)x(\w+)>), i32, i1\) -> tensor<\d+x\w+>")


def runnable_linalg(text: str) -> str:
    """The adapter's linalg with what only the Ascend compiler knows written out: the mix mode, and cumulated sums."""
    text = re.sub(r', mix_mode\s*=\s*"[^"]*"', "", text)
    return _CUMSUM.sub(
        lambda found: (
            f"""func.func private {found[1]}(%x: {found[2]}, %axis: i32, %reverse: i1) -> {found[2]} {{
    %zero = arith.constant 0 : index
    %one = arith.constant 1 : index
    %size = arith.constant {found[3]} : index
    %first = arith.constant 0.0 : {found[4]}
    %result, %last = scf.for %i = %zero to %size step %one iter_args(%into = %x, %sum = %first) -> ({found[2]}, {found[4]}) {{
      %element = tensor.extract %x[%i] : {found[2]}
      %next = arith.addf %sum, %element : {found[4]}
      %written = tensor.insert %next into %into[%i] : {found[2]}
      scf.yield %written, %next : {found[2]}, {found[4]}
    }}
    return %result : {found[2]}
  }}"""
        ),
        text,
    )
