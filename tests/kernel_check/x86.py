"""From MLIR text to a library for this CPU, by Debian's mlir-19-tools and llvm-19 and the C compiler."""

import ctypes
import shutil
import subprocess
from pathlib import Path

TOOLS = ("mlir-opt-19", "mlir-translate-19", "llc-19", "cc")
_HERE = Path(__file__).parent

BUFFERIZE = (
    "--inline",
    "--convert-elementwise-to-linalg",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true",
    "--buffer-deallocation-pipeline",
    "--convert-bufferization-to-memref",
    "--canonicalize",
    "--cse",
    "--convert-linalg-to-loops",
)
TO_LLVM = (
    "--expand-strided-metadata",
    "--lower-affine",
    "--arith-expand=include-bf16=true",
    "--convert-scf-to-cf",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--lower-affine",
    "--convert-index-to-llvm",
    "--convert-arith-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--reconcile-unrealized-casts",
)


def missing_tools() -> str:
    """Why lowered kernels cannot be run here; "" when they can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)} not found; run `make mlir-tools` as root, and install a C compiler" if missing else ""


def run(*command: str) -> None:
    """Run a tool; a complaint is no AssertionError, since a mutation that does not even lower proves nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stderr[:2000]}")


def compile_c(source: str, folder: Path) -> Path:
    """Compile a C file of this package once for a folder."""
    target = folder / f"{source}.o"
    if not target.exists():
        run("cc", "-O1", "-fPIC", "-Wall", "-Werror", "-c", str(_HERE / source), "-o", str(target))
    return target


def build(text: str, passes: tuple[str, ...], library: Path, base: Path) -> Path:
    """Lower MLIR text and link it with a compiled C file.

    Args:
        text: A module.
        passes: What brings it to memrefs and scf; TO_LLVM follows.
        library: The functions it calls.
        base: Path without suffix of what is written.

    Returns:
        Path of the library.
    """
    steps = {suffix: str(base.with_suffix(suffix)) for suffix in (".mlir", ".llvm.mlir", ".ll", ".o", ".so")}
    Path(steps[".mlir"]).write_text(text)
    lowered = steps[".llvm.mlir"]
    run("mlir-opt-19", steps[".mlir"], "--allow-unregistered-dialect", *passes, *TO_LLVM, "-o", lowered)
    run("mlir-translate-19", "--mlir-to-llvmir", lowered, "-o", steps[".ll"])
    run("llc-19", "-O1", "--relocation-model=pic", "-mattr=+f16c", "-filetype=obj", steps[".ll"], "-o", steps[".o"])
    run("cc", "-shared", "-Wl,-z,defs", "-o", steps[".so"], steps[".o"], str(library), "-lm")
    return Path(steps[".so"])


def memref(address: int, size: int) -> list[ctypes._SimpleCData]:  # type: ignore[type-arg]
    """A one-dimensional memref as MLIR passes it: allocated, aligned, offset, size, stride."""
    pointer = ctypes.c_void_p(address)
    return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(size), ctypes.c_int64(1)]
