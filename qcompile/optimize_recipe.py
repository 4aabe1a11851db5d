"""A recipe for `qcompile optimize`: a TOML file that says what the command line can say of passes and checks.

The keys are passes, skip, target, verify, strict and surgery; the table [quantize] has those of `qcompile.quantize_options`:

    passes = ["fuse", "int4"]
    [quantize]
    group_size = 64
    [ascend]
    batch = [1, 4]
    attention = "pfa"

[ascend] has batch, kv_len and prefill_len (lists), dtype, attention, plugins, top_k and keep_logits. What is read and
written (the model, its output, a report, a chart of layers) is named on the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qcompile.ascend.buckets import BucketOptions, lengths
from qcompile.ascend.lowering.lower import AscendOptions
from qcompile.ascend.plugins import parse_plugins
from qcompile.errors import PassError
from qcompile.passes.registry import GROUPS
from qcompile.pipeline import OptimizeOptions
from qcompile.quantize_options import options_from

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20
_SHAPES = {"batch": "batches", "kv_len": "kv_lens", "prefill_len": "prefill_lens"}
_ASCEND: dict[str, type] = {"dtype": str, "attention": str, "top_k": int, "keep_logits": bool, "plugins": str}
_LISTS, _TEXTS, _FLAGS = ("passes", "skip"), ("target", "verify", "surgery"), ("strict",)


def load_optimize_recipe(path: Path) -> OptimizeOptions:
    """Read a recipe.

    Raises:
        PassError: It cannot be read, is not TOML, or has a key that is unknown or of the wrong type.
        QuantError: Its [quantize] table says something that cannot be done.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PassError(f"{path}: larger than {_MAX_BYTES} bytes; this is not a recipe")
        record = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"{path}: the recipe cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PassError(f"{path}: is not TOML: {error}") from None
    quantize = options_from(record.pop("quantize", {}), str(path))
    ascend = _ascend(record.pop("ascend", {}), path)
    checked = {key: _checked(key, value, path) for key, value in record.items()}
    return OptimizeOptions(quantize=quantize, ascend=ascend, **checked)


def _ascend(table: Any, path: Path) -> AscendOptions:
    """Read the table [ascend].

    Raises:
        PassError: It has a key that is unknown or of the wrong type.
        ShapeError: A length is none.
    """
    if not isinstance(table, dict):
        raise PassError(f"{path}: ascend = {table!r}; wanted a table")
    shapes: dict[str, tuple[int, ...]] = {}
    rest: dict[str, Any] = {}
    for key, value in table.items():
        if key in _SHAPES and isinstance(value, list) and all(type(n) is int for n in value):
            shapes[_SHAPES[key]] = lengths(f"{path}: {key}", ",".join(map(str, value)))
        elif key in _ASCEND and type(value) is _ASCEND[key]:
            rest[key] = parse_plugins(str(value)) if key == "plugins" else value
        elif key in (*_SHAPES, *_ASCEND):
            raise PassError(f"{path}: [ascend] {key} = {value!r}; wanted {_wanted(key)}")
        else:
            raise PassError(f"{path}: unknown key '{key}' in [ascend]; there are: {', '.join((*_SHAPES, *_ASCEND))}")
    return AscendOptions(buckets=BucketOptions(**shapes), **rest)


def _wanted(key: str) -> str:
    return (
        "a list of whole numbers"
        if key in _SHAPES
        else {str: "a text", int: "a whole number"}.get(_ASCEND[key], "true or false")
    )


def _checked(key: str, value: Any, path: Path) -> Any:
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise PassError(f'{path}: {key} = {value!r}; wanted a list of names, such as ["fuse", "int8"]')
        if key == "passes" and not any(name.strip() for name in value):
            raise PassError(
                f"{path}: passes = {value!r} names no pass; leave it out for fuse, or name some of {', '.join(GROUPS)}"
            )
        return tuple(value)
    if key in _TEXTS and isinstance(value, str):
        return value
    if key in _FLAGS and isinstance(value, bool):
        return value
    known = (*_LISTS, *_TEXTS, *_FLAGS)
    if key in known:
        raise PassError(f"{path}: {key} = {value!r}; wanted {'true or false' if key in _FLAGS else 'a text'}")
    raise PassError(
        f"{path}: unknown key '{key}'; there are: {', '.join(known)}, and the tables [quantize] and [ascend]"
    )
