"""The operator table: what CANN's ONNX parsers take, on which chip, in which types, since which release.

`operators.csv` lists every registered operator; `operators.toml` says more about those a language model needs. Types are
written f16, bf16, f32, i8, i32, i64, u64, bool, ...: one spelling for ONNX, for ATC and for the device.
"""

from __future__ import annotations

import csv
import functools
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from typing import Any

from qcompile.ascend.chips import Cann, Chip, cann_version
from qcompile.ascend.plugins import PLUGINS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Support(Enum):
    """How sure it is that a release of CANN parses an operator."""

    CERTAIN = "certain"
    LIKELY = "likely"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: As the kernel calls it.
        dtypes: Types it takes; empty when not checked.
        is_float: Whether it has the node's one float type (``T`` in the table).
        is_optional: Whether it may be left out.
    """

    name: str
    dtypes: frozenset[str] = frozenset()
    is_float: bool = False
    is_optional: bool = False

    def takes(self, dtype: str, floats: frozenset[str]) -> bool:
        """Return whether a type is taken, given the float types of the node's chip."""
        if self.is_float:
            return dtype in floats
        return not self.dtypes or dtype in self.dtypes


@dataclass(frozen=True)
class AttributeRule:
    """One attribute: its kind (int, float, string), and what values are taken."""

    name: str
    kind: str
    required: bool = False
    allowed: tuple[int | str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None


@dataclass(frozen=True)
class Registration:
    """Opsets of one domain under which a parser is registered."""

    first: int
    last: int
    missing: frozenset[int] = frozenset()

    def holds(self, opset: int) -> bool:
        """Return whether a node of that opset is parsed."""
        return self.first <= opset <= self.last and opset not in self.missing

    def __str__(self) -> str:
        gaps = f" without {', '.join(str(v) for v in sorted(self.missing))}" if self.missing else ""
        return f"{self.first} to {self.last}{gaps}"


@dataclass(frozen=True)
class Operator:
    """One operator of the parsers.

    Attributes:
        name: ONNX op type.
        ge_ops: What the parser makes of it.
        registrations: By ONNX domain ("" is the default domain).
        inputs: In order; empty when only the ONNX schema says.
        outputs: In order.
        attributes: What the parser reads.
        combinations: Input types that have a kernel together; empty when any mixture has.
        floats: By chip family; a family that is missing has no kernel. None when the table does not say.
        certain: First release in which the parser is known to be.
        likely: First release in which it is believed to be.
        avoid: Why a node that parses must still not be used, or "".
    """

    name: str
    ge_ops: tuple[str, ...]
    registrations: Mapping[str, Registration]
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    attributes: tuple[AttributeRule, ...] = ()
    combinations: frozenset[tuple[str, ...]] = frozenset()
    floats: Mapping[str, frozenset[str]] | None = None
    certain: Cann = field(default=Cann(8, 0))
    likely: Cann = field(default=Cann(8, 0))
    avoid: str = ""

    @property
    def is_detailed(self) -> bool:
        """Whether inputs, chips and attributes are known beyond the ONNX schema."""
        return self.floats is not None

    @property
    def min_inputs(self) -> int:
        """Number of inputs up to the last one that must be there."""
        return max((i + 1 for i, port in enumerate(self.inputs) if not port.is_optional), default=0)

    def support(self, cann: Cann) -> Support:
        """Return how sure it is that this release parses the operator."""
        if cann >= self.certain:
            return Support.CERTAIN
        return Support.LIKELY if cann >= self.likely else Support.UNKNOWN

    def floats_on(self, chip: Chip) -> frozenset[str]:
        """Return the float types its kernel computes in on a chip; empty when there is no kernel."""
        if self.floats is None:
            return chip.floats
        return self.floats.get(chip.family, frozenset())

    def runs_on(self, chip: Chip, dtype: str, cann: Cann, *, opset: int = 16, domain: str = "") -> bool:
        """Return whether a lowering may emit it: parsed (at least likely), with a kernel in that float type."""
        registration = self.registrations.get(domain)
        return (
            registration is not None
            and registration.holds(opset)
            and not self.avoid
            and dtype in self.floats_on(chip)
            and self.support(cann) is not Support.UNKNOWN
        )


@dataclass(frozen=True)
class OperatorTable:
    """Every operator by name, and what to write instead of those no parser takes."""

    operators: Mapping[str, Operator]
    absent: Mapping[str, str]

    def get(self, name: str) -> Operator | None:
        """Return an operator, or None when no parser takes that op type in any domain."""
        return self.operators.get(name)

    def __iter__(self) -> Iterator[Operator]:
        return iter(self.operators.values())


@functools.cache
def operator_table(plugins: frozenset[str] = frozenset()) -> OperatorTable:
    """Read the tables shipped with the package.

    Args:
        plugins: Parser plugins whose operators are there too; see `qcompile.ascend.plugins`.
    """
    folder = resources.files("qcompile.ascend")
    detailed = tomllib.loads(folder.joinpath("operators.toml").read_text(encoding="utf-8"))
    plain = csv.DictReader(io.StringIO(folder.joinpath("operators.csv").read_text(encoding="utf-8")))
    kernels = frozenset(detailed["float_kernels"]["operators"])
    operators = _plain_operators(plain, kernels)
    operators.update((name, _built_in(name)) for name in ("Constant",))
    operators.update((record["name"], _detailed_operator(record)) for record in detailed["operator"])
    if plugins:
        known = {PLUGINS[name] for name in plugins}
        more = tomllib.loads(folder.joinpath("plugin_operators.toml").read_text(encoding="utf-8"))
        operators.update((r["name"], _detailed_operator(r)) for r in more["operator"] if r["name"] in known)
    absent = {name: cure for name, cure in detailed["absent"].items() if name not in operators}
    for name, op_type in PLUGINS.items():
        if op_type not in operators:
            cure = absent.get(op_type, "no parser of CANN's own takes it")
            absent[op_type] = f"{cure}; or install kernels/plugins where ATC runs, and say --plugins {name}"
    return OperatorTable(operators, absent)


def _plain_operators(rows: csv.DictReader[str], float_kernels: frozenset[str]) -> dict[str, Operator]:
    merged: dict[str, Operator] = {}
    for row in rows:
        missing = frozenset(int(v) for v in row["missing_opsets"].split())
        registration = Registration(int(row["opset_min"]), int(row["opset_max"]), missing)
        known = merged.get(row["op"])
        registrations = {**(known.registrations if known else {}), row["domain"]: registration}
        ports = tuple(_port(text) for text in row["ports_910b"].split("; ") if text)
        if row["op"] in float_kernels and not ports:
            ports = (Port("x", frozenset({"f16", "bf16", "f32", "i8", "i32"})),) * 2 + (Port("y"),)
        merged[row["op"]] = Operator(
            row["op"], tuple(row["ge_ops"].split("+")), registrations, inputs=ports[:-1], outputs=ports[-1:]
        )
    return merged


def _built_in(name: str) -> Operator:
    """Return an operator the parser itself takes, without a plugin."""
    return Operator(name, (name,), {"": Registration(1, 99)})


def _detailed_operator(record: dict[str, Any]) -> Operator:
    missing = frozenset(record.get("missing", ()))
    avoid = record.get("use", "")
    return Operator(
        name=record["name"],
        ge_ops=(record["ge"],),
        registrations={
            domain: Registration(first, last, frozenset() if domain else missing)
            for domain, (first, last) in record["domains"].items()
        },
        inputs=tuple(_port(text) for text in record["inputs"]),
        outputs=tuple(_port(text) for text in record["outputs"]),
        attributes=tuple(
            AttributeRule(**{**rule, "allowed": tuple(rule.get("allowed", ()))})
            for rule in record.get("attributes", ())
        ),
        combinations=frozenset(tuple(text.split()) for text in record.get("combinations", ())),
        floats={family: frozenset(text.split()) for family, text in record["float"].items()},
        certain=cann_version(record["certain"]),
        likely=cann_version(record["likely"]),
        avoid=avoid.removeprefix("avoid:").strip(),
    )


def _port(text: str) -> Port:
    name, _, types = text.partition(":")
    if types == "T":
        return Port(name.rstrip("?"), is_float=True, is_optional=name.endswith("?"))
    dtypes = frozenset() if types == "*" else frozenset(types.split())
    return Port(name.rstrip("?"), dtypes, is_optional=name.endswith("?"))
