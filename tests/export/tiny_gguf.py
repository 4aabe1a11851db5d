"""Write a tiny checkpoint as GGUF, the way llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qcompile.export.gguf_source import hf_name
from tests.tiny_checkpoints import CHAT_TEMPLATE, build_tokenizer, random_tensors, tiny_config

_LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "attn_q_norm",
    "attn_k_norm",
    "ffn_norm",
)
_NAMES = {
    hf_name(f"blk.{i}.{part}.{kind}"): f"blk.{i}.{part}.{kind}"
    for i in range(4)
    for part in (*_LAYER_TENSORS, "ffn_gate", "ffn_up", "ffn_down")
    for kind in ("weight", "bias")
} | {hf_name(name): name for name in ("token_embd.weight", "output.weight", "output_norm.weight")}


def gguf_config(model_type: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    """Return a tiny config whose rows are whole K-quant blocks (256)."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny_config(model_type, **(sizes | overrides))


def write_gguf(
    path: Path,
    config: dict[str, Any],
    *,
    kinds: dict[str, str] | None = None,
    head: np.ndarray | None = None,
    others: dict[str, np.ndarray] | None = None,
    tokenizer: bool = True,
    fields: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Write a .gguf; returns the float32 tensors it was made from, under Hugging Face's names.

    Args:
        path: The file.
        config: As from `gguf_config`.
        kinds: Quantization by the end of the HF name ("up_proj.weight": "Q4_K"); F32 for the rest.
        head: Matrix to store as output.weight besides the embedding.
        others: Tensors to replace, under Hugging Face's names, or to add, under GGUF's.
        tokenizer: Also write the tokenizer.
        fields: Further metadata; None leaves out a key that would be written.
    """
    writer = gguf.GGUFWriter(path, config["model_type"])
    for key, value in (_metadata(config) | (_tokenizer_metadata() if tokenizer else {}) | (fields or {})).items():
        _add(writer, key, value)
    tensors = random_tensors(config)
    if head is not None:
        tensors["lm_head.weight"] = head
    tensors |= others or {}
    for name, array in tensors.items():
        matches = [kind for end, kind in (kinds or {}).items() if name.endswith(end)]
        kind = gguf.GGMLQuantizationType[matches[0] if matches else "F32"]
        stored = gguf.quants.quantize(array, kind)
        writer.add_tensor(_NAMES.get(name, name), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    kind = config["model_type"]
    return {
        "general.name": "tiny",
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.key_length": config.get("head_dim"),
        f"{kind}.rope.freq_base": float(config["rope_theta"]),
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }


def _tokenizer_metadata() -> dict[str, Any]:
    """Return the metadata of the tiny tokenizer, padded to 512 entries as converters pad to the embedding."""
    import json

    record = json.loads(build_tokenizer().to_str())
    tokens: dict[int, str] = {token_id: text for text, token_id in record["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in record["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    for token_id in range(len(tokens), 512):
        tokens[token_id], types[token_id] = f"[PAD{token_id}]", gguf.TokenType.UNUSED
    order = range(512)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [tokens[i] for i in order],
        "tokenizer.ggml.token_type": [int(types[i]) for i in order],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in record["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 402,
        "tokenizer.ggml.padding_token_id": 400,
        "tokenizer.ggml.bos_token_id": 400,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
