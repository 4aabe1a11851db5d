"""The runtime: run a compiled-model directory with numpy, tokenizers, jinja2 and one back end.

    from qcompile.runtime import Engine, SamplingParams

    with Engine("qwen-int8") as engine:
        for completion in engine.generate(["Hello", "你好"], SamplingParams(max_new_tokens=64)):
            print(completion.text)

Names are imported on first use, so that `import qcompile.runtime` costs nothing. The folder ships alone:
copied under any other package name it works unchanged (all imports inside are relative), on Python 3.9 and
newer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from .completion import Completion, Delta, TokenLogprob
    from .engine import Engine
    from .errors import (
        ManifestError,
        QCompileError,
        RequestError,
        RuntimeFault,
        SessionError,
        TokenizerError,
    )
    from .manifest import Manifest
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "Manifest",
    "ManifestError",
    "QCompileError",
    "RequestError",
    "RuntimeFault",
    "SamplingParams",
    "SessionError",
    "TokenLogprob",
    "Tokenizer",
    "TokenizerError",
]

_HOME = {
    "Completion": "completion",
    "Delta": "completion",
    "TokenLogprob": "completion",
    "Engine": "engine",
    "Manifest": "manifest",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("." + _HOME.get(name, "errors"), __name__), name)


def __dir__() -> List[str]:
    return sorted(__all__)
