"""Tensors that stay on disk, and tensors that are computed piece by piece while a model is saved.

Memory then follows one piece (32 MiB), not the tensor and not the model:

- `MappedTensor` is what a loaded model's initializers are: bytes of a file that is kept open. `numpy()` maps
  just this tensor, and the mapping goes away with the array, so pages that were read do not stay in resident
  memory.
- `StreamedTensor` is computed row by row: whoever changes a weight (transpose, convert, quantize,
  concatenate) gives a function from a range of rows to those rows. A `NarrowableTensor` says that its
  numbers are those of a narrower type.
"""

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.errors import GraphError

Array = npt.NDArray[Any]
Piece = Callable[[], Array]
RowFunction = Callable[[int, int], Array]

PIECE_BYTES = 32 << 20


class DataFile:
    """A regular file kept open: what was checked is what is read, even if the path is replaced later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(f"{path} is not a regular file")
        self.size_bytes = status.st_size

    def map(self, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Map a byte range as uint8 [size_bytes]; the mapping lives as long as the array or a view of it.

        Raises:
            GraphError: The range does not lie within the file.
        """
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise GraphError(
                f"{self.path}: bytes {offset} to {offset + size_bytes} are wanted, the file has "
                f"{self.size_bytes}; "
                "it is truncated or belongs to another model"
            )
        if size_bytes == 0:
            return np.empty(0, np.uint8)
        slack = offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self._fd, size_bytes + slack, access=mmap.ACCESS_READ, offset=offset - slack)
        return np.frombuffer(mapping, np.uint8, count=size_bytes, offset=slack)

    def read(self, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Read a byte range into fresh memory (page cache pages then never count as resident)."""
        buffer = np.empty(size_bytes, np.uint8)
        self.read_into(buffer, offset)
        return buffer

    def read_into(self, buffer: npt.NDArray[np.uint8], offset: int) -> None:
        """Fill uint8 [n] with the bytes from `offset` on."""
        done, size_bytes = 0, len(buffer)
        while done < size_bytes:
            count = os.preadv(self._fd, [buffer[done:].data], offset + done)
            if count == 0:
                raise GraphError(f"{self.path}: ends at byte {offset + done}, {size_bytes - done} more are wanted")
            done += count

    def close(self) -> None:
        """Close the file; arrays already mapped stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


class MappedTensor(ir.ExternalTensor):
    """An external tensor whose mapping is never kept: each `numpy()` maps this tensor's bytes afresh.

    Args:
        file: The open data file; its path is what the serialized location points to.
        offset: First byte of the tensor.
        dtype: Element type.
        shape: Static shape.
        name: Initializer name.
    """

    __slots__ = ("file",)

    def __init__(self, file: DataFile, offset: int, dtype: ir.DataType, shape: ir.Shape, name: str) -> None:
        self.file = file
        size_bytes = _size_bytes(dtype, shape)
        super().__init__(
            file.path.name, offset, size_bytes, dtype, shape=shape, name=name, base_dir=str(file.path.parent)
        )

    def numpy(self) -> Array:
        """Return the values, mapped read-only; 2- and 4-bit types are unpacked into memory."""
        raw = self.raw_bytes()
        if self.dtype.bitwidth < 8:
            unpacked = ir.PackedTensor(raw, self.dtype, shape=self.shape).numpy()
            return np.asarray(unpacked)
        return raw.view(np.dtype(self.dtype.numpy()).newbyteorder("<")).reshape(self.shape.numpy())

    def read_columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) of a matrix [M, N] as [M, stop - start], read row by row into fresh memory."""
        rows, width = (int(d) for d in self.shape.numpy())
        size = self.dtype.bitwidth // 8
        taken = np.empty((rows, (stop - start) * size), np.uint8)
        for row in range(rows):
            self.file.read_into(taken[row], (self.offset or 0) + (row * width + start) * size)
        return taken.view(np.dtype(self.dtype.numpy()).newbyteorder("<"))

    def raw_bytes(self) -> npt.NDArray[np.uint8]:
        """Return the bytes as stored, mapped."""
        return self.file.map(self.offset or 0, self.length or 0)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self.numpy(), dtype=dtype)

    def tobytes(self) -> bytes:
        """Return a copy of the bytes as stored."""
        return self.raw_bytes().tobytes()

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes as stored, a piece at a time."""
        for _, piece in pieces_of(self):
            file.write(piece().data)

    def release(self) -> None:
        """Do nothing: no mapping is ever kept."""


class StreamedTensor(ir.LazyTensor):
    """A tensor computed by ranges of rows (axis 0), so that a writer never holds all of it.

    Args:
        rows: Function from (start, stop) to the array [stop - start, ...] of those rows, of the declared
            dtype. It runs in worker threads, any number of times and in any order, and must not keep state.
        dtype: Element type, 8 bits or wider.
        shape: Static shape of rank 1 or more.
        name: Initializer name.
        row_multiple: `start` is always a multiple of it (the block length of a quantized source, say).
        piece_bytes: About how large a piece should be.
    """

    __slots__ = ("piece_bytes", "row_multiple", "rows")

    def __init__(
        self,
        rows: RowFunction,
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        name: str | None = None,
        row_multiple: int = 1,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        if dtype.bitwidth < 8 or len(shape) == 0:
            raise ValueError(f"{name}: a StreamedTensor has rows of whole bytes, not {dtype} {shape}")
        super().__init__(self._gather, dtype, shape, name=name)
        self.rows = rows
        self.row_multiple = row_multiple
        self.piece_bytes = piece_bytes

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Yield (size in bytes, function that computes the piece), in order; together they are the tensor."""
        num_rows, *rest = self.shape.numpy()
        row_bytes = max(1, _size_bytes(self.dtype, ir.Shape([1, *rest])))
        step = max(1, self.piece_bytes // (row_bytes * self.row_multiple)) * self.row_multiple
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            yield (stop - start) * row_bytes, _RowPiece(self, start, stop)

    def _gather(self) -> ir.Tensor[Any]:
        array = np.empty(self.shape.numpy(), self.dtype.numpy())
        start = 0
        for _, compute in self.pieces():
            part = compute()
            array[start : start + len(part)] = part
            start += len(part)
        return ir.Tensor(array, dtype=self.dtype, shape=self.shape, name=self.name)


class NarrowableTensor(StreamedTensor):
    """A streamed tensor whose numbers a narrower type holds exactly, because they were rounded to it when made.

    Args:
        rows: See StreamedTensor, like the rest.
        dtype: Element type.
        shape: Static shape.
        exact_in: The narrower type.
        name: Initializer name.
        row_multiple: See there.
        piece_bytes: See there.
    """

    __slots__ = ("exact_in",)

    def __init__(
        self,
        rows: RowFunction,
        dtype: ir.DataType,
        shape: ir.Shape,
        exact_in: ir.DataType,
        *,
        name: str | None = None,
        row_multiple: int = 1,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(rows, dtype, shape, name=name, row_multiple=row_multiple, piece_bytes=piece_bytes)
        self.exact_in = exact_in


class _RowPiece:
    """One range of rows of a StreamedTensor, checked when computed."""

    def __init__(self, tensor: StreamedTensor, start: int, stop: int) -> None:
        self.tensor, self.start, self.stop = tensor, start, stop

    def __call__(self) -> Array:
        array = self.tensor.rows(self.start, self.stop)
        wanted = (self.stop - self.start, *self.tensor.shape.numpy()[1:])
        if array.shape != wanted or array.dtype != self.tensor.dtype.numpy():
            raise ValueError(
                f"{self.tensor.name}: rows {self.start}:{self.stop} came as {array.dtype} {array.shape}, "
                f"declared {self.tensor.dtype} {wanted}"
            )
        return array


def pieces_of(tensor: ir.TensorProtocol) -> Iterator[tuple[int, Piece]]:
    """Yield (size in bytes, function that computes those bytes) for any tensor, in file order.

    A StreamedTensor and a MappedTensor come in pieces of about 32 MiB; any other tensor is one piece.
    """
    if isinstance(tensor, StreamedTensor):
        yield from tensor.pieces()
    elif isinstance(tensor, MappedTensor):
        offset, length = tensor.offset or 0, tensor.length or 0
        for start in range(0, length, PIECE_BYTES):
            size_bytes = min(PIECE_BYTES, length - start)
            yield size_bytes, partial(tensor.file.read, offset + start, size_bytes)
    else:
        yield tensor.nbytes, partial(_whole, tensor)


def _whole(tensor: ir.TensorProtocol) -> Array:
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    array = tensor.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _size_bytes(dtype: ir.DataType, shape: ir.Shape) -> int:
    count = 1
    for dim in shape.numpy():
        count *= int(dim)
    return (count * dtype.bitwidth + 7) // 8
