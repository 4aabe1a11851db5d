"""Ways to break a memory plan on purpose, to see whether a replay notices."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from qcompile.kernel_check.planned_module import Buffer, planned_buffers
from tests.kernel_check.planned_replay import UB_BYTES

_CAST = re.compile(r"hivm\.hir\.pointer_cast\((%[\w-]+)\)")
_SIZE_BYTES = 512  # smaller buffers are scalars and scratch


@dataclass(frozen=True)
class Mutation:
    """A kind of fault, where it was put, and the plan that has it."""

    kind: str
    where: str
    text: str


def mutations(planned: str) -> Iterator[Mutation]:
    """Every mutation of a plan, kind by kind."""
    yield from _addresses(planned)
    yield from _calls(planned)


def _addresses(planned: str) -> Iterator[Mutation]:
    """Buffers at a wrong address: on another one, half on its neighbour, and beyond the end."""
    buffers = {b.addresses[0]: b for b in planned_buffers(planned) if b.size_bytes >= _SIZE_BYTES}
    spans = sorted(buffers.values(), key=lambda buffer: buffer.addresses[0])
    for one, other in pairwise(spans):
        yield from _moved(planned, "moved onto another", one, other.addresses[0])
        yield from _moved(planned, "moved onto another", other, one.addresses[0])
        yield from _moved(planned, "shifted", one, one.addresses[0] + one.size_bytes // 2)
    for one in spans:
        yield from _moved(planned, "past the end", one, UB_BYTES - one.size_bytes // 2)


def _moved(planned: str, kind: str, buffer: Buffer, address: int) -> Iterator[Mutation]:
    old = buffer.addresses[0]
    name = f"%c{old}_i64"
    if f"pointer_cast({name})" not in planned:
        return
    text = planned.replace(f"pointer_cast({name})", "pointer_cast(%mutated)")
    declared = re.search(rf"^(\s*){re.escape(name)} = arith\.constant {old} : i64$", planned, re.MULTILINE)
    assert declared is not None
    line = f"{declared[0]}\n{declared[1]}%mutated = arith.constant {address} : i64"
    yield Mutation(kind, f"{old} to {address}", text.replace(declared[0], line, 1))


def _calls(planned: str) -> Iterator[Mutation]:
    """A library call left out, and the operands of a division or subtraction the wrong way round."""
    for call in re.finditer(r"^.*\bcall @(\w+)\(.*\n", planned, re.MULTILINE):
        if not call[1].startswith("broadcast_scalar"):  # those fill what a mask leaves out anyway
            yield Mutation("call left out", call[1], planned[: call.start()] + planned[call.end() :])
        swapped = re.sub(r"\((%\w+), (%\w+), ", r"(\2, \1, ", call[0], count=1)
        if call[1].startswith(("vdiv_1d", "vdiv_2d", "vsub_1d", "vsub_2d")) and swapped != call[0]:
            yield Mutation("operands swapped", call[1], planned[: call.start()] + swapped + planned[call.end() :])
