"""The command line of ATC for one graph: our choice of flags, the user's on top, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompile.ascend.chips import Chip
from qcompile.ascend.legality.rule import PRECISION_MODES, AtcOptions
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.shapes import Shape, format_input_shapes, parse_input_shapes
from qcompile.errors import AtcError

_FLAG = re.compile(r"--?([a-z0-9_\-]+)(?:=(.*))?", re.DOTALL)
_QUANT = frozenset({"AscendQuant", "AscendDequant"})
_GEARS = ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims")
_OURS = frozenset({"mode", "framework", "model", "output", "soc_version", "weight", "host_env_cpu"})
_OPTIONS = {"soc_version": "--soc-version", "host_env_cpu": "--host-cpu"}
_LOG_LEVELS = frozenset({"null", "debug", "info", "warning", "error"})
# Weights beyond this go beside the .om: partitions end at 4 GiB, and buckets share the files.
_MAX_INSIDE_BYTES = 2 << 30
_NAMED_OPEN = 3


@dataclass(frozen=True)
class Invocation:
    """How ATC is to be called for all graphs of a build.

    Attributes:
        chip: Target.
        host_cpu: aarch64 or x86_64: where the .om will be loaded.
        shares_weights: Whether several graphs use the same weights.
        extra: Further flags of the user, without dashes.
    """

    chip: Chip
    host_cpu: str
    shares_weights: bool
    extra: Mapping[str, str]


def parse_extra_flags(words: Sequence[str]) -> dict[str, str]:
    """Read what stands after `--` on our command line: `--log=debug` or `--log debug`.

    Raises:
        AtcError: A word is no flag, a flag has no value, or it is one that qcompile sets itself.
    """
    flags: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        match = _FLAG.fullmatch(word)
        if match is None:
            raise AtcError(f"'{word}' is no flag of ATC; write --name=value behind the --")
        name, value = match.group(1), match.group(2)
        if value is None:
            if not rest or rest[0].startswith("--"):
                raise AtcError(f"--{name} has no value; write --{name}=value")
            value = rest.pop(0)
        if name in _OURS:
            cure = f"{_OPTIONS[name]} is an option of qcompile" if name in _OPTIONS else "qcompile sets it"
            raise AtcError(f"--{name} cannot be given behind the --: {cure}")
        if name in flags:
            raise AtcError(f"--{name} is given twice")
        flags[name] = value
    return flags


def compose(view: GraphView, model: str, output: str, invocation: Invocation) -> list[str]:
    """Return the arguments of ATC for one graph.

    Args:
        view: The graph.
        model: Its file, as ATC is to open it.
        output: The .om without its ending.
        invocation: What holds for all graphs.

    Raises:
        AtcError: The flags exclude each other, or the graph needs shapes that nobody gave.
    """
    extra = dict(invocation.extra)
    flags = {
        "mode": "0",
        "framework": "5",
        "model": model,
        "output": output,
        "soc_version": invocation.chip.name,
        "input_format": "ND",
        "input_shape": format_input_shapes({value.name: value.shape or () for value in view.inputs}),
        **_precision(view, extra),
        "external_weight": "1" if _is_outside(view, invocation) else "0",
        "host_env_os": "linux",
        "host_env_cpu": invocation.host_cpu,
        "log": "error",
    }
    if "input_shape" in extra:
        if "~" in extra["input_shape"] and any(name in extra for name in _GEARS):
            raise AtcError("ranges (~) in --input_shape and gears exclude each other (E10040); write -1")
        given = parse_input_shapes(extra["input_shape"])
        known: dict[str, Shape] = {value.name: value.shape or () for value in view.inputs}
        extra["input_shape"] = format_input_shapes({**known, **given})
    flags.update(extra)
    _validate(flags, view, invocation.chip)
    return [f"--{name}={value}" for name, value in flags.items()]


def options_of(arguments: Sequence[str]) -> AtcOptions:
    """Return what the legality check needs to know of a command line."""
    flags = dict(argument[2:].split("=", 1) for argument in arguments)
    return AtcOptions(
        precision_mode=flags.get("precision_mode", ""),
        precision_mode_v2=flags.get("precision_mode_v2", ""),
        op_precision_mode=flags.get("op_precision_mode", ""),
        input_shapes=parse_input_shapes(flags.get("input_shape", "")),
        dynamic_dims=flags.get("dynamic_dims", ""),
        dynamic_batch_size=flags.get("dynamic_batch_size", ""),
    )


def weight_bytes(view: GraphView) -> int:
    """Return the size of all initializers; nothing is read."""
    total = 0
    for value in view.values.values():
        if value.tensor is not None and value.shape is not None:
            total += tensor_bytes(value.shape, value.dtype)
    return total


def tensor_bytes(shape: Shape, dtype: str | None) -> int:
    """Return the size of a tensor; open dimensions count once, unknown types as 4 bytes."""
    bits = {"i4": 4, "u4": 4, "bool": 8}.get(dtype or "", 0) or int(
        "".join(c for c in dtype or "" if c.isdigit()) or 32
    )
    count = 1
    for dim in shape:
        count *= dim if dim is not None else 1
    return (count * min(bits, 128) + 7) // 8


def _is_outside(view: GraphView, invocation: Invocation) -> bool:
    return invocation.shares_weights or weight_bytes(view) > _MAX_INSIDE_BYTES


def _precision(view: GraphView, extra: Mapping[str, str]) -> dict[str, str]:
    """Choose the mode that leaves the graph's types alone, as far as its operators allow."""
    if "precision_mode" in extra or "precision_mode_v2" in extra:
        return {}
    if any(node.op in _QUANT for node in view.nodes):
        # the modes that keep types are excluded for these operators; this one leaves float32 norms and sums alone
        interior = (
            value for node in view.nodes for value in node.outputs if value is not None and not value.is_foldable
        )
        has_float32 = any(value.dtype == "f32" for value in interior)
        return {"precision_mode": "allow_fp32_to_fp16" if has_float32 else "force_fp16"}
    is_typed = any(value.dtype in {"f16", "bf16"} for value in view.values.values())
    return {"precision_mode": "must_keep_origin_dtype" if is_typed else "allow_fp32_to_fp16"}


def _validate(flags: Mapping[str, str], view: GraphView, chip: Chip) -> None:
    if "precision_mode" in flags and "precision_mode_v2" in flags:
        raise AtcError("--precision_mode and --precision_mode_v2 exclude each other (E10047); give one of them")
    for name, modes in PRECISION_MODES.items():
        if name in flags and flags[name] not in modes:
            raise AtcError(f"--{name}={flags[name]} is not one of {', '.join(sorted(modes))} (E10001)")
    if flags["log"] not in _LOG_LEVELS:
        raise AtcError(f"--log={flags['log']} is not one of {', '.join(sorted(_LOG_LEVELS))} (E10010)")
    if flags["external_weight"] not in {"0", "1"}:
        raise AtcError(f"--external_weight={flags['external_weight']}: qcompile keeps track of 0 and 1 only")
    gears = [name for name in _GEARS if name in flags]
    shapes = flags["input_shape"]
    if len(gears) > 1 or (gears and "input_shape_range" in flags):
        raise AtcError(f"{', '.join(f'--{name}' for name in gears)} exclude each other (E10009); keep one")
    if gears:
        _validate_gears(flags, gears[0], shapes, view)
    elif not all(size is not None for shape in parse_input_shapes(shapes).values() for size in shape):
        _refuse_open_shapes(shapes, chip)


def _validate_gears(flags: Mapping[str, str], gear: str, shapes: str, view: GraphView) -> None:
    if flags["input_format"] != "ND" and gear == "dynamic_dims":
        raise AtcError("--dynamic_dims needs --input_format=ND")
    if any(node.op in _QUANT for node in view.nodes):
        raise AtcError(f"--{gear}: a graph with AscendQuant or AscendDequant has no gears; build one .om per bucket")
    if "-1" not in shapes:
        raise AtcError(f"--{gear} without an open dimension (E10012); write -1 in --input_shape")


def _refuse_open_shapes(shapes: str, chip: Chip) -> None:
    open_ones = [part for part in shapes.split(";") if "-1" in part or "~" in part]
    more = f" and {len(open_ones) - _NAMED_OPEN} more inputs" if len(open_ones) > _NAMED_OPEN else ""
    seen = f"{'; '.join(open_ones[:_NAMED_OPEN])}{more}"
    kind = "ranges are not supported on this chip" if chip.family == "310B" else "a graph of open shapes decodes slowly"
    raise AtcError(
        f"the graph has open dimensions ({seen}) and {kind}; lower it to buckets with `qcompile optimize --target "
        f"{chip.target}`, or give sizes: qcompile atc ... -- '--input_shape=name:1,128;...'"
    )
