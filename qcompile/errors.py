"""Every error a user can meet.

QCompileError
├── ExportError            a checkpoint that cannot be read or is not supported
├── FetchError             a download that failed or whose hash is wrong
├── ArtifactError          a compiled-model directory that cannot be written or is damaged
├── GraphError             an ONNX graph that cannot be read or is malformed
│   ├── UnsupportedOpError
│   └── ShapeError
├── PassError              a pass that failed, or an unknown pass name
├── VerifyError            two graphs that should agree and do not
├── QuantError             weights or options that cannot be quantized
├── AtcError               CANN's compiler refused a graph
├── QualityError           two models, or a text, that cannot be compared
├── BenchmarkError         a model that cannot be timed
├── KernelError            a fused operator given what it does not take
├── EvaluateError          a case file, prompt template or checker that cannot be used
├── PackageError           a package that cannot be made, read or run
├── ServeError             a server that cannot be started as asked
└── RuntimeFault           qcompile.runtime.errors.RuntimeFault (the runtime ships alone and has its own tree)

A message says what, where, seen versus wanted, and what to do. Only `qcompile.cli` turns these into exit codes.
"""

from qcompile.runtime.errors import QCompileError, RuntimeFault, SessionError


class ExportError(QCompileError):
    """A checkpoint cannot be read, is damaged, or is of a kind qcompile does not build."""


class FetchError(QCompileError):
    """A recipe's files could not be downloaded or do not have the expected sha256."""


class ArtifactError(QCompileError):
    """A compiled-model directory could not be written, or what is in it is damaged."""


class GraphError(QCompileError):
    """An ONNX file that cannot be read, or a graph that breaks its own rules."""


class UnsupportedOpError(GraphError):
    """A node whose operator the target (or a pass) does not take."""


class ShapeError(GraphError):
    """A tensor whose shape or dtype is not the one required."""


class PassError(QCompileError):
    """A pass failed, or a pass name is unknown."""


class VerifyError(QCompileError):
    """Two graphs that should compute the same do not."""


class QuantError(QCompileError):
    """Weights or options that cannot be quantized as asked."""


class AtcError(QCompileError):
    """CANN's ATC refused or failed to compile a graph."""


class QualityError(QCompileError):
    """Two models, or a text to compare them on, that cannot be used as asked."""


class BenchmarkError(QCompileError):
    """A model or a case that cannot be timed."""


class KernelError(QCompileError):
    """A fused operator was given a shape, dtype, device or layout that it does not take."""


class EvaluateError(QCompileError):
    """A case file, a prompt template or a checker that cannot be used as asked."""


class PackageError(QCompileError):
    """A package that cannot be made, or one that cannot be read or run."""


class ServeError(QCompileError):
    """A server that cannot be started as asked."""


__all__ = [
    "ArtifactError",
    "AtcError",
    "BenchmarkError",
    "EvaluateError",
    "ExportError",
    "FetchError",
    "GraphError",
    "KernelError",
    "PackageError",
    "PassError",
    "QCompileError",
    "QualityError",
    "QuantError",
    "RuntimeFault",
    "ServeError",
    "SessionError",
    "ShapeError",
    "UnsupportedOpError",
    "VerifyError",
]
