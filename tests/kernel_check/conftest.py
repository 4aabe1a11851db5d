"""The kernels environment, and what was compiled in it, once for all test processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.errors import KernelError
from qcompile.kernel_check.environment import KernelsEnv, find_environment
from qcompile.kernels.tile_table import CHIPS
from tests.kernel_check.compiled import CompiledStore

OneKernel = Callable[..., Path]


@pytest.fixture(scope="session")
def environment() -> KernelsEnv:
    try:
        return find_environment()
    except KernelError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def store(environment: KernelsEnv, tmp_path_factory: pytest.TempPathFactory) -> CompiledStore:
    """Compilations shared by all tests, and by all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "compiled-kernels"
    folder.mkdir(exist_ok=True)
    return CompiledStore(folder, environment)


@pytest.fixture
def one_kernel(tmp_path: Path) -> OneKernel:
    """Write a folder with operators of one kernel `k(x_ptr, o_ptr, n)`, given its body; returns the folder."""

    def write(name: str, body: str, constants: str = "BLOCK = 1024", more: str = "", head: str = "") -> Path:
        folder = tmp_path / "operators" / name
        folder.mkdir(parents=True)
        (folder / "kernel.py").write_text(
            "import triton\nimport triton.language as tl\n"
            f"{head}\n"
            "@triton.jit\n"
            "def k(x_ptr, o_ptr, n, BLOCK: tl.constexpr):\n"
            "    o = tl.arange(0, BLOCK)\n"
            f"    {body}\n"
        )
        (folder / "tiles.toml").write_text(
            f"chips = {json.dumps(CHIPS)}\n"
            '[[kernel]]\nfunction = "k"\ncore = "vector"\n'
            '[kernel.signature]\nx_ptr = "*T"\no_ptr = "*T"\nn = "i32"\n'
            '[kernel.variants]\nfp16 = { T = "fp16" }\n'
            f'[[kernel.tile]]\nconstants = {{ {constants} }}\nexpect = "ok"\n{more}\n'
        )
        return folder.parent

    return write
