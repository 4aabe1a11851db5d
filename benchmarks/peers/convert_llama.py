"""Make a GGUF of a Hugging Face checkpoint and quantize it: `convert_llama.py CHECKPOINT MODEL_DIR TYPE WORK_DIR`.

The converter is the one in llama-cpp-python's own source archive; the float32 file is kept in WORK_DIR for the next type.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import llama_cpp

TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


def main() -> None:
    """Convert once, quantize."""
    checkpoint, model, kind, work = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    plain = work / "llama-f32.gguf"
    if not plain.is_file():
        temporary = plain.with_name("llama-f32.part.gguf")
        command = [sys.executable, str(converter(work)), checkpoint, "--outtype", "f32", "--outfile", str(temporary)]
        subprocess.run(command, check=True)
        temporary.replace(plain)
    model.mkdir(parents=True, exist_ok=True)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.nthread = 2
    target = model / "model.gguf"
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"{target}: llama.cpp could not quantize {plain}")


def converter(work: Path) -> Path:
    """Return convert_hf_to_gguf.py out of the source archive of the installed version."""
    name = f"llama_cpp_python-{version('llama-cpp-python')}"
    script = work / name / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    if not script.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", ":all:", "-d", str(work), f"llama-cpp-python=={version('llama-cpp-python')}"]
        subprocess.run(command, check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    return script


if __name__ == "__main__":
    main()
