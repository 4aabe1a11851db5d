"""The two models that are trained from nothing, and loading and saving of any Qwen directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

WEIGHTS = Path(__file__).parent / "weights"
_COMMON: dict[str, Any] = {
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "attention_dropout": 0.0,
}
SHAPES: dict[str, dict[str, int]] = {
    "student": {
        "hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 1024,
    },
    "teacher": {
        "hidden_size": 768, "num_hidden_layers": 10, "num_attention_heads": 12, "num_key_value_heads": 4,
        "intermediate_size": 2304,
    },
    "micro": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 128,
    },
}  # fmt: skip


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a directory; the bundled one for the shapes of this module."""
    path = WEIGHTS if str(directory) in SHAPES else directory
    return AutoTokenizer.from_pretrained(str(path))


def load_model(source: str | Path, *, seed: int = 0) -> Any:
    """A model with fp32 weights: new when `source` names a shape of this module, else read from a directory."""
    if str(source) in SHAPES:
        return new_model(str(source), seed=seed)
    return AutoModelForCausalLM.from_pretrained(str(source), dtype=torch.float32)


def new_model(shape: str, *, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights: normal(0, 0.02), residual outputs scaled down with depth."""
    tokenizer = load_tokenizer(shape)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[shape],
        **_COMMON,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    return model


def num_parameters(model: Any) -> int:
    """Parameters, a tied tensor counted once."""
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


def save_model(model: Any, tokenizer_from: str | Path, directory: str | Path) -> None:
    """Write a Hugging Face directory with bf16 weights; a tied head is stored once, as the embedding."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    temporary = directory / "model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.replace(directory / "model.safetensors")
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": [type(model).__name__], "use_cache": True}
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    end = model.config.eos_token_id
    GenerationConfig(eos_token_id=end, pad_token_id=model.config.pad_token_id, do_sample=False).save_pretrained(
        directory
    )
    source = WEIGHTS if str(tokenizer_from) in SHAPES else Path(tokenizer_from)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        if (source / name).exists() and source.resolve() != directory.resolve():
            shutil.copyfile(source / name, directory / name)
