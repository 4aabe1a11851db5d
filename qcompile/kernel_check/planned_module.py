"""Facts of memory-planned IR (module.hivm.opt.mlir of bishengir-compile 1.2.0): buffers, calls, synchronisation, the chip.

The text is read line by line: there is no open reader of the `hivm` dialect. Calls are counted as they are written, not as
often as loops run them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from qcompile.errors import KernelError
from qcompile.kernels.tile_table import BUFFERS

_ELEMENT_BITS = {
    "i1": 1,
    "i4": 4,
    "i8": 8,
    "i16": 16,
    "i32": 32,
    "i64": 64,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "f64": 64,
}
_CONSTANT = re.compile(r"(%[\w-]+) = arith\.constant (-?\d+) : i64$", re.MULTILINE)
_BUFFER = re.compile(
    r"hivm\.hir\.pointer_cast\(([^)]*)\)[^:\n]*: memref<((?:\d+x)*)(\w+)(?:, strided<[^>]*>)?, #hivm\.address_space<(\w+)>>"
)
_CALL = re.compile(r"\bcall @(\w+)")
_HEADER = re.compile(r'dl_entry<"(\w+)", (\d+) : i32>')
_WORKSPACE = re.compile(r"_infer_workspace_shape_function\(\).*?arith\.constant (\d+) : index", re.DOTALL)
_SCALAR = re.compile(r"memref\.(?:load|store) .*address_space<(gm|ub)>")

_LOADS = ("load_gm", "nd2nz", "load_nz")
_STORES = ("store_ubuf_to_gm", "fixpipe", "atomic")
_CUBE = ("mma",)
_FILLS = ("set_l1",)


@dataclass(frozen=True)
class Buffer:
    """One planned buffer: its space, the address of each of its copies, and its size in bytes."""

    space: str
    addresses: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True)
class Facts:
    """What the planned IR says of a kernel.

    Attributes:
        used_bytes: Highest planned address by buffer: ub, cbuf (L1), cc (L0C); bytes.
        calls: Device library function -> times written.
        vector_calls: Calls that compute on a vector core.
        cube_calls: Calls that multiply on a cube core.
        gm_loads: Calls that move from global memory.
        gm_stores: Calls that move to global memory.
        set_flags: Events one pipe sets for another.
        wait_flags: Waits for those events.
        barriers: Barriers of a pipe.
        block_syncs: Synchronisations between cube and vector cores.
        scalar_gm: Element accesses to global memory, each a round trip when in a loop.
        scalar_ub: Element accesses to the unified buffer.
        discrete: Accesses the compiler itself marks DiscreteMemAccess: a gather, element by element.
        workspace_bytes: Global scratch memory per block.
        cores: "AIV" (vector), "AIC" (cube) or "MIX".
        chip: The target's figures as the compiler knows them: core counts, and sizes in bytes.
    """

    used_bytes: dict[str, int]
    calls: dict[str, int]
    vector_calls: int
    cube_calls: int
    gm_loads: int
    gm_stores: int
    set_flags: int
    wait_flags: int
    barriers: int
    block_syncs: int
    scalar_gm: int
    scalar_ub: int
    discrete: int
    workspace_bytes: int
    cores: str
    chip: dict[str, int]

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return dict(vars(self))


def planned_facts(text: str) -> Facts:
    """Read the facts of planned IR.

    Raises:
        KernelError: It is not the text this compiler version writes.
    """
    calls = Counter(_CALL.findall(text))
    used: dict[str, int] = {}
    for buffer in planned_buffers(text):
        if buffer.size_bytes:
            used[buffer.space] = max(used.get(buffer.space, 0), max(buffer.addresses) + buffer.size_bytes)
    loads, stores = _count(calls, _LOADS), _count(calls, _STORES)
    cube = _count(calls, _CUBE)
    scalars = Counter(_SCALAR.findall(text))
    core = re.search(r"module_core_type<(\w+)>", text)
    header = {name: int(value) for name, value in _HEADER.findall(text)}
    workspace = _WORKSPACE.search(text)
    if core is None or "UB_SIZE" not in header:
        raise KernelError("planned IR without a core type or a chip's header: not what ascendnpu-ir 1.2.0 writes")
    return Facts(
        used_bytes=used,
        calls=dict(sorted(calls.items())),
        vector_calls=calls.total() - loads - stores - cube - _count(calls, _FILLS),
        cube_calls=cube,
        gm_loads=loads,
        gm_stores=stores,
        set_flags=len(re.findall(r"hivm\.hir\.set_flag\b", text)),
        wait_flags=len(re.findall(r"hivm\.hir\.wait_flag\b", text)),
        barriers=len(re.findall(r"hivm\.hir\.pipe_barrier\b", text)),
        block_syncs=len(re.findall(r"hivm\.hir\.sync_block_(?:set|wait)\b", text)),
        scalar_gm=scalars["gm"],
        scalar_ub=scalars["ub"],
        discrete=text.count("DiscreteMemAccess"),
        workspace_bytes=int(workspace[1]) if workspace else 0,
        cores=core[1],
        chip={name: value // 8 if name.endswith("_SIZE") else value for name, value in header.items()},
    )


def planned_buffers(text: str) -> list[Buffer]:
    """List the planned buffers of all functions, in the order of the text.

    Raises:
        KernelError: An address or an element type is not a known constant.
    """
    constants = {name: int(value) for name, value in _CONSTANT.findall(text)}
    found = _BUFFER.findall(text)
    if len(found) != text.count("hivm.hir.pointer_cast("):
        raise KernelError("planned IR with a buffer of an unknown form: not what ascendnpu-ir 1.2.0 writes")
    buffers = []
    for operands, dimensions, element, space in found:
        names = [operand.strip() for operand in operands.split(",")]
        if space not in BUFFERS or element not in _ELEMENT_BITS or not all(name in constants for name in names):
            raise KernelError(f"planned IR with a buffer of an unknown form: {space}, {element}, {operands}")
        count = 1
        for dimension in filter(None, dimensions.split("x")):
            count *= int(dimension)
        size_bytes = -(-count * _ELEMENT_BITS[element] // 8)
        buffers.append(Buffer(space, tuple(constants[name] for name in names), size_bytes))
    return buffers


def _count(calls: Counter[str], prefixes: tuple[str, ...]) -> int:
    return sum(times for name, times in calls.items() if name.startswith(prefixes))
