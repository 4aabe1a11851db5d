"""The kernels environment: a Python of its own with triton-ascend and ascendnpu-ir at the versions this was written for.

triton-ascend installs itself as `triton` and overwrites plain triton, so it never shares an environment with it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcompile.errors import KernelError
from qcompile.kernels.tile_table import ROOT

PINS = {"triton-ascend": "3.2.0", "ascendnpu-ir": "1.2.0"}
VARIABLE = "QCOMPILE_KERNELS_PYTHON"
REQUIREMENTS = ROOT / "environment.txt"
CURE = (
    f"run `make kernels-env` in the source tree; or pip install -r {REQUIREMENTS} into an environment of Python 3.10 or 3.11 "
    f"made for it, and set {VARIABLE} to its Python"
)
_TIMEOUT_S = 60
_ASK = (
    "import importlib.metadata as m, importlib.util as u, json\n"
    "def version(name):\n"
    "    try: return m.version(name)\n"
    "    except m.PackageNotFoundError: return ''\n"
    "found = u.find_spec('ascendnpuir')\n"
    f"print(json.dumps([{{n: version(n) for n in {list(PINS)!r}}}, list(found.submodule_search_locations) if found else []]))"
)


@dataclass(frozen=True)
class KernelsEnv:
    """What is called to lower and to compile.

    Attributes:
        python: Interpreter that imports triton-ascend.
        compiler: bishengir-compile of the ascendnpu-ir wheel.
    """

    python: Path
    compiler: Path


def find_environment() -> KernelsEnv:
    """Find the kernels environment and check that its packages are the pinned ones.

    Raises:
        KernelError: There is none, or its packages have other versions; says what to do.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return _inspect(Path(named))
    for root in (Path(__file__).parents[2], Path.cwd()):
        python = root / ".venv-kernels/bin/python"
        if python.is_file():
            return _inspect(python)
    raise KernelError(f"no kernels environment (.venv-kernels) found; {CURE}")


@functools.lru_cache(maxsize=8)
def _inspect(python: Path) -> KernelsEnv:
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", _ASK], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        versions, places = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as fault:
        raise KernelError(f"{python}: does not work as a Python ({fault}); {CURE}") from None
    for name, wanted in PINS.items():
        if versions[name] != wanted:
            raise KernelError(f"{python}: {name} is {versions[name] or 'missing'}, wanted {wanted}; {CURE}")
    compilers = [Path(place, "bin/bishengir-compile") for place in places]
    for compiler in compilers:
        if compiler.is_file():
            return KernelsEnv(python, compiler)
    raise KernelError(f"{python}: ascendnpu-ir has no bin/bishengir-compile; {CURE}")
