"""Saving, loading and the compiled-model directory: round trips, bounded memory, and what goes wrong."""

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import weights_writer
from qcompile.artifact import ArtifactWriter, find_graph, graph_io_of, load_model, save_model
from qcompile.errors import ArtifactError, GraphError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, ModelShape, check_file, sha256_of
from qcompile.tensors import DataFile, MappedTensor, StreamedTensor, pieces_of

SHAPE = ModelShape("qwen2", 10, 1, 2, 1, 4, 128)


def model_of(*tensors: ir.TensorProtocol) -> ir.Model:
    """A graph that passes its input through, with initializers."""
    x = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch_size"]))
    node = ir.node("Identity", [x], name="logits")
    node.outputs[0].name = "logits"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["batch_size"])
    values = [
        ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape.numpy()), const_value=t)
        for t in tensors
    ]
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18}, name="toy")
    return ir.Model(graph, ir_version=10)


def streamed(array: np.ndarray, name: str = "w", **options: Any) -> StreamedTensor:
    dtype = ir.DataType.from_numpy(array.dtype)
    return StreamedTensor(lambda i, j: array[i:j], dtype, ir.Shape(array.shape), name=name, **options)


def weight(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def saved_weight(directory: Path, name: str = "w") -> Path:
    """Save a model with one external weight; returns the .onnx path."""
    path = directory / "model.onnx"
    save_model(model_of(ir.Tensor(np.arange(4096, dtype=np.float32), name=name)), path)
    return path


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    tensors = [ir.Tensor(np.ones(1500 + i, np.float32), name=f"w{i}") for i in range(4)]
    save_model(model_of(*tensors), tmp_path / "model.onnx")
    model = load_model(tmp_path / "model.onnx")
    offsets = [weight(model, f"w{i}").offset for i in range(4)]  # type: ignore[attr-defined]
    assert len(set(offsets)) == 4
    assert all(offset % 4096 == 0 for offset in offsets)


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


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_peak_memory_follows_the_piece_not_the_tensor(tmp_path: Path) -> None:
    """Save, load and save again a 768 MiB tensor; pages that were read must not stay resident."""
    script = """
        import resource, sys
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
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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


# a disk that fills up, an interrupted run


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    model = model_of(streamed(np.ones((1000, 1000), np.float32), piece_bytes=100_000))
    with (
        file_size_limit(500_000),
        pytest.raises(ArtifactError, match=r"model\.onnx\.data: cannot be written"),
    ):
        save_model(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_writing_the_graph_keeps_the_old_files(tmp_path: Path) -> None:
    path = saved_weight(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = model_of(ir.Tensor(np.ones(4096, np.float32), name="w" * 40_000))
    with file_size_limit(20_000), pytest.raises(ArtifactError, match="free some space"):
        save_model(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_no_space_is_said_in_plain_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, buffer: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights_writer._HashedFile, "write", full)
    with pytest.raises(ArtifactError, match="No space left on device; free some space") as caught:
        saved_weight(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        saved_weight(tmp_path / "absent")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    model = model_of(streamed(np.ones((1000, 1000), np.float32), piece_bytes=100_000))
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "out") as artifact:
        artifact.save_graph(model, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_result_and_is_swept_by_the_next(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        import numpy as np
        import onnx_ir as ir
        from qcompile.artifact import ArtifactWriter
        from tests.test_artifact import model_of, streamed
        def wait(done, total):
            print("writing", flush=True)
            time.sleep(60)
        model = model_of(streamed(np.ones((1000, 1000), np.float32), piece_bytes=100_000))
        with ArtifactWriter(Path(sys.argv[1])) as artifact:
            artifact.save_graph(model, progress=wait)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with ArtifactWriter(tmp_path / "out"):
            assert len(list(tmp_path.iterdir())) == 2, "a directory in use must not be swept"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_artifact(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# the compiled-model directory


def write_artifact(directory: Path, value: float = 1.0, **options: Any) -> Manifest:
    with ArtifactWriter(directory) as artifact:
        artifact.save_graph(model_of(ir.Tensor(np.full(4096, value, np.float32), name="w")))
        artifact.add_file("tokenizer.json", b"{}")
        return artifact.commit(target="portable", shape=SHAPE, **options)


def test_a_directory_is_complete_and_checks(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "out"
    written = write_artifact(directory, source={"path": "x"}, passes=({"name": "fuse"},))
    manifest = Manifest.load(directory)
    assert manifest == written
    assert manifest.graph().io.kv_cache == "concat"
    for entry in (manifest.graph().file, *manifest.graph().data, *manifest.files):
        check_file(directory, entry)
    assert sorted(path.name for path in directory.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        MANIFEST_NAME,
        "tokenizer.json",
    ]
    assert directory.stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert find_graph(directory) == (directory / "model.onnx", manifest)
    assert find_graph(directory / "model.onnx") == (directory / "model.onnx", manifest)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_compiled_model_is_replaced_and_other_files_are_kept(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    write_artifact(directory, 1.0)
    (directory / "notes.txt").write_text("mine")
    (directory / "logs").mkdir()
    (directory / "logs" / "a").write_text("b")
    write_artifact(directory, 2.0)
    assert (directory / "notes.txt").read_text() == "mine"
    assert (directory / "logs" / "a").read_text() == "b"
    assert weight(load_model(directory / "model.onnx"), "w").numpy()[0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_replacing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write_artifact(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to("real")
    write_artifact(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert weight(load_model(tmp_path / "real" / "model.onnx"), "w").numpy()[0] == 2.0


def test_a_link_to_another_file_system_is_followed(tmp_path: Path) -> None:
    """Staging happens beside the link's target, so the final rename never crosses file systems."""
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with ArtifactWriter(tmp_path / "link") as artifact:
        assert artifact.path.parent == tmp_path / "disk"


def test_a_mount_point_is_filled_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "volume"
    directory.mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == directory)
    with ArtifactWriter(directory) as artifact:
        assert artifact.path.parent == directory
        artifact.add_file("chat_template.jinja", b"old")
        artifact.save_graph(model_of(ir.Tensor(np.zeros(4096, np.float32), name="w")))
        artifact.commit(target="portable", shape=SHAPE)
    (directory / "notes.txt").write_text("mine")
    (tmp_path / "victim").write_text("not ours")
    hostile = (directory / MANIFEST_NAME).read_text().replace("chat_template.jinja", "../victim")
    (directory / MANIFEST_NAME).write_text(hostile)
    manifest = write_artifact(directory, 2.0)
    assert (tmp_path / "victim").exists()
    (directory / "chat_template.jinja").unlink()
    assert weight(load_model(directory / "model.onnx"), "w").numpy()[0] == 2.0
    assert Manifest.load(directory) == manifest
    names = {entry.name for entry in (manifest.graph().file, *manifest.graph().data, *manifest.files)}
    assert {path.name for path in directory.iterdir()} == names | {MANIFEST_NAME, "notes.txt"}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_artifact(tmp_path / "out")
    assert (tmp_path / "out" / MANIFEST_NAME).is_file()


def test_what_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / MANIFEST_NAME).write_text("[]")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, reason in {
        "file": "is a file",
        "checkpoint": "is not a compiled-model directory",
        "odd": "is not a compiled-model directory",
        "dangling": "dangling link",
    }.items():
        with pytest.raises(ArtifactError, match=reason):
            write_artifact(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 4


def test_an_error_inside_the_block_keeps_the_old_directory(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    write_artifact(directory, 1.0)
    with pytest.raises(ValueError, match="plain file name"), ArtifactWriter(directory) as artifact:
        artifact.add_file("../tokenizer.json", b"new")
    assert (directory / "tokenizer.json").read_bytes() == b"{}"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_keeps_the_old_directory(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    before = write_artifact(directory, 1.0)
    with file_size_limit(1000), pytest.raises(ArtifactError, match="cannot be written"):
        write_artifact(directory, 2.0)
    assert Manifest.load(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_manifest_is_written_last(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as artifact:
        artifact.save_graph(model_of(ir.Tensor(np.ones(4096, np.float32), name="w")))
        assert not (artifact.path / MANIFEST_NAME).exists()
        assert not (tmp_path / "out").exists()


def test_plain_names_only(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as artifact, pytest.raises(ValueError, match="plain file name"):
        artifact.add_file("../escape", b"")


def test_auxiliary_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "unrelated.txt").write_text("x")
    with ArtifactWriter(tmp_path / "out") as artifact:
        artifact.copy_auxiliary(tmp_path)
        artifact.save_graph(model_of(ir.Tensor(np.ones(4096, np.float32), name="w")))
        manifest = artifact.commit(target="portable", shape=SHAPE)
    assert [entry.name for entry in manifest.files] == ["tokenizer.json"]


def test_find_graph_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="holds neither"):
        find_graph(tmp_path)
    saved_weight(tmp_path)
    assert find_graph(tmp_path) == (tmp_path / "model.onnx", None)
    assert find_graph(tmp_path / "model.onnx") == (tmp_path / "model.onnx", None)


def test_the_interface_is_read_from_the_graph() -> None:
    io = graph_io_of(model_of())
    assert dataclasses.asdict(io) == {
        "kv_cache": "concat",
        "logits": "all",
        "inputs": ("input_ids",),
        "outputs": ("logits",),
        "dtype": "float32",
    }
    model = model_of()
    model.graph.outputs[0].name = "y"
    with pytest.raises(GraphError, match="'logits' is expected"):
        graph_io_of(model)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", config={"text": "中文"})
    text = (tmp_path / "out" / MANIFEST_NAME).read_text(encoding="utf-8")
    assert "中文" in text
    assert json.loads(text)["schema_version"] == 1
