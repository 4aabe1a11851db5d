"""Open a .gguf file as a checkpoint: Hugging Face's tensor names, config and tokenizer from the metadata."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qcompile.errors import ExportError
from qcompile.export.checkpoint import EMBEDDING, HEAD, Array, Checkpoint, SourceTensor
from qcompile.export.gguf_header import GgufEntry, read_header
from qcompile.export.gguf_metadata import model_config
from qcompile.export.gguf_tokenizer import gguf_tokenizer_files
from qcompile.export.tokenizer_files import note_end_ids
from qcompile.tensors import DataFile

# a tied matrix stored at two precisions agrees to 0.99 or better; two trained matrices are nearly orthogonal
TIED_COSINE = 0.98
_SAMPLED_ROWS = 4096
_CALL_ELEMENTS = 65536
_PLAIN: dict[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.F64: np.dtype("<f8"),
}
_GLOBAL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output.weight": HEAD,
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufTensor:
    """A tensor of a GGUF file; `block` maps the rows it is asked for and dequantizes them to float32."""

    def __init__(self, file: DataFile, name: str, entry: GgufEntry) -> None:
        self.file, self.name, self.entry = file, name, entry
        self.shape = entry.shape
        self.stored_as = entry.kind.name
        self.dtype = np.dtype(_PLAIN.get(entry.kind, np.float32))
        self.column_multiple, self._block_bytes = GGML_QUANT_SIZES[entry.kind]
        self._dequantize = None if entry.kind in _PLAIN else getattr(quants, entry.kind.name).dequantize_blocks

    def block(self, rows: slice, columns: slice) -> Array:
        """Return float values of a sub-matrix; column bounds fall on block boundaries."""
        width, multiple = self.shape[-1], self.column_multiple
        row_bytes = width // multiple * self._block_bytes
        height = rows.stop - rows.start
        raw = self.file.map(self.entry.offset + rows.start * row_bytes, height * row_bytes)
        if self._dequantize is None:
            return raw.view(self.dtype).reshape(height, width)[:, columns]
        first, last = columns.start // multiple, -(-columns.stop // multiple)
        blocks = raw.reshape(height, width // multiple, self._block_bytes)[:, first:last]
        out = np.empty((height, (last - first) * multiple), np.float32)
        step = max(1, _CALL_ELEMENTS // out.shape[1])
        with np.errstate(all="ignore"):
            for top in range(0, height, step):
                part = blocks[top : top + step].reshape(-1, self._block_bytes)
                out[top : top + step] = self._dequantize(part).reshape(-1, out.shape[1])
        return out


def open_gguf(path: Path, *, tie: bool = True) -> Checkpoint:
    """Open a .gguf file.

    Args:
        path: The file.
        tie: Recognize an embedding that is stored twice and keep the finer copy for both uses.

    Raises:
        ExportError: The file is damaged, or the model or a quantization type is not supported.
    """
    try:
        file = DataFile(path)
    except OSError as error:
        raise ExportError(f"{path}: cannot be opened: {error.strerror or error}") from None
    header = read_header(file)
    config = model_config(header, str(path))
    notes: list[str] = []
    tensors = _named_tensors(file, header.entries, notes)
    ties_head = HEAD not in tensors
    if tie and not ties_head and config.tie_word_embeddings is False:
        ties_head = _merge_stored_twice(tensors, notes)
    note_end_ids(config.eos_token_ids, config.vocab_size, str(path), notes)
    return Checkpoint(
        config=config,
        tensors=tensors,
        description={
            "format": "gguf",
            "path": str(path),
            "name": str(header.fields.get("general.name", "")),
            "stored_as": sorted({tensor.stored_as for tensor in tensors.values()}),
        },
        files=gguf_tokenizer_files(header.fields, config, str(path), notes),
        ties_head=ties_head,
        notes=notes,
    )


def _named_tensors(file: DataFile, entries: Mapping[str, GgufEntry], notes: list[str]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    unknown = []
    for gguf_name, entry in entries.items():
        name = hf_name(gguf_name)
        if name is None:
            unknown.append(gguf_name)
            continue
        if entry.kind not in _PLAIN and not hasattr(quants, entry.kind.name):
            raise ExportError(
                f"{file.path}: tensor '{gguf_name}' is stored as {entry.kind.name}, which the gguf "
                "package cannot "
                "dequantize"
            )
        if name in tensors:
            raise ExportError(
                f"{file.path}: tensor '{gguf_name}' is a second '{name}'; one of each is expected; "
                "convert the model again"
            )
        tensors[name] = GgufTensor(file, name, entry)
    if "rope_freqs.weight" in unknown:
        raise ExportError(f"{file.path}: has rope_freqs.weight (per-frequency rope factors), which is not supported")
    if unknown:
        notes.append(f"{len(unknown)} tensors of the file are not used: {', '.join(sorted(unknown)[:3])}")
    return tensors


def hf_name(gguf_name: str) -> str | None:
    """Return Hugging Face's name for a GGUF tensor name, or None when Qwen has no such tensor."""
    if gguf_name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _LAYER_NAMES:
        return None
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _merge_stored_twice(tensors: dict[str, SourceTensor], notes: list[str]) -> bool:
    """If embedding and head hold the same matrix, keep only the finer copy; returns whether they do."""
    embedding, head = tensors.get(EMBEDDING), tensors[HEAD]
    if embedding is None or embedding.shape != head.shape or len(head.shape) != 2:
        return False
    cosine = _cosine(embedding, head)
    # written so that a NaN, which compares as neither, keeps both
    if not cosine >= TIED_COSINE:
        return False
    finer, coarser = (head, embedding) if _bits(head) >= _bits(embedding) else (embedding, head)
    del tensors[coarser.name]
    notes.append(
        f"the embedding is stored twice, {embedding.stored_as} for token_embd and {head.stored_as} "
        "for output (cosine "
        f"{cosine:.4f}): the {finer.stored_as} copy is used for both; --no-tie keeps both"
    )
    return True


def _bits(tensor: SourceTensor) -> float:
    block_length, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.stored_as]]
    return float(8 * block_bytes / block_length)


def _cosine(a: SourceTensor, b: SourceTensor) -> float:
    """Return the cosine of two matrices over rows spread evenly through them."""
    rows, columns = a.shape[0], slice(0, a.shape[1])
    dot = norm_a = norm_b = 0.0
    band = 64
    num_bands = max(1, min(rows, _SAMPLED_ROWS) // band)
    for i in range(num_bands):
        start = i * rows // num_bands
        part = slice(start, min(start + band, rows))
        x, y = (tensor.block(part, columns).astype(np.float64).ravel() for tensor in (a, b))
        dot, norm_a, norm_b = dot + float(x @ y), norm_a + float(x @ x), norm_b + float(y @ y)
    return dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else 0.0
