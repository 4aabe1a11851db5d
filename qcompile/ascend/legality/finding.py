"""What `qcompile check` reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class Effect(Enum):
    """What comes of the node if nothing is done."""

    REFUSED = "refused"  # ATC stops with the code
    WRONG = "wrong"  # ATC compiles it, the result is not the graph's
    SLOW = "slow"  # it runs, on the AI CPU or with a copy that can be avoided


@dataclass(frozen=True)
class Finding:
    """One thing ATC or the chip would not do as the graph means it.

    Attributes:
        rule: Name of the rule, such as ``op-unregistered``.
        code: The error code ATC would give, or "" where it says nothing.
        effect: What comes of it.
        certain: Whether it was seen in CANN's sources or on a device with this release, or is only likely.
        node: Node (or input, or initializer) it is about; "" for the whole model.
        op: Its op type, or "".
        layer: The layer of the source model it comes from, or "".
        seen: What the graph has.
        wanted: What ATC takes.
        cure: What to do.
    """

    rule: str
    code: str
    effect: Effect
    certain: bool
    node: str
    op: str
    layer: str
    seen: str
    wanted: str
    cure: str

    @property
    def stops(self) -> bool:
        """Whether the graph cannot be used as it is."""
        return self.effect is not Effect.SLOW

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "effect": self.effect.value}


@dataclass(frozen=True)
class Report:
    """The outcome for one graph.

    Attributes:
        graph: The file.
        soc_version: Chip it was checked for.
        cann: Release whose rules were used.
        findings: In the order of the graph.
        warnings: What limits the verdict: an unknown release, operators only likely to be registered.
        num_nodes: Nodes looked at, subgraphs included.
    """

    graph: str
    soc_version: str
    cann: str
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    num_nodes: int

    @property
    def is_legal(self) -> bool:
        """Whether nothing stops the graph; slow nodes do not."""
        return not any(finding.stops for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "graph": self.graph,
            "soc_version": self.soc_version,
            "cann": self.cann,
            "legal": self.is_legal,
            "nodes": self.num_nodes,
            "warnings": list(self.warnings),
            "findings": [finding.record() for finding in self.findings],
        }
