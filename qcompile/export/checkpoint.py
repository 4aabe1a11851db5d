"""What a checkpoint is to the graph builder: a config, tensors that stay on disk, the tokenizer's files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qcompile.errors import ExportError
from qcompile.model_config import ModelConfig

Array = npt.NDArray[Any]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class SourceTensor(Protocol):
    """One tensor of a checkpoint, in Hugging Face's name and layout ([out, in] for a projection).

    Attributes:
        shape: Static shape, rank 1 or 2; rank 1 counts as [1, n] for `block`.
        stored_as: How it is stored: F32, BF16, Q5_0, …
        dtype: What `block` returns: float32, float16 or ml_dtypes' bfloat16.
        column_multiple: Column ranges given to `block` start at a multiple of it (quantized blocks).
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    dtype: np.dtype[Any]
    column_multiple: int

    def block(self, rows: slice, columns: slice) -> Array:
        """Return the values of a sub-matrix; start and stop of both slices are given."""
        ...


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        description: For the manifest: format, path, dtype, …
        files: Tokenizer, chat template and generation config by name: a path to copy, or bytes.
        ties_head: The output head is the embedding matrix (one of the two names may be absent).
        notes: What was decided on the way and the user should know.
    """

    config: ModelConfig
    tensors: Mapping[str, SourceTensor]
    description: dict[str, Any]
    files: dict[str, bytes | Path] = field(default_factory=dict)
    ties_head: bool = False
    notes: list[str] = field(default_factory=list)

    def tensor(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """Return a tensor after checking its shape.

        Raises:
            ExportError: It is missing or has another shape than the config implies.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ExportError(
                f"{self.description.get('path')}: tensor '{name}' is missing; the checkpoint is "
                "incomplete or its "
                "config belongs to another model"
            )
        if tensor.dtype.kind in "iub":
            raise ExportError(
                f"{self.description.get('path')}: tensor '{name}' is stored as {tensor.stored_as}; "
                "F64, F32, F16 and "
                "BF16 are read; export the original checkpoint, not a quantized one"
            )
        if tensor.shape != shape:
            raise ExportError(
                f"{self.description.get('path')}: tensor '{name}' has shape {list(tensor.shape)}, the "
                "config means "
                f"{list(shape)}"
            )
        return tensor

    def check_size(self) -> None:
        """Check the config's layers and heads against the tensors, before anything is made for each of them.

        A graph grows with what the config says; a config of 2**31 layers is to cost nothing.

        Raises:
            ExportError: The checkpoint has fewer layers than the config says, or heads of another size.
        """
        config = self.config
        matches = (re.match(r"model\.layers\.(\d{1,10})\.", name) for name in self.tensors)
        stored = {int(match[1]) for match in matches if match}
        last = f"model.layers.{config.num_hidden_layers - 1}.self_attn.q_proj.weight"
        if len(stored) < config.num_hidden_layers:
            raise ExportError(
                f"{self.description.get('path')}: tensor '{last}' is missing: the config says "
                f"{config.num_hidden_layers} layers, the checkpoint has {len(stored)}; it is incomplete or its "
                "config belongs to another model"
            )
        self.tensor(last, (config.num_attention_heads * config.head_dim, config.hidden_size))

    def embedding(self) -> SourceTensor:
        """Return the embedding [V, D]; for a tied checkpoint the one matrix kept for both uses."""
        name = EMBEDDING if EMBEDDING in self.tensors or not self.ties_head else HEAD
        return self.tensor(name, (self.config.vocab_size, self.config.hidden_size))

    def head(self) -> SourceTensor:
        """Return the output head [V, D]; for a tied checkpoint without one, the embedding."""
        name = EMBEDDING if HEAD not in self.tensors and self.ties_head else HEAD
        return self.tensor(name, (self.config.vocab_size, self.config.hidden_size))
