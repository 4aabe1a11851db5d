"""The runtime's own errors; `qcompile.errors` draws the whole tree.

QCompileError
└── RuntimeFault        anything the runtime refuses or meets while running
    ├── ManifestError   the compiled-model directory is incomplete, damaged or of another schema
    ├── TokenizerError  tokenizer or chat template cannot be used
    ├── RequestError    a prompt or option that cannot be served (too long, empty, out of range)
    └── SessionError    the back end (ONNX Runtime, ACL) failed
"""


class QCompileError(Exception):
    """Base of every error that is the user's to fix; its message is one clear line."""


class RuntimeFault(QCompileError):  # RuntimeError is taken
    """Anything the runtime refuses or meets while running."""


class ManifestError(RuntimeFault):
    """The compiled-model directory is incomplete, damaged, or written by an incompatible version."""


class TokenizerError(RuntimeFault):
    """The tokenizer or the chat template cannot be loaded, or the template raised."""


class RequestError(RuntimeFault, ValueError):
    """A prompt or a sampling option that cannot be served."""


class SessionError(RuntimeFault):
    """The back end failed to load or to run a graph."""
