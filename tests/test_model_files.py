"""Saving, loading and the compiled-model directory: round trips, bounded memory, and what goes wrong."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model, save_model
from qcompile.errors import GraphError
from qcompile.runtime.manifest import sha256_of
from qcompile.tensors import DataFile, MappedTensor, StreamedTensor, pieces_of
from tests.graphs_on_disk import model_of, saved_weight, streamed, weight

# saving and loading


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, ml_dtypes.int4, np.bool_],
)
def test_round_trip_of_every_dtype(tmp_path: Path, dtype: Any) -> None:
    array = np.random.default_rng(0).integers(0, 2, (70, 50)).astype(dtype)
    save_model(model_of(ir.Tensor(array, name="w")), tmp_path / "model.onnx")
    tensor = weight(load_model(tmp_path / "model.onnx"), "w")
    assert isinstance(tensor, MappedTensor)
    assert tensor.shape == [70, 50]
    np.testing.assert_array_equal(tensor.numpy(), array)
    np.testing.assert_array_equal(np.asarray(tensor), array)
    assert tensor.tobytes() == ir.Tensor(array).tobytes()


def test_streamed_pieces_make_the_tensor(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((1000, 37)).astype(np.float32)
    tensor = streamed(array, piece_bytes=5000, row_multiple=32)
    starts = [piece.start for _, piece in tensor.pieces()]  # type: ignore[attr-defined]
    assert len(starts) > 5
    assert all(start % 32 == 0 for start in starts)
    np.testing.assert_array_equal(tensor.numpy(), array)
    save_model(model_of(tensor), tmp_path / "model.onnx")
    np.testing.assert_array_equal(weight(load_model(tmp_path / "model.onnx"), "w").numpy(), array)


def test_what_is_recorded_is_what_is_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = [streamed(rng.standard_normal((300 + i, 11)).astype(np.float32), f"w{i}") for i in range(5)]
    seen: list[tuple[int, int]] = []
    saved = save_model(model_of(*tensors), tmp_path / "m.onnx", progress=lambda done, total: seen.append((done, total)))
    for entry in (saved.file, *saved.data):
        assert (tmp_path / entry.name).stat().st_size == entry.size_bytes
        assert sha256_of(tmp_path / entry.name) == entry.sha256
    assert [entry.name for entry in saved.data] == ["m.onnx.data"]
    assert seen[-1] == (saved.data[0].size_bytes,) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_large_tensors_start_on_a_page_and_small_ones_stand_close_behind(tmp_path: Path) -> None:
    sizes = [1500, 20_001, 16_384, 3]  # of float32; 64 KiB are large, the last is part of the graph
    tensors = [ir.Tensor(np.ones(size, np.float32), name=f"w{i}") for i, size in enumerate([*sizes, 16_383])]
    save_model(model_of(*tensors), tmp_path / "model.onnx")
    model = load_model(tmp_path / "model.onnx")
    small, first, second, other = (weight(model, f"w{i}").offset for i in (0, 1, 2, 4))  # type: ignore[attr-defined]
    assert (first, second) == (0, 81_920)
    assert (small, other) == (81_920 + 65_536, 81_920 + 65_536 + 6016)
    assert (tmp_path / "model.onnx.data").stat().st_size == other + 4 * 16_383


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    tensor = streamed(np.ones((2000, 3), np.float32))
    model = model_of(tensor)
    save_model(model, tmp_path / "model.onnx")
    assert weight(model, "w") is tensor


def test_a_shared_tensor_is_written_once(tmp_path: Path) -> None:
    tensor = ir.Tensor(np.arange(4096, dtype=np.float32), name="a")
    model = model_of(tensor, ir.Tensor(np.zeros(4096, np.float32), name="b"))
    model.graph.initializers["b"].const_value = tensor
    saved = save_model(model, tmp_path / "model.onnx")
    assert saved.data[0].size_bytes == 4096 * 4
    again = load_model(tmp_path / "model.onnx")
    np.testing.assert_array_equal(weight(again, "b").numpy(), weight(again, "a").numpy())
    assert save_model(again, tmp_path / "again.onnx").data[0].size_bytes == 4096 * 4


def test_small_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    saved = save_model(model_of(ir.Tensor(np.arange(8, dtype=np.int64), name="axes")), tmp_path / "model.onnx")
    assert saved.data == ()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(weight(load_model(tmp_path / "model.onnx"), "axes").numpy(), np.arange(8))


def test_saving_over_the_files_the_model_is_mapped_from(tmp_path: Path) -> None:
    path = saved_weight(tmp_path)
    model = load_model(path)
    mapped = weight(model, "w")
    doubled = StreamedTensor(lambda i, j: mapped.numpy()[i:j] * 2, mapped.dtype, ir.Shape([4096]), name="w")
    model.graph.initializers["w"].const_value = doubled
    save_model(model, path)
    np.testing.assert_array_equal(weight(load_model(path), "w").numpy(), np.arange(4096, dtype=np.float32) * 2)


def test_a_row_function_that_lies_is_caught(tmp_path: Path) -> None:
    liar = StreamedTensor(
        lambda i, j: np.zeros((j - i, 3), np.float64), ir.DataType.FLOAT, ir.Shape([500, 3]), name="w"
    )
    with pytest.raises(ValueError, match="w: rows 0:500 came as float64"):
        save_model(model_of(liar), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_a_mapped_tensor_are_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = weight(load_model(saved_weight(tmp_path)), "w")
    monkeypatch.setattr("qcompile.tensors.PIECE_BYTES", 1000)
    parts = [piece() for _, piece in pieces_of(mapped)]
    assert len(parts) == 17
    assert b"".join(part.tobytes() for part in parts) == mapped.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_memory_follows_the_piece_not_the_tensor(tmp_path: Path) -> None:
    """Save, load and save again a 768 MiB tensor; pages that were read must not stay resident."""
    script = """
        import re, sys
        from pathlib import Path
        import numpy as np
        import onnx_ir as ir
        from qcompile.artifact import load_model, save_model
        from qcompile.tensors import StreamedTensor
        from tests.test_artifact import model_of
        rows = lambda i, j: np.full((j - i, 1 << 20), i, np.float32)
        path = Path(sys.argv[1])
        shape = ir.Shape([192, 1 << 20])
        save_model(model_of(StreamedTensor(rows, ir.DataType.FLOAT, shape, name="w")), path)
        model = load_model(path)
        mapped = model.graph.initializers["w"].const_value
        twice = lambda i, j: mapped.numpy()[i:j] * 2
        again = StreamedTensor(twice, mapped.dtype, shape, name="w")
        model.graph.initializers["w"].const_value = again
        save_model(model, path)
        # not ru_maxrss: a child inherits the peak of the process that starts it
        print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 640 << 20
    (tmp_path / "model.onnx.data").unlink()


# damaged and hostile models


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"{}", b"\x08\x0a", os.urandom(4096), b"\x00" * 64])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=r"model\.onnx: is not an ONNX model"):
        load_model(path)


def test_a_model_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no such file"):
        load_model(tmp_path / "model.onnx")
    with pytest.raises(GraphError, match="is a directory"):
        load_model(tmp_path)


def test_every_truncation_of_a_model_is_told(tmp_path: Path) -> None:
    path = saved_weight(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(GraphError) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def rewritten(path: Path, change: Callable[[dict[str, str]], None]) -> Path:
    """Change the external-data entries of the only initializer."""
    import onnx

    proto = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry.value for entry in proto.graph.initializer[0].external_data}
    change(entries)
    del proto.graph.initializer[0].external_data[:]
    for key, value in entries.items():
        proto.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../secret", "must lie in the model's own directory"),
        ("sub/../../secret", "must lie in the model's own directory"),
        ("/etc/passwd", "must lie in the model's own directory"),
        ("link", "a link that leaves the model's directory"),
        ("dir/secret", "a link that leaves the model's directory"),
        ("", "must lie in the model's own directory"),
        ("absent.data", r"data file .*absent\.data is missing"),
        ("folder", "cannot be opened"),
        ("pipe", "cannot be opened"),
    ],
)
def test_external_data_must_stay_inside(tmp_path: Path, location: str, reason: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (inside / "link").symlink_to(tmp_path / "secret")
    (inside / "dir").symlink_to(tmp_path)
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    path = rewritten(saved_weight(inside), lambda entries: entries.update(location=location))
    with pytest.raises(GraphError, match=reason) as caught:
        load_model(path)
    assert "'w'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_within_the_model_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    path = saved_weight(blobs)
    (snapshot / "model.onnx").symlink_to(path)
    (snapshot / "model.onnx.data").symlink_to(blobs / "model.onnx.data")
    np.testing.assert_array_equal(weight(load_model(snapshot / "model.onnx"), "w").numpy(), np.arange(4096))


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": "4096"}, "lies at bytes 4096 to 20480"),
        ({"offset": "-8"}, "offset '-8'"),
        ({"offset": str(1 << 70)}, "a number of bytes is expected"),
        ({"offset": str(1 << 60)}, "lies at bytes"),
        ({"length": "16"}, "has 16 bytes of external data"),
        ({"length": "99999999999999"}, "bytes of external data"),
        ({"offset": "many"}, "offset 'many'"),
    ],
)
def test_offsets_and_lengths_must_fit(tmp_path: Path, entries: dict[str, str], reason: str) -> None:
    path = rewritten(saved_weight(tmp_path), lambda record: record.update(entries))
    with pytest.raises(GraphError, match=reason):
        load_model(path)


def test_truncated_and_missing_data(tmp_path: Path) -> None:
    path = saved_weight(tmp_path)
    os.truncate(tmp_path / "model.onnx.data", 16383)
    with pytest.raises(GraphError, match=r"'w' lies at bytes 0 to 16384 of .* which has 16383"):
        load_model(path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(GraphError, match=r"data file .* is missing"):
        load_model(path)


def test_a_data_file_replaced_after_loading_is_not_mixed_in(tmp_path: Path) -> None:
    model = load_model(saved_weight(tmp_path))
    (tmp_path / "other").write_bytes(bytes(16384))
    (tmp_path / "other").replace(tmp_path / "model.onnx.data")
    np.testing.assert_array_equal(weight(model, "w").numpy(), np.arange(4096))


def test_a_data_file_refuses_ranges_outside(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(100)))
    file = DataFile(tmp_path / "data")
    assert file.map(90, 10).tolist() == list(range(90, 100))
    assert file.read(5, 3).tolist() == [5, 6, 7]
    assert file.map(100, 0).size == 0
    for offset, size in ((91, 10), (-1, 5), (0, 101), (5, -1)):
        with pytest.raises(GraphError, match="truncated or belongs to another model"):
            file.map(offset, size)
    with pytest.raises(GraphError, match="ends at byte 100"):
        file.read(95, 10)
