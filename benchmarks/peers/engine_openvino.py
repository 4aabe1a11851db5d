"""OpenVINO GenAI for speed, plain OpenVINO for logits. It keeps prompt prefixes between calls unless told not to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Timing, serve

_PIECE = 64


class OpenvinoEngine:
    """A model in memory; each of the two forms is loaded when it is first needed."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.directory, self.threads = job["model"], job["threads"]
        self.pipeline: Any = self._pipeline() if job["task"] == "speed" else None
        self.request: Any = self._request() if job["task"] != "speed" else None

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """See protocol.Engine."""
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        result = self.pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        first = metrics.get_ttft().mean / 1000
        total = metrics.get_generate_duration().mean / 1000
        return Timing(first, total - first, len(prompts) * (count - 1), [int(t) for t in result.tokens[0]])

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See protocol.Engine."""
        self.request.reset_state()
        for start in range(0, len(ids), _PIECE):
            piece = np.array([ids[start : start + _PIECE]], np.int64)
            stop = start + piece.shape[1]
            feeds = {
                "input_ids": piece,
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            names = {name for port in self.request.model_inputs for name in port.names}
            self.request.infer({name: value for name, value in feeds.items() if name in names})
            yield np.array(self.request.get_tensor("logits").data[0], np.float32)

    def _pipeline(self) -> Any:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1
        scheduler.max_num_batched_tokens = 2048
        return openvino_genai.LLMPipeline(
            self.directory, "CPU", INFERENCE_NUM_THREADS=self.threads, scheduler_config=scheduler
        )

    def _request(self) -> Any:
        core = openvino.Core()
        model = core.read_model(Path(self.directory) / "openvino_model.xml")
        return core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": self.threads}).create_infer_request()


if __name__ == "__main__":
    serve(OpenvinoEngine)
