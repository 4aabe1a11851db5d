"""ModelConfig out of GGUF metadata, by way of the config.json it was converted from."""

from typing import Any

import numpy as np

from qcompile.errors import ExportError
from qcompile.export.gguf_header import GgufHeader
from qcompile.model_config import ModelConfig

_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
}
_YARN = {
    "attention_factor": "attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def model_config(header: GgufHeader, where: str) -> ModelConfig:
    """Translate metadata keys to config.json's and check them there.

    Raises:
        ExportError: The architecture is not supported, or a key is missing or wrong.
    """
    fields = header.fields
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ExportError(f"{where}: architecture {kind!r} is not one qcompile builds from GGUF (qwen2, qwen3)")
    if fields.get("split.count", 1) not in (0, 1):  # a tuple: an array, as of a damaged file, has no hash
        raise ExportError(
            f"{where}: is one part of {fields['split.count']}; merge them first (llama.cpp's gguf-split --merge)"
        )
    record: dict[str, Any] = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind}
    for word, key in _SIZES.items():
        if f"{kind}.{key}" not in fields:
            raise ExportError(f"{where}: metadata key '{kind}.{key}' is missing; convert the model again")
        record[word] = fields[f"{kind}.{key}"]
    record["rms_norm_eps"] = _shortest(fields.get(f"{kind}.attention.layer_norm_rms_epsilon"))
    record["rope_theta"] = _shortest(fields.get(f"{kind}.rope.freq_base", 10000.0))
    record["rope_scaling"] = _rope_scaling(fields, kind)
    record["attention_bias"] = "blk.0.attn_q.bias" in header.entries
    record["head_dim"] = _head_dim(header, kind)
    record["vocab_size"] = _vocab_size(header, where)
    record["tie_word_embeddings"] = "output.weight" not in header.entries
    record["bos_token_id"] = fields.get("tokenizer.ggml.bos_token_id")
    record["eos_token_id"] = fields.get("tokenizer.ggml.eos_token_id")
    if fields.get(f"{kind}.expert_count"):
        record["num_experts"] = fields[f"{kind}.expert_count"]
    if fields.get(f"{kind}.attention.sliding_window"):
        record["layer_types"] = ["sliding_attention"]
    return ModelConfig.from_dict({key: value for key, value in record.items() if value is not None}, where)


def _shortest(value: Any) -> Any:
    """Return the shortest decimal that is this float32: 9.999999974752427e-07 was written as 1e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(fields: dict[str, Any], kind: str) -> dict[str, Any] | None:
    prefix = f"{kind}.rope.scaling"
    rope_type = fields.get(f"{prefix}.type", "none")
    if rope_type == "none":
        return None
    scaling = {"rope_type": rope_type, "factor": _shortest(fields.get(f"{prefix}.factor"))}
    scaling["original_max_position_embeddings"] = fields.get(f"{prefix}.original_context_length")
    if rope_type == "yarn":
        scaling |= {word: _shortest(fields.get(f"{prefix}.{key}")) for word, key in _YARN.items()}
    return {word: value for word, value in scaling.items() if value is not None}


def _head_dim(header: GgufHeader, kind: str) -> int | None:
    explicit = header.fields.get(f"{kind}.attention.key_length")
    if explicit is not None:
        return int(explicit) if isinstance(explicit, int) else None
    query = header.entries.get("blk.0.attn_q.weight")
    heads = header.fields.get(f"{kind}.attention.head_count")
    if query is None or not isinstance(heads, int) or heads <= 0 or query.shape[0] % heads:
        return None
    return query.shape[0] // heads


def _vocab_size(header: GgufHeader, where: str) -> int:
    embedding = header.entries.get("token_embd.weight")
    if embedding is None:
        raise ExportError(f"{where}: tensor 'token_embd.weight' is missing; the file is not a language model")
    return embedding.shape[0]
