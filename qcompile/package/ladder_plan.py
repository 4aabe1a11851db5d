"""Which rungs a package can have: decided from what the directories hold, before anything is packed."""

from dataclasses import dataclass
from pathlib import Path

from qcompile.artifact import load_model
from qcompile.errors import PackageError
from qcompile.export.safetensors_source import open_directory
from qcompile.package.contest.settings import Rung
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, check_file
from qcompile.runtime.static_buckets import StaticBuckets
from qcompile.runtime.tokenizer import Tokenizer

# what ONNX Runtime 1.19.2, the last one for Python 3.9, does not have: operator, and the bits it has kernels for
_NEWER_OPERATORS = frozenset({"GatherBlockQuantized"})
_MATMUL_NBITS = 4
_CHECKPOINT_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class PackedRung:
    """A rung, where its files come from, and whether questions go through a chat template."""

    rung: Rung
    source: Path
    files: tuple[str, ...]
    has_chat_template: bool = True


def compiled_rung(directory: Path, folder: str, max_model_len: int | None = None) -> PackedRung:
    """The rung that runs a compiled-model directory: ``acl`` or ``onnxruntime``, by its target.

    Raises:
        ManifestError: The directory is not whole, or holds no decoder.
        TokenizerError: It has no tokenizer.
        PackageError: The judge's ONNX Runtime cannot run its graph, or it holds fewer tokens than are wanted.
    """
    manifest = Manifest.load(directory)
    manifest.require_decoder(directory)
    entries = [*manifest.files]
    for graph in manifest.graphs:
        entries += [graph.file, *graph.data]
    for entry in entries:
        check_file(directory, entry)
    is_ascend = manifest.target.startswith("ascend")
    if is_ascend:
        _require_compiled(directory, manifest)
        limit = min(manifest.model.max_position_embeddings, StaticBuckets(manifest).max_capacity)
    else:
        _require_old_onnxruntime(directory, manifest)
        limit = manifest.model.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise PackageError(f"{directory}: holds {limit} tokens; --max-model-len {max_model_len} must not be more")
    names = dict.fromkeys([MANIFEST_NAME, *(entry.name for entry in entries)])
    rung = Rung("acl" if is_ascend else "onnxruntime", folder)
    return PackedRung(rung, directory, tuple(names), Tokenizer(directory, manifest).has_chat_template)


def checkpoint_rung(directory: Path, folder: str) -> PackedRung:
    """The rung that runs a Hugging Face checkpoint with transformers on torch_npu.

    Raises:
        PackageError: It is no checkpoint with safetensors weights.
        ExportError: Its weights or its config are not whole.
    """
    names = sorted(path.name for path in directory.glob("*") if path.is_file())  # the hub's cache is made of links
    lacking = [name for name in _CHECKPOINT_FILES if name not in names]
    if lacking or not any(name.endswith(".safetensors") for name in names):
        what = lacking[0] if lacking else "no .safetensors file"
        raise PackageError(f"{directory}: {what} is missing; --checkpoint takes a Hugging Face directory")
    open_directory(directory)  # what is cut off or lacks a shard would be found out by the judge
    kept = [name for name in names if name.endswith((".json", ".jinja", ".safetensors", ".txt"))]
    return PackedRung(Rung("torch_npu", folder), directory, tuple(kept))


def _require_compiled(directory: Path, manifest: Manifest) -> None:
    uncompiled = [graph.file.name for graph in manifest.graphs if not graph.file.name.endswith(".om")]
    if uncompiled:
        raise PackageError(
            f"{directory / uncompiled[0]}: not compiled yet; run `qcompile atc {directory} --soc-version ...` and "
            "package its output"
        )


def _require_old_onnxruntime(directory: Path, manifest: Manifest) -> None:
    name = manifest.graph("decoder").file.name
    for node in load_model(directory / name).graph.all_nodes():
        bits = node.attributes.get("bits")
        is_wide = node.op_type == "MatMulNBits" and bits is not None and bits.as_int() != _MATMUL_NBITS
        if node.op_type in _NEWER_OPERATORS or is_wide:
            operator = f"MatMulNBits of {bits.as_int()} bits" if is_wide and bits is not None else node.op_type
            raise PackageError(
                f"{directory / name}: node '{node.name}' is {operator}, which ONNX Runtime 1.19.2 (the last for the "
                "judge's Python 3.9) does not have; package the same model optimized with `--target portable`, or "
                "with `--passes fuse`"
            )
