"""The compiled-model directory, a disk that fills up and a run that is interrupted."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import weights_writer
from qcompile.artifact import ArtifactWriter, Provenance, find_graph, graph_io_of, load_model, save_model
from qcompile.errors import ArtifactError, GraphError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, check_file
from tests.graphs_on_disk import SHAPE, file_size_limit, model_of, saved_weight, streamed, weight

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
        from tests.graphs_on_disk import model_of, streamed
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
        return artifact.commit(Provenance("portable", SHAPE, **options))


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
        artifact.commit(Provenance("portable", SHAPE))
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
        manifest = artifact.commit(Provenance("portable", SHAPE))
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
        "attention": "",
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
