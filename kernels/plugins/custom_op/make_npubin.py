"""Compile a Triton kernel to device code for the custom operator; on a machine with CANN and triton-ascend. Not run here.

    python make_npubin.py OUTPUT_FOLDER [CHIP]

Writes <function>.<type>.<columns>.npubin for every tile of kernels/add_rms_norm, which add_rms_norm_op.cc looks for.
"""

import sys
from pathlib import Path

from qcompile.kernels.tile_table import tables


def main() -> None:
    """Compile every tile and type."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qcompile.kernels.add_rms_norm import kernel

    output, chip = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "Ascend910B4"
    output.mkdir(parents=True, exist_ok=True)
    (table,) = tables("add_rms_norm")
    for tile, variant in table.cases():
        if tile.expect != "ok":
            continue
        function = getattr(kernel, table.function)
        source = ASTSource(fn=function, signature=table.typed_signature(variant), constants=dict(tile.constants))
        compiled = triton.compile(source, target=GPUTarget("npu", chip, 0))
        name = f"{table.function}.{variant}.{tile.constants['BLOCK_COLS']}.npubin"
        (output / name).write_bytes(compiled.asm["npubin"])


if __name__ == "__main__":
    main()
