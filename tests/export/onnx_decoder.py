"""Run an exported decoder graph on ONNX Runtime, its cache carried along; and transformers beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompile.export.torch_tracer import cache_argument
from qcompile.model_config import ModelConfig

Cache = list[tuple[np.ndarray, np.ndarray]]


class OnnxDecoder:
    """One exported graph (float32 or float16) with its KV cache."""

    def __init__(self, graph: Path, config: ModelConfig, dtype: Any = np.float32, *, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.config, self.dtype = config, dtype
        self.cache: Cache = []

    def reset(self) -> None:
        """Forget what was seen."""
        self.cache = []

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Run ids [B,S] with mask [B,T] and positions [B,S]; returns logits [B,S,V]."""
        config = self.config
        if not self.cache:
            empty = np.zeros((len(ids), config.num_key_value_heads, 0, config.head_dim), self.dtype)
            self.cache = [(empty, empty)] * config.num_hidden_layers
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for i, (key, value) in enumerate(self.cache):
            feeds |= {f"past_key_values.{i}.key": key, f"past_key_values.{i}.value": value}
        logits, *present = self.session.run(None, feeds)
        self.cache = list(zip(present[::2], present[1::2], strict=True))
        return np.asarray(logits, np.float32)


class TorchDecoder:
    """The transformers model of a checkpoint directory, stepped in the same way."""

    def __init__(self, directory: Path, attention: str = "eager") -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        ).eval()
        self.torch = torch
        self.cache: Any = None

    @classmethod
    def of(cls, model: Any) -> "TorchDecoder":
        """Return a decoder for a model that is already in memory."""
        import torch

        decoder = cls.__new__(cls)
        decoder.model, decoder.torch, decoder.cache = model, torch, None
        return decoder

    def reset(self) -> None:
        """Forget what was seen."""
        self.cache = None

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Run ids [B,S] with mask [B,T] and positions [B,S]; returns logits [B,S,V]."""
        tensors = [self.torch.from_numpy(np.ascontiguousarray(array)) for array in (ids, mask, positions)]
        with self.torch.no_grad():
            answer = self.model(
                input_ids=tensors[0],
                attention_mask=tensors[1],
                position_ids=tensors[2],
                use_cache=True,
                **{cache_argument(self.model): self.cache},
            )
        self.cache = getattr(answer, cache_argument(self.model))
        return np.asarray(answer.logits.numpy())


def steps_of(
    prompt_mask: Sequence[Sequence[int]], chunks: Sequence[int], *, vocab: int, seed: int = 0, offset: int = 0
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (ids, mask, positions) of a prefill with a padding mask, then of each further chunk."""
    rng = np.random.default_rng(seed)
    mask = np.asarray(prompt_mask, np.int64)
    steps = []
    for number, length in enumerate((mask.shape[1], *chunks)):
        if number:
            mask = np.concatenate([mask, np.ones((len(mask), length), np.int64)], axis=1)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -length:] + offset
        steps.append((rng.integers(0, vocab, (len(mask), length)), mask, positions))
    return steps
