"""Lower Triton functions to the Ascend adapter's linalg, ahead of time; runs in the kernels environment, alone.

stdin: one JSON object {"chip": ..., "jobs": [{"file", "function", "signature", "constants"}, ...]}.
stdout: one JSON line per job, in order: {"linalg": text} or {"stage": "frontend" | "adapter", "error": text}.
Whatever a kernel file prints goes to stderr. `triton.compile()` would ask the NPU's driver, so the stages are called here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load(file: str, cache: dict[str, ModuleType]) -> ModuleType:
    """Import a kernel file once; its folder's parent is on the path, so that it may import a neighbour."""
    if file not in cache:
        name = f"qcompile_kernel_{len(cache)}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file}: cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # triton reads the source through it
        spec.loader.exec_module(module)
        cache[file] = module
    return cache[file]


def lower(job: dict[str, Any], chip: str, cache: dict[str, ModuleType]) -> str:
    """Return the linalg text of one function at one set of types and block sizes."""
    from triton._C.libtriton import ir
    from triton.backends.ascend.compiler import AscendBackend
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load(job["file"], cache), job["function"], None)
    if function is None:
        raise AttributeError(f"no function {job['function']}")
    target = GPUTarget("npu", chip, 0)
    source = ASTSource(fn=function, signature=job["signature"], constants=job["constants"])
    backend = AscendBackend(target)
    options = backend.parse_options(source.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "ahead-of-time", "target": target, **options.__dict__}
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    return str(stages["ttadapter"](stages["ttir"](module, metadata), metadata))


def answer(job: dict[str, Any], chip: str, cache: dict[str, ModuleType]) -> dict[str, str]:
    """Lower one job; every fault is an answer, since one bad kernel must not hide the others."""
    try:
        return {"linalg": lower(job, chip, cache)}
    except subprocess.CalledProcessError as fault:
        text = fault.stderr.decode(errors="replace") if isinstance(fault.stderr, bytes) else str(fault.stderr or "")
        return {"stage": "adapter", "error": adapter_error(fault.returncode, text)}
    except Exception as fault:
        return {"stage": "frontend", "error": f"{type(fault).__name__}: {fault}"}


def adapter_error(code: int, text: str) -> str:
    """Return what triton-adapter-opt complained of, without the addresses of a crash."""
    said = text.partition("PLEASE submit a bug report")[0].strip()
    if code < 0:
        said = f"{said}\ntriton-adapter-opt crashed (signal {-code})".strip()
    return said or f"triton-adapter-opt ended with exit code {code} and no reason"


def main() -> None:
    """Answer the jobs on stdin."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    for folder in {str(Path(job["file"]).parent.parent) for job in request["jobs"]}:
        sys.path.append(folder)
    cache: dict[str, ModuleType] = {}
    for job in request["jobs"]:
        replies.write(json.dumps(answer(job, request["chip"], cache)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
