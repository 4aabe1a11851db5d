"""Read the tile tables: which tiles of a kernel fit which chip, and what each may use of its on-chip memory.

chips = ["Ascend910B4", ...]           compiler targets (of CHIPS), all of which every tile must pass; checked for no other

[[kernel]]                             one for each @triton.jit function of kernel.py
function = "add_rms_norm_kernel"
core = "vector"                        vector, cube, or mix (both)
[kernel.signature]                     every run-time argument, in the function's order: "i32", "fp32", "*T" (pointer), ...
x_ptr = "*T"
[kernel.variants]                      dtype variants: what the letters of the signature stand for
fp16 = { T = "fp16" }
[[kernel.tile]]                        smallest first: the launcher takes the first that is large enough
constants = { BLOCK_ROWS = 1, BLOCK_COLS = 1024 }   every tl.constexpr argument
variants = ["fp16"]                    of the ones above; all when absent
budget_bytes = { ub = 41984 }          most the compiler may plan, by buffer: ub, cbuf (L1), cc (L0C); a buffer left out
                                       must not be used; no limits when absent
expect = "ok"                          or "overflow": a negative test, which has no budget

A key that is not above is refused. A kernel whose core, arguments or buffers are others fails `qcompile kernels check`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qcompile.errors import KernelError
from qcompile.text_file import decode_utf8, read_bounded

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent
# as bishengir-compile 1.2.0 spells its --target; all with the same unified buffer, L1 and L0C
FAMILY_910B = ("Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1")
FAMILY_910_93 = tuple(f"Ascend910_{number}" for number in (9362, 9372, 9381, 9382, 9391, 9392))
CHIPS = (*FAMILY_910B, *FAMILY_910_93)
BUFFERS = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}  # as the compiler names them, and as people do
_CORES = ("vector", "cube", "mix")
_EXPECTED = ("ok", "overflow")
_SCALARS = frozenset(["i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp32", "fp64"])
_NAME = re.compile(r"[A-Za-z_]\w*")
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Tile:
    """One choice of compile-time constants.

    Attributes:
        constants: Name and value of every ``tl.constexpr`` argument.
        variants: Dtype variants that it is meant for.
        budget_bytes: Most bytes planned, by buffer (ub, cbuf, cc); empty when nothing is stated.
        expect: ``ok`` or ``overflow``.
    """

    constants: Mapping[str, int]
    variants: tuple[str, ...]
    budget_bytes: Mapping[str, int]
    expect: str

    @property
    def label(self) -> str:
        """The constants in one word: ``BLOCK_ROWS=4,BLOCK_COLS=1024``."""
        return ",".join(f"{name}={value}" for name, value in self.constants.items()) or "-"

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
            star, base = ("*", kind[1:]) if str(kind).startswith("*") else ("", str(kind))
            typed[name] = star + str(letters.get(base, base))
        return typed

    def cases(self) -> Iterator[tuple[Tile, str]]:
        """Every tile with every dtype variant that it is meant for."""
        for tile in self.tiles:
            for variant in tile.variants:
                yield tile, variant

    def pick(self, variant: str, exactly: Mapping[str, int] | None = None, **wanted: int) -> Tile:
        """The smallest tile whose constants are exactly, or at least, as wanted.

        Raises:
            KernelError: The table has no such tile.
        """
        exactly = exactly or {}
        fitting = [tile for tile in self.tiles if tile.expect == "ok" and variant in tile.variants]
        for tile in fitting:
            if tile.covers(wanted) and all(tile.constants[name] == value for name, value in exactly.items()):
                return tile
        there = {name: sorted({tile.constants[name] for tile in fitting}) for name in {**exactly, **wanted}}
        raise KernelError(
            f"{self.operator}: no tile for {self.chips[0]} in {variant} has { ({**exactly, **wanted}) }; the table has {there} "
            f"(kernels/{self.operator}/tiles.toml)"
        )


@cache
def tables(operator: str) -> tuple[KernelTable, ...]:
    """Read kernels/<operator>/tiles.toml."""
    return read_tables(ROOT / operator)


def table(operator: str, function: str) -> KernelTable:
    """Return the table of one @triton.jit function."""
    return next(entry for entry in tables(operator) if entry.function == function)


def read_tables(folder: Path) -> tuple[KernelTable, ...]:
    """Read the tiles.toml of an operator's folder.

    Raises:
        KernelError: It is missing or wrong; says where, what was seen and what is wanted.
    """
    path = folder / "tiles.toml"
    text = decode_utf8(read_bounded(path, _LIMIT_BYTES, "that is no tile table", KernelError), str(path), KernelError)
    try:
        parsed = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as fault:
        raise KernelError(f"{path}: not TOML: {fault}") from None
    _no_unknown(parsed, {"chips", "kernel"}, str(path), "a tile table")
    chips, kernels = parsed.get("chips"), parsed.get("kernel")
    is_known = _is_names(chips) and set(chips) <= set(CHIPS)
    _require(is_known, str(path), f"chips = {chips!r}, wanted some of {', '.join(CHIPS)}")
    _require(isinstance(kernels, list) and bool(kernels), str(path), "no [[kernel]]")
    return tuple(_kernel_table(folder.name, chips, entry, str(path)) for entry in kernels)


def _kernel_table(operator: str, chips: list[str], entry: Any, where: str) -> KernelTable:
    _require(isinstance(entry, dict), where, "a [[kernel]] is a table")
    function, core = entry.get("function"), entry.get("core")
    is_name = isinstance(function, str) and _NAME.fullmatch(function) is not None
    _require(is_name, where, f"function = {function!r}, wanted the name of a function in kernel.py")
    where = f"{where}: {function}"
    _no_unknown(entry, {"function", "core", "signature", "variants", "tile"}, where, "a kernel")
    _require(core in _CORES, where, f"core = {core!r}, wanted one of {', '.join(_CORES)}")
    signature, variants, tiles = entry.get("signature"), entry.get("variants"), entry.get("tile")
    _require(isinstance(signature, dict) and bool(signature), where, "[kernel.signature] is missing or empty")
    _require(isinstance(variants, dict) and bool(variants), where, "[kernel.variants] is missing or empty")
    _require(isinstance(tiles, list) and bool(tiles), where, "no [[kernel.tile]]")
    read = tuple(_tile(tile, tuple(variants), where) for tile in tiles)
    table = KernelTable(operator, function, core, tuple(chips), signature, variants, read)
    for variant, letters in variants.items():
        _require(isinstance(letters, dict), where, f'variant {variant} = {letters!r}, wanted {{ T = "fp16" }}')
        for name, kind in table.typed_signature(variant).items():
            known = kind.removeprefix("*") in _SCALARS
            _require(
                known, where, f"{name} is '{kind}' in variant {variant}; wanted {', '.join(sorted(_SCALARS))}, or *"
            )
    return table


def _tile(tile: Any, variants: tuple[str, ...], where: str) -> Tile:
    _require(isinstance(tile, dict), where, "a [[kernel.tile]] is a table")
    _no_unknown(tile, {"constants", "variants", "budget_bytes", "expect"}, where, "a tile")
    constants, budget = tile.get("constants"), tile.get("budget_bytes", {})
    wanted, expect = tile.get("variants", list(variants)), tile.get("expect")
    is_numbers = isinstance(constants, dict) and all(type(value) is int for value in constants.values())
    _require(is_numbers, where, f"constants = {constants!r}, wanted whole numbers by name")
    where = f"{where} {constants}"
    _require(expect in _EXPECTED, where, f"expect = {expect!r}, wanted one of {', '.join(_EXPECTED)}")
    is_known = _is_names(wanted) and set(wanted) <= set(variants)
    _require(is_known, where, f"variants = {wanted!r}, wanted some of {', '.join(variants)}")
    is_budget = isinstance(budget, dict) and all(b in BUFFERS and type(n) is int and n > 0 for b, n in budget.items())
    _require(is_budget, where, f"budget_bytes = {budget!r}, wanted bytes of {', '.join(BUFFERS)}")
    _require(
        expect == "ok" or not budget, where, "expect = 'overflow' with budget_bytes; what must overflow has no budget"
    )
    return Tile(constants, tuple(wanted), budget, expect)


def _no_unknown(entry: Mapping[str, Any], known: set[str], where: str, what: str) -> None:
    unknown = sorted(set(entry) - known)
    _require(not unknown, where, f"{what} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")


def _is_names(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)


def _require(condition: bool, where: str, message: str) -> None:
    if not condition:
        raise KernelError(f"{where}: {message}")
