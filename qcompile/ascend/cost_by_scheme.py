"""The kernels of a fused model once a quantization pass has been over it, in the form the lowering gives them.

    int8 behind a norm   AscendQuant -> QuantBatchMatMul [-> Add b]; AscendQuant -> MatMul -> AscendDequant [-> Add b] on 310
    weights alone        NPUWeightQuantBatchMatmulV2 [-> Add b]; beyond 65,535 outputs several, and a Concat
    embedding, 8 bits    Gather of codes, Gather of scales, Cast, Mul; with 4 bits its floats are stored
    no kernel            as it was

What a pass does to a place is asked of the pass itself: its defaults, for the place that the shapes of a weight tell. A tied
head behind the rotation of int8 is turned there and back (`quantize_rotation`), for every token of a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from qcompile.ascend.cost import Kernel
from qcompile.ascend.cost_by_config import Sizes
from qcompile.ascend.lowering.quantized import MAX_DIM
from qcompile.errors import QuantError
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8Norm
from qcompile.passes.quantize_projections import DOWN, EMBEDDING, HEAD, O_PROJ
from qcompile.quant.hadamard import hadamard_rotation
from qcompile.quantize_options import GROUP_SIZES, LayerOptions, LinearScheme, QuantizeOptions

_HALF = 2
_PACKED_SCALE = 8  # uint64, one per output channel
_SMALLEST_GROUP = 32
_ELSEWHERE = ""


def with_int8(kernels: Iterable[Kernel], sizes: Sizes, family: str) -> list[Kernel]:
    """Return the kernels as the pass `int8` leaves them on chips of a family, such as 910B."""
    try:
        hadamard_rotation(sizes.hidden)
    except QuantError:
        return list(kernels)  # `optimize` refuses
    return _Scheme(QuantizeInt8Norm.defaults, sizes, family).kernels(kernels)


def with_int4(kernels: Iterable[Kernel], sizes: Sizes, family: str) -> list[Kernel]:
    """Return the kernels as the pass `int4` leaves them."""
    return _Scheme(QuantizeInt4.defaults, sizes, family).kernels(kernels)


class _Scheme:
    """One pass on one model and chip.

    Args:
        defaults: Of the pass.
        sizes: Of the model.
        family: Of the chip.
    """

    def __init__(self, defaults: Sequence[LayerOptions], sizes: Sizes, family: str) -> None:
        self.sizes, self.family = sizes, family
        self.schemes = {place: _scheme(defaults, place) for place in (HEAD, EMBEDDING, DOWN, O_PROJ, _ELSEWHERE)}
        self.is_rotated = self.schemes[_ELSEWHERE].activations == "norm"

    def kernels(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        listed = list(kernels)
        lookups = (k for k in listed if self._place(k) == EMBEDDING)
        tokens = next((_elements(k) // k.inputs for k in lookups), 1)
        return [made for kernel in listed for made in self._made(kernel, tokens)]

    def _made(self, kernel: Kernel, tokens: int) -> Iterator[Kernel]:
        place = self._place(kernel)
        if place is None:
            yield kernel
        elif place == EMBEDDING:
            yield from self._embedding(kernel)
        else:
            if place == HEAD and self.is_rotated and self.sizes.is_tied:
                yield from self._rotation(tokens)
            scheme = self.schemes[place]
            if scheme.activations == "float":
                yield from self._weight_only(kernel, scheme)
            else:
                yield from self._rounded(kernel)

    def _place(self, kernel: Kernel) -> str | None:
        """Return what patterns call the place of a weight, or None where a kernel has none to quantize."""
        if (kernel.outputs, kernel.inputs) == (self.sizes.vocab, self.sizes.hidden):
            return HEAD if kernel.flops else EMBEDDING
        if not kernel.flops or not kernel.outputs:
            return None
        if kernel.follows_norm or kernel.outputs != self.sizes.hidden:
            return _ELSEWHERE
        return DOWN if kernel.inputs == self.sizes.ffn else O_PROJ

    def _rounded(self, kernel: Kernel) -> Iterator[Kernel]:
        """One step for all rows behind a norm, one scale per output channel."""
        rows, n, m = kernel.rows, kernel.outputs, kernel.inputs
        yield Kernel(f"{kernel.name}.codes", "AscendQuant", 0.0, rows * m * (_HALF + 1))
        int8 = replace(kernel, moved_bytes=rows * (m + _HALF * n), weight_bytes=n * (m + _PACKED_SCALE), is_int8=True)
        if self.family == "910B":
            yield replace(int8, op="QuantBatchMatMul")
        else:
            yield replace(int8, moved_bytes=rows * (m + 4 * n), weight_bytes=n * m)
            yield Kernel(f"{kernel.name}.dequant", "AscendDequant", 0.0, rows * n * (4 + _HALF), _PACKED_SCALE * n)
        yield from self._bias(kernel)

    def _weight_only(self, kernel: Kernel, scheme: LinearScheme) -> Iterator[Kernel]:
        if not self._has_kernel(kernel, scheme):
            yield kernel
            return
        n, m = kernel.outputs, kernel.inputs
        count = -(-n // MAX_DIM)
        piece = replace(
            kernel,
            op="NPUWeightQuantBatchMatmulV2",
            flops=kernel.flops / count,
            moved_bytes=kernel.rows * (m + n // count) * _HALF,
            weight_bytes=_stored_bytes(n, m, scheme) // count,
        )
        yield from [piece] * count
        if count > 1:
            yield Kernel(f"{kernel.name}.joined", "Concat", 0.0, 2 * kernel.rows * n * _HALF)
        yield from self._bias(kernel)

    def _has_kernel(self, kernel: Kernel, scheme: LinearScheme) -> bool:
        """Whether a weight is multiplied as it is stored, see `lowering.quantized.why_floats`."""
        is_int4 = scheme.bits == 4
        if self.family == "310B" or (self.family == "310P" and is_int4) or kernel.inputs > MAX_DIM:
            return False
        is_blocked = scheme.group_size == "channel" or _group(scheme, kernel.inputs) >= _SMALLEST_GROUP
        return is_blocked and not (is_int4 and kernel.outputs % 8)

    def _embedding(self, kernel: Kernel) -> Iterator[Kernel]:
        """Look rows up in a table of codes, or of floats where the chip has no kernel for a tied head's codes."""
        scheme = self.schemes[HEAD if self.sizes.is_tied else EMBEDDING]
        has_float_head = self.sizes.is_tied and not self._has_kernel(kernel, scheme)  # its table is looked up too
        if scheme.bits == 4 or has_float_head:
            yield replace(kernel, stored_bytes=0 if has_float_head else _HALF * kernel.outputs * kernel.inputs)
            return
        elements = _elements(kernel)
        scales = elements // _group(scheme, kernel.inputs)
        stored = _stored_bytes(kernel.outputs, kernel.inputs, scheme)
        yield replace(kernel, name=f"{kernel.name}.codes", moved_bytes=2 * elements, stored_bytes=stored)
        yield Kernel(f"{kernel.name}.scales", "Gather", 0.0, 2 * scales * _HALF)
        yield Kernel(f"{kernel.name}.floats", "Cast", 0.0, elements * (1 + _HALF))
        yield Kernel(f"{kernel.name}.scaled", "Mul", 0.0, (2 * elements + scales) * _HALF)

    def _rotation(self, tokens: int) -> Iterator[Kernel]:
        """Q^T, gamma and Q in front of a tied head: two small products each way, signs twice, gamma once."""
        elements = tokens * self.sizes.hidden
        rotation, moved = hadamard_rotation(self.sizes.hidden), 2 * elements * _HALF
        for way in ("back", "forth"):
            for number, side in enumerate((len(rotation.block), 1 << rotation.power)):
                yield Kernel(f"rotation.{way}.{number}", "MatMul", 2.0 * elements * side, moved, side * side * _HALF)
        for name in ("signs", "gamma", "signs"):
            yield Kernel(f"rotation.{name}", "Mul", 0.0, moved)

    def _bias(self, kernel: Kernel) -> Iterator[Kernel]:
        """An Add that a float product takes in, and these do not."""
        if kernel.has_bias:
            yield Kernel(f"{kernel.name}.biased", "Add", 0.0, 2 * kernel.rows * kernel.outputs * _HALF)


def _elements(lookup: Kernel) -> int:
    """Return how many floats a lookup reads, and writes."""
    return lookup.moved_bytes // (2 * _HALF)


def _scheme(defaults: Sequence[LayerOptions], place: str) -> LinearScheme:
    scheme = QuantizeOptions().scheme_for((place,), defaults)
    assert scheme is not None  # nothing is kept float here
    return scheme


def _group(scheme: LinearScheme, num_inputs: int) -> int:
    """Return the block that a pass takes for a weight: its own, or the next smaller one that divides the inputs."""
    if scheme.group_size == "channel":
        return num_inputs
    wanted = max(scheme.group_size, _SMALLEST_GROUP)
    return max((size for size in GROUP_SIZES if size <= wanted and num_inputs % size == 0), default=1)


def _stored_bytes(n: int, m: int, scheme: LinearScheme) -> int:
    """Return codes, and per block a scale in half precision and, with zero points, an offset in it."""
    per_block = _HALF if scheme.symmetric else 2 * _HALF
    return n * m * scheme.bits // 8 + n * (m // _group(scheme, m)) * per_block
