"""A recipe for `qcompile optimize`: a TOML file that says what the command line can say.

The keys are passes, skip, target, verify, strict and surgery; [quantize] has those of `qcompile.quantize_options`:

    passes = ["fuse", "int4"]
    [quantize]
    group_size = 64
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qcompile.errors import PassError
from qcompile.pipeline import OptimizeOptions
from qcompile.quantize_options import options_from

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20
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
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PassError(f"{path}: the recipe cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PassError(f"{path}: is not TOML: {error}") from None
    quantize = options_from(record.pop("quantize", {}), str(path))
    return OptimizeOptions(quantize=quantize, **{key: _checked(key, value, path) for key, value in record.items()})


def _checked(key: str, value: Any, path: Path) -> Any:
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise PassError(f'{path}: {key} = {value!r}; wanted a list of names, such as ["fuse", "int8"]')
        return tuple(value)
    if key in _TEXTS and isinstance(value, str):
        return value
    if key in _FLAGS and isinstance(value, bool):
        return value
    known = (*_LISTS, *_TEXTS, *_FLAGS)
    if key in known:
        raise PassError(f"{path}: {key} = {value!r}; wanted {'true or false' if key in _FLAGS else 'a text'}")
    raise PassError(f"{path}: unknown key '{key}'; there are: {', '.join(known)}, and the table [quantize]")
