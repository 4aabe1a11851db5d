"""Would a Triton kernel compile for an Ascend chip, and does it fit? Decided ahead of time, without CANN or an NPU.

    tiles.toml ─▶ tiles ─▶ lowering ─▶ bisheng ─▶ planned_module ─▶ check
    what to compile        kernels environment:                     verdict and facts
                           Triton ─▶ linalg ─▶ planned IR

Everything up to and including the memory plan is the vendor's open compiler. The last step, `hivmc`, which writes device
code, is closed and is never called: nothing here says that a kernel runs on a chip.
"""
