"""What a graph costs on a chip, by a roofline per kernel: max(work / matrix rate, bytes / bandwidth) + launch gap.

    time = sum over kernels of max(flops / (cube cores * clock * 4096 * 2), bytes / bandwidth) + gap

Every result is an estimate. The bandwidth of a chip is a range, because its published readings differ; the gap between two
kernels of a static .om is 1.86 us, a fit of a public project over nine configurations on 910B4. Left out: what stays in the
second-level cache, vector arithmetic, idle time between engines, and the host's own time per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.ascend.atc_options import tensor_bytes
from qcompile.ascend.chips import Chip
from qcompile.ascend.legality.view import GraphView, Node, Value

LAUNCH_GAP_S = 1.86e-6
_MACS_PER_CYCLE = 4096
_INT8_FACTOR = 2
_FREE = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Constant", "Flatten", "Shape"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "BatchMatMul"})
_QUANTIZED = frozenset({"QuantBatchMatMul", "NPUWeightQuantBatchMatmulV2", "WeightQuantBatchMatmulV2"})
_PICKS = frozenset({"Gather", "Slice", "Split", "GatherElements"})
_FUSED_NORMS = frozenset({"NPURmsNorm", "NPURmsNormEpsilon"})
_FLASH = frozenset({"NPUPromptFlashAttention", "NPUFusedInferAttentionScore"})
_NORMS = frozenset({"NPURmsNorm", "NPURmsNormEpsilon", "NPUAddRmsNorm"})


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        name: Node it comes from.
        op: Its type.
        flops: Work of the matrix cores; 0 for everything else.
        moved_bytes: Activations and cache read and written.
        weight_bytes: Constants read.
        outputs: Rows N of a constant matrix, one per output of a product or token of a table; 0 without one.
        inputs: What a row of it holds, M.
        is_int8: Whether the matrix cores work in int8.
        follows_norm: Whether its input comes straight from a norm.
        has_bias: Whether a product takes in a bias.
        stored_bytes: What lies on the device besides, such as a table of which a call reads a few rows.
    """

    name: str
    op: str
    flops: float
    moved_bytes: int
    weight_bytes: int = 0
    outputs: int = 0
    inputs: int = 0
    is_int8: bool = False
    follows_norm: bool = False
    has_bias: bool = False
    stored_bytes: int = 0

    @property
    def rows(self) -> int:
        """Rows that a product with a constant multiplies; 0 for anything else."""
        weights = 2 * self.outputs * self.inputs
        return round(self.flops / weights) if weights else 0


@dataclass(frozen=True)
class Range:
    """A best and a worst reading, in seconds."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Estimate:
    """What a list of kernels costs.

    Attributes:
        time: For the higher and the lower bandwidth reading.
        roofline: The same without launch gaps, everything moved once at full speed.
        kernels: How many.
        launch_share: Part of the time that is launch gap, for the lower reading of time.
        launch_bound: Kernels whose own work is shorter than the gap.
        weight_bytes: Weights read per call.
        moved_bytes: Everything else.
        flops: Work of the matrix cores.
    """

    time: Range
    roofline: Range
    kernels: int
    launch_share: float
    launch_bound: int
    weight_bytes: int
    moved_bytes: int
    flops: float


def kernel_time(kernel: Kernel, chip: Chip) -> Range:
    """Return the time of one kernel with its launch gap."""
    rate = matrix_rate(chip) * (_INT8_FACTOR if kernel.is_int8 else 1)
    low, high = chip.bandwidth
    total = kernel.moved_bytes + kernel.weight_bytes
    work = kernel.flops / rate
    return Range(max(work, total / high) + LAUNCH_GAP_S, max(work, total / low) + LAUNCH_GAP_S)


def matrix_rate(chip: Chip) -> float:
    """Return fp16 operations per second of the matrix cores: cores x clock x 4096 multiply-adds x 2."""
    return chip.cube_cores * chip.clock_hz * _MACS_PER_CYCLE * 2.0


def estimate(kernels: Sequence[Kernel], chip: Chip) -> Estimate:
    """Return what the kernels cost together."""
    time = Range(0.0, 0.0)
    launch_bound = 0
    for kernel in kernels:
        spent = kernel_time(kernel, chip)
        time += spent
        launch_bound += spent.low < 2 * LAUNCH_GAP_S
    gaps = len(kernels) * LAUNCH_GAP_S
    flops = sum(k.flops / (_INT8_FACTOR if k.is_int8 else 1) for k in kernels)
    weights, moved = sum(k.weight_bytes for k in kernels), sum(k.moved_bytes for k in kernels)
    low, high = chip.bandwidth
    work = flops / matrix_rate(chip)
    best = Range(max(work, (weights + moved) / high), max(work, (weights + moved) / low))
    share = gaps / time.low if time.low else 0.0
    return Estimate(time, best, len(kernels), share, launch_bound, weights, moved, flops)


def kernels_of(view: GraphView) -> list[Kernel]:
    """Return the launches of a static graph, after what GE's documents say it fuses by itself."""
    return [_kernel(node) for node in view.nodes if not _vanishes(node)]


def constant_bytes(view: GraphView) -> int:
    """Return what the constants of a graph take, each of them once."""
    return sum(_size(value) for value in view.values.values() if value.tensor is not None)


def _vanishes(node: Node) -> bool:
    outputs = [value for value in node.outputs if value is not None]
    if node.op in _FREE or not outputs or all(value.is_foldable for value in outputs):
        return True
    readers = outputs[0].readers
    if node.op == "Transpose":
        perm = node.attributes.get("perm", ())
        swapped = len(perm) >= 2 and tuple(perm) == (*range(len(perm) - 2), len(perm) - 1, len(perm) - 2)
        return swapped and bool(readers) and all(reader.op in _PRODUCTS for reader in readers)
    first = node.input(0)
    maker = first.producer if first is not None else None
    if node.op == "Add":
        return _is_bias(node) or any(reader.op in _FUSED_NORMS for reader in readers)
    if node.op == "NPUDynamicQuant" and maker is not None and maker.op in _FUSED_NORMS:
        source = maker.input(0)
        return source is not None and source.producer is not None and source.producer.op == "Add"
    return False


def _is_bias(node: Node) -> bool:
    """Whether a node is an Add that the product in front of it takes in."""
    first, second = node.input(0), node.input(1)
    maker = first.producer if first is not None else None
    is_behind_product = node.op == "Add" and maker is not None and maker.op in _PRODUCTS
    return is_behind_product and second is not None and second.tensor is not None


def _kernel(node: Node) -> Kernel:
    made = sum(_size(value) for value in node.outputs)
    constants = [v for v in node.inputs if v is not None and v.tensor is not None]
    moved = sum(_size(value) for value in node.inputs if value is not None and value.tensor is None)
    weights = sum(_size(value) for value in constants)
    if node.op in _PICKS:  # only what is picked is read
        moved, weights = made, 0
    first = node.input(0)
    maker = first.producer if first is not None else None
    outputs, inputs = _matrix(node, constants)
    return Kernel(
        name=node.name,
        op=node.op,
        flops=_flops(node),
        moved_bytes=moved + made,
        weight_bytes=weights,
        outputs=outputs,
        inputs=inputs,
        is_int8=first is not None and first.dtype == "i8",
        follows_norm=maker is not None and maker.op in _NORMS,
        has_bias=node.op in _PRODUCTS and any(_is_bias(reader) for v in node.outputs if v for reader in v.readers),
    )


def _matrix(node: Node, constants: Sequence[Value]) -> tuple[int, int]:
    """Return N and M of the matrix that a node multiplies by or looks up in, or zeros."""
    weight = next((v for v in constants if v.shape is not None and len(v.shape) == 2), None)
    rows, columns = (int(dim or 0) for dim in weight.shape or (0, 0)) if weight is not None else (0, 0)
    is_by_row = node.op == "Gather" or (node.op == "Gemm" and node.integer("transB", 0) == 1)
    return (rows, columns) if is_by_row else (columns, rows)


def _size(value: Value | None) -> int:
    return tensor_bytes(value.shape, value.dtype) if value is not None and value.shape is not None else 0


def _flops(node: Node) -> float:
    first, second, out = node.input(0), node.input(1), node.outputs[0] if node.outputs else None
    if node.op in _PRODUCTS | _QUANTIZED and first is not None and first.shape and out is not None and out.shape:
        return 2.0 * _count(out) * float(first.shape[-1] or 1)
    if node.op in _FLASH and first is not None and second is not None and second.shape:
        layout = node.attributes.get("input_layout", "BSH")
        length = second.shape[2 if "BNSD" in str(layout) and len(second.shape) == 4 else 1] or 1
        return 4.0 * _count(first) * length
    return 0.0


def _count(value: Value) -> float:
    count = 1.0
    for dim in value.shape or ():
        count *= dim or 1
    return count
