"""Tiny Qwen checkpoints with fixed seeds, as Hugging Face writes them: for tests and for the demo. Needs no
torch.

    python -m tests.tiny_checkpoints DIR --model-type qwen3

They have a real byte-level BPE tokenizer (trained on the lines below), Qwen's special tokens and Qwen's chat
template, and random weights of such a size that attention is neither flat nor saturated.
"""

import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CHAT_TEMPLATE = (Path(__file__).parent / "data" / "qwen2.5_chat_template.jinja").read_text(encoding="utf-8")
VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN_ADDED_TOKENS = ("<tool_call>", "</tool_call>")
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital.",
    "system\nYou are a helpful assistant.\nuser\nWrite a function that adds two numbers.\nassistant\n",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1))\n",
    "你好，世界！请用中文回答：十二加三十等于多少？答案是四十二。我们一起学习编译器。",
    "12 + 30 = 42; 7 * 8 = 56; 100 - 1 = 99. Therefore the answer is 42.",
)
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Tensors = dict[str, np.ndarray]


def write_tiny_checkpoint(
    directory: Path,
    model_type: str = "qwen2",
    *,
    dtype: str = "float32",
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write config.json, safetensors, tokenizer and generation config; returns the directory.

    Args:
        directory: Created when missing.
        model_type: ``qwen2`` or ``qwen3``.
        dtype: Stored dtype: float32, float16 or bfloat16.
        seed: Of the weights.
        shards: Above 1: that many safetensors files with an index.
        tokenizer: Also write tokenizer.json, tokenizer_config.json and generation_config.json.
        config_overrides: config.json entries to set; None removes an entry.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(model_type, torch_dtype=dtype, **config_overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = random_tensors(config, seed=seed, dtype=dtype)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
    else:
        _write_shards(directory, tensors, dtype, shards)
    if tokenizer:
        write_tokenizer(directory)
    return directory


def tiny_config(model_type: str = "qwen2", **overrides: Any) -> dict[str, Any]:
    """Return a config.json as a dict; qwen2 ties its embeddings, qwen3 has an explicit head_dim."""
    config: dict[str, Any] = {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]],
        "attention_dropout": 0.0,
        "bos_token_id": 400,
        "eos_token_id": 402,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 160,
        "max_position_embeddings": 2048,
        "max_window_layers": 2,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 2048,
        "tie_word_embeddings": model_type == "qwen2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    if model_type == "qwen3":
        config |= {"head_dim": 32, "attention_bias": False}
    config |= overrides
    return {key: value for key, value in config.items() if value is not None}


def random_tensors(config: Mapping[str, Any], *, seed: int = 0, dtype: str = "float32") -> Tensors:
    """Return the named weights of a config, seeded, in the checkpoint's own order and layout ([out, in])."""
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    is_qwen3 = config["model_type"] == "qwen3"
    has_qkv_bias = config.get("attention_bias", False) if is_qwen3 else True
    element = _DTYPES[dtype]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns), np.float32) / np.sqrt(columns)).astype(element)

    def vector(length: int, mean: float) -> np.ndarray:
        return (mean + 0.2 * rng.standard_normal(length, np.float32)).astype(element)

    tensors: Tensors = {"model.embed_tokens.weight": (matrix(vocab, hidden) * 4).astype(element)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = vector(hidden, 1.0)
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(rows * head_dim, hidden)
            if has_qkv_bias:
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = vector(rows * head_dim, 0.0)
            if is_qwen3 and name != "v":
                tensors[f"{layer}.self_attn.{name}_norm.weight"] = vector(head_dim, 1.5)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        if is_qwen3 and has_qkv_bias:
            tensors[f"{layer}.self_attn.o_proj.bias"] = vector(hidden, 0.0)
        tensors[f"{layer}.post_attention_layernorm.weight"] = vector(hidden, 1.0)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(ffn, hidden)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(ffn, hidden)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, ffn)
    tensors["model.norm.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


def write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    """Write one safetensors file (the format: header length, JSON header, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        span = [end, end + array.nbytes]
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(array.shape), "data_offsets": span}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            stream.write(array.tobytes())


def build_tokenizer() -> Tokenizer:
    """Train the byte-level BPE tokenizer; ids 0 to 399 are plain tokens, the added ones follow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED_TOKENS])
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json."""
    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    added = tokenizer.get_added_tokens_decoder()
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {"content": token.content, "special": token.special} for token_id, token in added.items()
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation_config = {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "do_sample": True,
        "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
    }
    for name, record in (("tokenizer_config", tokenizer_config), ("generation_config", generation_config)):
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (directory / f"{name}.json").write_text(text, encoding="utf-8")


def _write_shards(directory: Path, tensors: Tensors, dtype: str, shards: int) -> None:
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(directory / file_name, part, dtype)
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Write one tiny checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model-type", choices=["qwen2", "qwen3"], default="qwen2")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_tiny_checkpoint(options.directory, options.model_type, dtype=options.dtype, seed=options.seed)


if __name__ == "__main__":
    main()
