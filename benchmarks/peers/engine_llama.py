"""llama.cpp through the C interface of llama-cpp-python: batches, and the logits of every token."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from protocol import Stopwatch, Timing, serve

_PIECE = 64


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Say nothing."""


class LlamaEngine:
    """A model in memory; every generation has a context of its own."""

    def __init__(self, job: dict[str, Any]) -> None:
        llama_cpp.llama_log_set(_quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self.threads = job["threads"]
        self.model = llama_cpp.llama_model_load_from_file(f"{job['model']}/model.gguf".encode(), params)
        if not self.model:
            raise RuntimeError(f"{job['model']}/model.gguf: llama.cpp cannot load it")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """See protocol.Engine."""
        rows, length = len(prompts), len(prompts[0])
        context, batch = self._context(rows, length + count)
        watch = Stopwatch(rows)
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                _put(batch, row * length + position, token, position, row, wanted=position == length - 1)
        batch.n_tokens = rows * length
        places = [row * length + length - 1 for row in range(rows)]
        for step in range(count):
            self._decode(context, batch)
            chosen = [int(self._row(context, place).argmax()) for place in places]
            watch.step(chosen[0])
            for row, token in enumerate(chosen):
                _put(batch, row, token, length + step, row, wanted=True)
            batch.n_tokens = rows
            places = list(range(rows))
        timing = watch.timing()
        self._free(context, batch)
        return timing

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See protocol.Engine."""
        context, batch = self._context(1, len(ids))
        for start in range(0, len(ids), _PIECE):
            piece = ids[start : start + _PIECE]
            for i, token in enumerate(piece):
                _put(batch, i, token, start + i, 0, wanted=True)
            batch.n_tokens = len(piece)
            self._decode(context, batch)
            yield np.stack([self._row(context, i) for i in range(len(piece))])
        self._free(context, batch)

    def _context(self, rows: int, length: int) -> tuple[Any, Any]:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = rows * (-(-length // 256) * 256)
        params.n_batch = max(2048, rows * length)
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.threads
        params.n_seq_max = rows
        params.kv_unified = False
        context = llama_cpp.llama_init_from_model(self.model, params)
        return context, llama_cpp.llama_batch_init(rows * length, 0, 1)

    def _row(self, context: Any, place: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place), (self.vocab_size,)).copy()

    @staticmethod
    def _decode(context: Any, batch: Any) -> None:
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")

    @staticmethod
    def _free(context: Any, batch: Any) -> None:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


def _put(batch: Any, i: int, token: int, position: int, row: int, *, wanted: bool) -> None:
    batch.token[i], batch.pos[i] = token, position
    batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
    batch.logits[i] = wanted


if __name__ == "__main__":
    serve(LlamaEngine)
