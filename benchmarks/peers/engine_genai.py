"""onnxruntime-genai. A comparison must change two settings: its threads (one by default on two cores) and its end token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from protocol import Stopwatch, Timing, serve


class GenaiEngine:
    """A model in memory."""

    def __init__(self, job: dict[str, Any]) -> None:
        configure(Path(job["model"]), job["threads"])
        self.model = onnxruntime_genai.Model(onnxruntime_genai.Config(job["model"]))

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """See protocol.Engine."""
        watch = Stopwatch(len(prompts))
        generator = self._generator(len(prompts), len(prompts[0]) + count)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            watch.step(int(generator.get_next_tokens()[0]))
        return watch.timing()

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See protocol.Engine. Token by token: a pruned head gives the last position only."""
        generator = self._generator(1, len(ids) + 1)
        for token in ids:
            generator.append_tokens(np.array([[token]], np.int32))
            yield np.asarray(generator.get_logits(), np.float32).reshape(1, -1)

    def _generator(self, rows: int, length: int) -> Any:
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=length, batch_size=rows, do_sample=False)
        return onnxruntime_genai.Generator(self.model, params)


def configure(directory: Path, threads: int) -> None:
    """Set the number of threads, and an end token that no model writes."""
    path = directory / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    config["model"]["eos_token_id"] = config["model"]["vocab_size"] - 1
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    serve(GenaiEngine)
