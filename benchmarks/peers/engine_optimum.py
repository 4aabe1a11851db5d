"""Optimum's ONNX export, through its ORTModelForCausalLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from protocol import Stopwatch, Timing, serve

_PIECE = 64


class OptimumEngine:
    """A model in memory."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        self.model = ORTModelForCausalLM.from_pretrained(job["model"], session_options=options, use_io_binding=True)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """See protocol.Engine."""
        given, past, cache = torch.tensor(prompts), 0, None
        watch = Stopwatch(len(prompts))
        for _ in range(count):
            output = self._forward(given, past, cache)
            past += given.shape[1]
            cache = output.past_key_values
            given = output.logits[:, -1:].argmax(dim=-1)
            watch.step(int(given[0, 0]))
        return watch.timing()

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See protocol.Engine."""
        cache = None
        for start in range(0, len(ids), _PIECE):
            output = self._forward(torch.tensor([ids[start : start + _PIECE]]), start, cache)
            cache = output.past_key_values
            yield output.logits[0].float().numpy()

    def _forward(self, given: torch.Tensor, past: int, cache: Any) -> Any:
        rows, length = given.shape
        return self.model(
            input_ids=given,
            attention_mask=torch.ones(rows, past + length, dtype=torch.long),
            position_ids=torch.arange(past, past + length)[None].expand(rows, -1).contiguous(),
            past_key_values=cache,
            use_cache=True,
        )


if __name__ == "__main__":
    serve(OptimumEngine)
