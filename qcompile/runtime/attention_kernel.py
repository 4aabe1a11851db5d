"""Which of ONNX Runtime's two CPU kernels for GroupQueryAttention a session takes: tiled (flash), its choice, or plain.

The tiled one has no fast path for a single query row. With a scale of 1 the plain one multiplies a row by the keys, and the
probabilities by the values, as matrix-vector products. Both in one process, int4 of a 0.5B model on two cores with AVX2, a
decode step: level at 128 tokens, 1.1 times as fast at 1,024, 1.2 at 4,096, 1.17 with 8 rows at 1,024; chunks of 256 prompt
tokens 1.02 to 1.07. The plain one holds the scores of a call: 4 bytes for each head, new token and token in the cache.
"""

import os
from contextlib import contextmanager
from typing import Iterator

from .manifest import GraphIO

# Read by ONNX Runtime (1.32 does; those before mid-2026 have the plain kernel only) when a session creates its kernels.
_SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@contextmanager
def attention_kernel(io: GraphIO) -> Iterator[None]:
    """Let sessions that are opened within run attention by the kernel that suits the graph; a user's own setting stands."""
    if io.attention != "plain" or _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SWITCH, None)  # another thread that opened a session may have taken it back
