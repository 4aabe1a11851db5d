"""What can be told to the quantization passes; one spelling on the command line, in a recipe and in Python.

    --group-size 64 --asymmetric --layer '*down_proj*:bits=8'                   command line
    [quantize]                                                                  TOML
    group_size = 64
    symmetric = false
    [[quantize.layer]]
    pattern = "*down_proj*"
    bits = 8
    QuantizeOptions(group_size=64, symmetric=False, layers=(LayerOptions("*down_proj*", bits=8),))      Python

A value that is not given is the pass's own. A pattern is a shell pattern over the names of a projection: its node's, its
weight's, and for some places `lm_head`, `embed_tokens`, `o_proj` (what follows attention) or `down_proj` (what follows the
activation of a feed-forward). The last layer entry that matches wins. 8-bit weights have no zero points: bits = 8 without a
word on symmetric ends what a more general entry said of it. So do int8 activations with the size of groups: their weights
have one scale per output. Other bits than a pass's own end its own size of groups.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from qcompile.errors import QuantError
from qcompile.quant.algorithms import ALGORITHMS, NEEDS_HESSIAN

Activations = Literal["float", "dynamic", "static", "norm"]
GroupSize = int | Literal["channel"]
ACTIVATIONS: tuple[Activations, ...] = ("float", "dynamic", "static", "norm")
# Blocks that MatMulNBits takes, and the Ascend NPU too from 32 on.
GROUP_SIZES = (16, 32, 64, 128, 256)
_DEFAULT_GROUPS: dict[tuple[str, int], GroupSize] = {("float", 8): 128, ("float", 4): 32}


@dataclass(frozen=True)
class LinearScheme:
    """What becomes of one Linear, or of the embedding table.

    Attributes:
        bits: Of a weight: 4 or 8.
        group_size: Weights of a row that share a scale; "channel" for all of them.
        symmetric: Whether there are no zero points.
        activations: ``float``: x stays as it is. ``dynamic``: int8, one scale per token. ``static``: int8, one
            calibrated scale. ``norm``: int8, one known scale where x is a norm of a rotated residual stream
            (`qcompile.passes.unit_norm`), elsewhere as ``dynamic``, or ``static`` for targets without scales per token.
        algorithm: How codes are chosen, see `qcompile.quant.algorithms`.

    Raises:
        QuantError: The values do not go together.
    """

    bits: int
    group_size: GroupSize
    symmetric: bool
    activations: Activations
    algorithm: str

    def __post_init__(self) -> None:
        refusal = self._refusal()
        if refusal:
            raise QuantError(refusal)

    def _refusal(self) -> str:
        if self.bits not in (4, 8):
            return f"bits = {self.bits}: weights of 4 or 8 bits are supported"
        if self.activations not in ACTIVATIONS:
            return f"activations = {self.activations!r}: wanted one of {', '.join(ACTIVATIONS)}"
        if self.algorithm not in ALGORITHMS:
            return f"algorithm = {self.algorithm!r}: wanted one of {', '.join(ALGORITHMS)}"
        if self.group_size != "channel" and self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            return f"group_size = {self.group_size}: wanted one of {sizes}, or channel"
        if self.activations != "float" and (self.bits, self.group_size, self.symmetric) != (8, "channel", True):
            seen = f"bits = {self.bits}, group_size = {self.group_size}, symmetric = {str(self.symmetric).lower()}"
            return (
                f"int8 activations take weights of bits = 8, group_size = channel, symmetric = true, not {seen}; "
                "give layers that shall differ activations = float"
            )
        if self.bits == 8 and not self.symmetric:
            return "8-bit weights are symmetric: zero points gain nothing at 8 bits; drop symmetric = false"
        return ""


@dataclass(frozen=True)
class LayerOptions:
    """What some layers get instead; None leaves a value as it is for the others.

    Attributes:
        pattern: Shell pattern over the names of a projection.
        bits: See `LinearScheme`, like the rest.
        group_size: See there.
        symmetric: See there.
        activations: See there.
        algorithm: See there.
    """

    pattern: str
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Activations | None = None
    algorithm: str | None = None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any of the names fits the pattern."""
        return any(fnmatch.fnmatchcase(name, self.pattern) for name in names)

    def given(self) -> dict[str, Any]:
        """Return the values that are not None, without the pattern."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "pattern")
        return {name: value for name, value in pairs if value is not None}


@dataclass(frozen=True)
class QuantizeOptions:
    """Changes to what the quantization passes do by themselves.

    Attributes:
        bits: See `LinearScheme`, like the next four.
        group_size: See there.
        symmetric: See there.
        activations: See there.
        algorithm: See there.
        keep_float: Patterns of layers that stay float.
        layers: Values for some layers only; the last entry that matches wins, value by value.
        calibration: Text to calibrate on, for algorithms and activations that need it: a file, ``builtin``, or ``self``
            for what the model writes.
        quality: Choose the scheme of every layer, so that the mean KL per token on the calibration text stays below.
        size: Choose the scheme of every layer, so that all weights together take no more megabytes (10^6 bytes).
    """

    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    activations: Activations | None = None
    algorithm: str | None = None
    keep_float: tuple[str, ...] = ()
    layers: tuple[LayerOptions, ...] = ()
    calibration: str = "builtin"
    quality: float | None = None
    size: float | None = None

    def scheme_for(self, names: Sequence[str], defaults: Sequence[LayerOptions]) -> LinearScheme | None:
        """Return what becomes of a projection, or None when it stays float.

        Args:
            names: What the projection is called.
            defaults: The pass's own values, general ones first.

        Raises:
            QuantError: The values for it do not go together.
        """
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep_float for name in names):
            return None
        values: dict[str, Any] = {"algorithm": "rtn"}
        everywhere = LayerOptions("*", self.bits, self.group_size, self.symmetric, self.activations, self.algorithm)
        for layer in (*defaults, everywhere, *self.layers):
            if layer.matches(names):
                given = layer.given()
                if given.get("bits") == 8 and values.get("symmetric") is False:
                    del values["symmetric"]  # said of weights of 4 bits
                if given.get("activations", "float") != "float":
                    values.pop("group_size", None)  # said of weights that are multiplied by floats
                values |= given
        own_bits = [layer.bits for layer in defaults if layer.bits is not None and layer.matches(names)]
        if own_bits and values["bits"] != own_bits[-1] and not self.asks_group_size(names):
            values.pop("group_size", None)  # the pass said it of its own bits
        kind = (values["activations"], values["bits"])
        values.setdefault("group_size", _DEFAULT_GROUPS.get(kind, "channel"))
        values.setdefault("symmetric", kind != ("float", 4))
        try:
            return LinearScheme(**values)
        except QuantError as error:
            raise QuantError(f"{names[0]}: {error}") from None

    @property
    def needs_hessian(self) -> bool:
        """Whether an algorithm that was asked for looks at second moments of activations."""
        return any(name in NEEDS_HESSIAN for name in (self.algorithm, *(layer.algorithm for layer in self.layers)))

    def asks_group_size(self, names: Sequence[str]) -> bool:
        """Whether the group size of a projection was given, and is not the pass's own choice."""
        return self.group_size is not None or any(
            layer.group_size is not None for layer in self.layers if layer.matches(names)
        )

    def unused_patterns(self, names: Iterable[Sequence[str]]) -> list[str]:
        """Return the patterns that no projection fits: most likely misspelled."""
        flat = [name for group in names for name in group]
        patterns = [*self.keep_float, *(layer.pattern for layer in self.layers)]
        return [pattern for pattern in patterns if not LayerOptions(pattern).matches(flat)]


def options_from(record: Any, where: str) -> QuantizeOptions:
    """Return the options of a recipe's [quantize] table.

    Args:
        record: What TOML gave.
        where: Name of the file, for messages.

    Raises:
        QuantError: A key is unknown, or a value is of the wrong type.
    """
    if not isinstance(record, dict):
        raise QuantError(f"{where}: [quantize] is not a table")
    record = dict(record)
    layers = record.pop("layer", [])
    if not isinstance(layers, list):
        raise QuantError(f"{where}: quantize.layer is not a list of tables; write [[quantize.layer]]")
    values = {key: _checked(key, value, QuantizeOptions, f"{where}: [quantize]") for key, value in record.items()}
    return QuantizeOptions(
        layers=tuple(_layer_from(layer, f"{where}: [[quantize.layer]]") for layer in layers), **values
    )


def parse_layer(text: str) -> LayerOptions:
    """Read `PATTERN:key=value,key=value`, as --layer has it.

    Raises:
        QuantError: It is not of that form, a key is unknown, or a value does not fit.
    """
    pattern, colon, rest = text.rpartition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not colon or not pattern or not all(key.strip() and equals for key, equals, _ in pairs):
        raise QuantError(f"--layer '{text}': wanted PATTERN:key=value,key=value, such as '*down_proj*:bits=8'")
    record = {key.strip().replace("-", "_"): _parsed(value.strip()) for key, _, value in pairs}
    if len(record) < len(pairs):
        raise QuantError(f"--layer '{text}': a key is there twice; keep one value of each")
    return _layer_from({"pattern": pattern, **record}, f"--layer '{text}'")


def override(options: QuantizeOptions, **given: Any) -> QuantizeOptions:
    """Return options in which given values (None and empty ones are not given) replace those of before."""
    return replace(options, **{key: value for key, value in given.items() if value is not None and value != ()})


def parse_group_size(text: str, where: str = "--group-size") -> GroupSize:
    """Read a group size: a number, or `channel`.

    Raises:
        QuantError: It is neither.
    """
    value = _parsed(text)
    if value == "channel" or (isinstance(value, int) and not isinstance(value, bool)):
        return value  # type: ignore[no-any-return]
    raise QuantError(f"{where}: group_size = {text!r}; wanted a number or channel")


def _layer_from(record: Any, where: str) -> LayerOptions:
    if not isinstance(record, dict) or not isinstance(record.get("pattern"), str):
        raise QuantError(f"{where}: wanted a table with a pattern")
    values = {key: _checked(key, value, LayerOptions, where) for key, value in record.items()}
    layer = LayerOptions(**values)
    if not layer.given():
        raise QuantError(f"{where}: pattern '{layer.pattern}' changes nothing; give bits, group_size, …")
    return layer


def _checked(key: str, value: Any, kind: type, where: str) -> Any:
    """Return a value of the right type for a key, or raise QuantError."""
    known = [f.name for f in fields(kind) if f.name != "layers"]
    if key not in known:
        raise QuantError(f"{where}: unknown key '{key}'; there are: {', '.join(known)}")
    if key == "keep_float":
        if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
            raise QuantError(f"{where}: keep_float = {value!r}; wanted a list of patterns")
        return tuple(value)
    if key == "group_size":
        return parse_group_size(str(value), where)
    wanted = {"bits": int, "symmetric": bool, "quality": float, "size": float}.get(key, str)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise QuantError(f"{where}: {key} = {value!r}; wanted {_TYPE_NAMES[wanted]}")
    return value


_TYPE_NAMES = {int: "a number", float: "a number", bool: "true or false", str: "a text"}


def _parsed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdecimal() else text
