"""What every ONNX Runtime session here is opened with."""

from typing import Any, Optional

# Products of uint8 with int8 add pairs of them in 16 bits on x86 CPUs without VNNI, and saturate: 4 * 255 * 127 becomes 65,534.
# With this, ONNX Runtime makes such weights uint8 while it loads them, on those CPUs only (graph optimizations at extended
# or above), for which its kernels add in 32 bits. Its docs/execution-providers: "session.x64quantprecision".
_EXACT_PRODUCTS = ("session.x64quantprecision", "1")


def session_options(ort: Any, threads: Optional[int] = None) -> Any:
    """Return SessionOptions with exact products of 8 bits and no log: failures are exceptions, the log would repeat them.

    Args:
        ort: The onnxruntime module.
        threads: Of an operator; ONNX Runtime's own choice by default.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(*_EXACT_PRODUCTS)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
