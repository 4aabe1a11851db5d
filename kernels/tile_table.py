"""Read the tile tables: which tiles of a kernel fit which chip, and what each may use of its on-chip memory.

chips = ["Ascend910B4", ...]           compiler targets with the same buffers, all of which every tile must pass

[[kernel]]                             one for each @triton.jit function of kernel.py
function = "add_rms_norm_kernel"
core = "vector"                        vector, cube, or mix (both)
[kernel.signature]                     every run-time argument in order: "i32", "fp32", "*T" (pointer), ...
x_ptr = "*T"
[kernel.variants]                      dtype variants: what the letters of the signature stand for
fp16 = { T = "fp16" }
[[kernel.tile]]                        smallest first: the launcher takes the first that is large enough
constants = { BLOCK_ROWS = 1, BLOCK_COLS = 1024 }   every tl.constexpr argument
variants = ["fp16"]                    of the ones above; all when absent
budget_bytes = { ub = 41984 }          most the compiler may plan, by buffer: ub, cbuf (L1), cc (L0C)
expect = "ok"                          or "overflow": a negative test, which has no budget
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qcompile.errors import KernelError

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """One choice of compile-time constants.

    Attributes:
        constants: Name and value of every ``tl.constexpr`` argument.
        variants: Dtype variants that it is meant for.
        budget_bytes: Most bytes planned, by buffer (ub, cbuf, cc).
        expect: ``ok`` or ``overflow``.
    """

    constants: Mapping[str, int]
    variants: tuple[str, ...]
    budget_bytes: Mapping[str, int]
    expect: str

    def covers(self, wanted: Mapping[str, int]) -> bool:
        """Whether each named constant is at least as large as wanted."""
        return all(self.constants[name] >= value for name, value in wanted.items())


@dataclass(frozen=True)
class KernelTable:
    """The tiles of one @triton.jit function."""

    operator: str
    function: str
    core: str
    chips: tuple[str, ...]
    signature: Mapping[str, str]
    variants: Mapping[str, Mapping[str, str]]
    tiles: tuple[Tile, ...] = field(repr=False)

    def typed_signature(self, variant: str) -> dict[str, str]:
        """The signature as Triton's compiler takes it, with the variant's dtypes filled in."""
        letters = self.variants[variant]
        typed = {}
        for name, kind in self.signature.items():
            star = "*" if kind.startswith("*") else ""
            base = kind.removeprefix("*")
            typed[name] = star + letters.get(base, base)
        return typed

    def cases(self) -> Iterator[tuple[Tile, str]]:
        """Every tile with every dtype variant that it is meant for."""
        for tile in self.tiles:
            for variant in tile.variants:
                yield tile, variant

    def pick(self, variant: str, **wanted: int) -> Tile:
        """The smallest tile whose constants are at least as large as wanted.

        Raises:
            KernelError: The table has no such tile.
        """
        fitting = [tile for tile in self.tiles if tile.expect == "ok" and variant in tile.variants]
        for tile in fitting:
            if tile.covers(wanted):
                return tile
        largest = {name: max((t.constants[name] for t in fitting), default=0) for name in wanted}
        raise KernelError(
            f"{self.operator}: no tile for {self.chips[0]} in {variant} has {wanted}; the largest is {largest} "
            f"(kernels/{self.operator}/tiles.toml)"
        )


@cache
def tables(operator: str) -> tuple[KernelTable, ...]:
    """Read kernels/<operator>/tiles.toml."""
    parsed = tomllib.loads((ROOT / operator / "tiles.toml").read_text(encoding="utf-8"))
    return tuple(_kernel_table(operator, parsed["chips"], entry) for entry in parsed["kernel"])


def table(operator: str, function: str) -> KernelTable:
    """Return the table of one @triton.jit function."""
    return next(entry for entry in tables(operator) if entry.function == function)


def _kernel_table(operator: str, chips: list[str], entry: Mapping[str, Any]) -> KernelTable:
    variants = entry["variants"]
    return KernelTable(
        operator=operator,
        function=entry["function"],
        core=entry["core"],
        chips=tuple(chips),
        signature=entry["signature"],
        variants=variants,
        tiles=tuple(
            Tile(tile["constants"], tuple(tile.get("variants", variants)), tile.get("budget_bytes", {}), tile["expect"])
            for tile in entry["tile"]
        ),
    )
