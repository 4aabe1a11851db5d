"""Lower Triton functions to the Ascend adapter's linalg, ahead of time; runs in the kernels environment, alone.

stdin: one JSON object {"chip": ..., "jobs": [{"file", "function", "signature", "constants"}, ...]}.
stdout: {"job": -1} once triton is imported, then one JSON line per job, in order: {"job": its number} and "linalg": text, or
"stage": "frontend" | "adapter" and "error": text, of the frontend with the reason in its first line. Whatever a kernel
file prints goes to stderr. `triton.compile()` would ask the NPU's driver, so the stages are called here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO


class WrongTable(Exception):
    """The tile table and the kernel file disagree."""


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

    function = kernel_of(load(job["file"], cache), job)
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


def kernel_of(module: ModuleType, job: dict[str, Any]) -> Any:
    """Return the @triton.jit function of a job.

    Raises:
        WrongTable: There is none, or its arguments are not those of the tile table.
    """
    from triton.runtime.jit import JITFunction

    function = getattr(module, job["function"], None)
    if not isinstance(function, JITFunction):
        there = sorted(name for name, value in vars(module).items() if isinstance(value, JITFunction))
        seen = "is not in this file" if function is None else f"is a {type(function).__name__}, no @triton.jit function"
        raise WrongTable(f"{seen}; the file has {', '.join(there) or 'none'}; correct function = of tiles.toml")
    fixed = [param.name for param in function.params if param.is_constexpr]
    run_time = [param.name for param in function.params if not param.is_constexpr]
    if list(job["signature"]) != run_time:
        seen = ", ".join(job["signature"])
        raise WrongTable(f"[kernel.signature] of tiles.toml has {seen}; the function takes {', '.join(run_time)}")
    if set(job["constants"]) != set(fixed):
        seen = ", ".join(job["constants"]) or "none"
        raise WrongTable(
            f"constants of tiles.toml are {seen}; the function's tl.constexpr are {', '.join(fixed) or 'none'}"
        )
    return function


def answer(job: dict[str, Any], chip: str, cache: dict[str, ModuleType]) -> dict[str, str]:
    """Lower one job; every fault is an answer, since one bad kernel must not hide the others."""
    try:
        return {"linalg": lower(job, chip, cache)}
    except subprocess.CalledProcessError as fault:
        text = fault.stderr.decode(errors="replace") if isinstance(fault.stderr, bytes) else str(fault.stderr or "")
        return {"stage": "adapter", "error": adapter_error(fault.returncode, text)}
    except Exception as fault:
        return {"stage": "frontend", "error": frontend_error(fault, job, cache)}


def frontend_error(fault: Exception, job: dict[str, Any], cache: dict[str, ModuleType]) -> str:
    """Return where and what in the first line: `swiglu/kernel.py:21: swiglu_kernel: NameError(...)`; then Triton's text."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.jit import get_jit_fn_file_line

    path = Path(job["file"])
    where, what, rest = f"{path.parent.name}/{path.name}", f"{type(fault).__name__}: {fault}", ""
    if isinstance(fault, WrongTable):
        what = str(fault)
    elif isinstance(fault, CompilationError):
        rest, inner = str(fault), fault
        while isinstance(inner.__cause__, CompilationError):  # in a function that this one calls
            inner = inner.__cause__
        what = inner.error_message or type(inner).__name__
        if hasattr(fault.node, "lineno"):  # counted from `def`
            _, first = get_jit_fn_file_line(getattr(cache[job["file"]], job["function"]))
            where = f"{where}:{first + fault.node.lineno - 1}"
    return f"{where}: {job['function']}: {' '.join(what.split())}\n{rest}".strip()


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
    import triton.backends.ascend.compiler
    import triton.compiler  # noqa: F401  (seconds; they are none of a kernel's)

    reply(replies, -1, {})
    request = json.load(sys.stdin)
    for folder in {str(Path(job["file"]).parent.parent) for job in request["jobs"]}:
        sys.path.append(folder)
    cache: dict[str, ModuleType] = {}
    for number, job in enumerate(request["jobs"]):
        reply(replies, number, answer(job, request["chip"], cache))


def reply(replies: TextIO, number: int, said: dict[str, str]) -> None:
    """Write a line about a job; its number shows whether something else wrote lines too."""
    replies.write(json.dumps({"job": number, **said}) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
