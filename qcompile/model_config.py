"""ModelConfig: what a Qwen checkpoint's config.json says, checked, in Hugging Face's words.

Dense Qwen2 and Qwen3 are built (Qwen2.5 and DeepSeek-R1-Distill-Qwen are Qwen2); everything else is refused
with the reason, because a graph built from a half-understood config would be silently wrong.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ExportError
from qcompile.rope import RopeParameters
from qcompile.runtime.manifest import ModelShape

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_MAX_CONFIG_BYTES = 16 << 20
_MAX_DIMENSION = 1 << 31
# well within float32, which the graph computes in
_MAX_NUMBER = 1e30
_TRACE_HINT = "`--via torch` can trace checkpoints the builder does not know"


@dataclass(frozen=True)
class ModelConfig:
    """The part of config.json that decides the graph.

    Attributes:
        attention_bias: q, k and v projections have a bias (always so for qwen2).
        output_bias: o_proj has one too (qwen3 with attention_bias).
        qk_norm: q and k are normalized per head (qwen3).
        torch_dtype: The dtype the checkpoint names for itself, or None.
        eos_token_ids: Stop ids; may be empty.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    output_bias: bool = False
    qk_norm: bool = False
    torch_dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Weights of the model: norms and biases too, an embedding that is shared once."""
        width, heads = self.hidden_size, self.num_attention_heads + 2 * self.num_key_value_heads
        layer = width * heads * self.head_dim + self.num_attention_heads * self.head_dim * width
        layer += 3 * width * self.intermediate_size + 2 * width
        layer += heads * self.head_dim * self.attention_bias + width * self.output_bias
        layer += 2 * self.head_dim * self.qk_norm
        vocabulary = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + vocabulary + width

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """Read and check a config.json.

        Raises:
            ExportError: The file is missing or not JSON, a key is missing or wrong, or the model is not
                supported.
        """
        return cls.from_dict(read_json_object(path), str(path))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str) -> "ModelConfig":
        """Check a config.json that is already a dict; `where` names it in messages."""
        keys = _Keys(record, where)
        model_type = _model_type(keys)
        _refuse_variants(keys)
        heads = keys.size("num_attention_heads")
        kv_heads = heads if keys.is_null("num_key_value_heads") else keys.size("num_key_value_heads")
        hidden_size = keys.size("hidden_size")
        if heads % kv_heads:
            raise keys.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        max_positions = keys.size("max_position_embeddings")
        biased = model_type == "qwen2" or keys.flag("attention_bias")
        head_dim = _head_dim(keys, model_type, hidden_size, heads)
        return cls(
            model_type=model_type,
            vocab_size=keys.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=keys.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.positive("rms_norm_eps"),
            rope_parameters=RopeParameters.from_config(record, max_positions, where),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            attention_bias=biased,
            output_bias=biased and model_type == "qwen3",
            qk_norm=model_type == "qwen3",
            torch_dtype=keys.optional_text("dtype") or keys.optional_text("torch_dtype"),
            bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
            eos_token_ids=keys.token_ids("eos_token_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json-like dict that `from_dict` reads back to an equal ModelConfig."""
        record = asdict(self)
        del record["output_bias"], record["qk_norm"], record["eos_token_ids"]
        record["rope_parameters"] = self.rope_parameters.to_dict()
        record["eos_token_id"] = list(self.eos_token_ids)
        record["architectures"] = [name for name, kind in ARCHITECTURES.items() if kind == self.model_type]
        return record

    def shape(self) -> ModelShape:
        """Return the few words the runtime needs."""
        return ModelShape(
            model_type=self.model_type,
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
        )


def read_json_object(path: Path, max_bytes: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        ExportError: The file is missing, too large, not UTF-8, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise ExportError(f"{path}: larger than {max_bytes} bytes; this is not the JSON file it should be")
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: missing; the directory is not a complete Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(record, dict):
        raise ExportError(f"{path}: a JSON object is expected, got {type(record).__name__}")
    return record


class _Keys:
    """Typed access to a config; every refusal names the key and the file."""

    def __init__(self, record: Mapping[str, Any], where: str) -> None:
        self.record, self.where = record, where

    def is_null(self, key: str) -> bool:
        return key in self.record and self.record[key] is None

    def value(self, key: str) -> Any:
        if key not in self.record:
            raise ExportError(f"{self.where}: key '{key}' is missing; take config.json from the original checkpoint")
        return self.record[key]

    def wrong(self, key: str, wanted: str) -> ExportError:
        return ExportError(f"{self.where}: '{key}' is {self.record.get(key)!r}; {wanted} is expected")

    def size(self, key: str) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_DIMENSION:
            raise self.wrong(key, "a positive integer")
        return value

    def positive(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MAX_NUMBER:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.record.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def optional_text(self, key: str) -> str | None:
        value = self.record.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.record.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in ids):
            raise self.wrong(key, "a token id or a list of them")
        return tuple(ids)


def _model_type(keys: _Keys) -> str:
    architectures = keys.record.get("architectures")
    model_type = keys.optional_text("model_type")
    if architectures is not None:
        if not isinstance(architectures, list) or not architectures:
            raise keys.wrong("architectures", "a list of one class name")
        name = str(architectures[0])
        if name not in ARCHITECTURES:
            raise ExportError(f"{keys.where}: architecture {name} {_why_not(name)}; {_TRACE_HINT}")
        if model_type not in {None, ARCHITECTURES[name]}:
            raise keys.wrong("model_type", f"'{ARCHITECTURES[name]}' (architectures says {name})")
        return ARCHITECTURES[name]
    if model_type is None:
        raise ExportError(f"{keys.where}: neither 'architectures' nor 'model_type' says what model this is")
    if model_type not in ARCHITECTURES.values():
        raise ExportError(f"{keys.where}: model_type '{model_type}' {_why_not(model_type)}; {_TRACE_HINT}")
    return model_type


def _why_not(name: str) -> str:
    lowered = name.lower()
    known = "is not one qcompile builds (Qwen2ForCausalLM, Qwen3ForCausalLM)"
    if "moe" in lowered:
        return "is a mixture of experts, which qcompile does not build"
    if "vl" in lowered or "omni" in lowered or "audio" in lowered or "vision" in lowered:
        return "takes more than text, which qcompile does not build"
    if lowered.startswith("qwen") and name.endswith(("Classification", "Model", "Answering")):
        return "has no language-model head; only ...ForCausalLM generates text"
    return known


def _refuse_variants(keys: _Keys) -> None:
    """Refuse what would change the graph in a way the builder does not express."""
    act = keys.record.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise keys.wrong("hidden_act", "'silu'")
    experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if keys.record.get(key)]
    if experts:
        raise ExportError(f"{keys.where}: '{experts[0]}' is set: a mixture of experts, which qcompile does not build")
    if keys.record.get("quantization_config"):
        raise ExportError(
            f"{keys.where}: 'quantization_config' is set: the weights are already quantized; export "
            "the original "
            "checkpoint and quantize with `qcompile optimize`"
        )
    _refuse_sliding_window(keys)


def _refuse_sliding_window(keys: _Keys) -> None:
    cure = "qcompile builds full attention only"
    layer_types = keys.record.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise keys.wrong("layer_types", "a list")
        others = sorted({str(kind) for kind in layer_types} - {"full_attention"})
        if others:
            raise ExportError(f"{keys.where}: 'layer_types' has {', '.join(others)} layers; {cure}")
        return
    if not keys.flag("use_sliding_window") or keys.record.get("sliding_window", 4096) is None:
        return
    first = keys.record.get("max_window_layers", 28)
    if not isinstance(first, int) or first < keys.size("num_hidden_layers"):
        raise ExportError(
            f"{keys.where}: 'use_sliding_window' is true and layers from {first} on slide over "
            f"{keys.record.get('sliding_window', 4096)} tokens; {cure}"
        )


def _head_dim(keys: _Keys, model_type: str, hidden_size: int, heads: int) -> int:
    """Return head_dim: explicit, else hidden_size / heads (transformers' Qwen3 defaults to 128)."""
    if keys.record.get("head_dim") is not None:
        head_dim = keys.size("head_dim")
    elif model_type == "qwen3" and "head_dim" not in keys.record:
        head_dim = 128
    elif hidden_size % heads:
        raise keys.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}), as head_dim is not given,")
    else:
        head_dim = hidden_size // heads
    if head_dim % 2 or head_dim < 4:
        raise ExportError(f"{keys.where}: head_dim is {head_dim}; an even number of at least 4 is expected")
    return head_dim
