"""Batched generation for Qwen2 and Qwen3 in PyTorch: one static KV cache, decode steps as CUDA graphs.

transformers' generate() launches every kernel of every step from Python; at these model sizes that is most of the
time. Rows of different length share a batch: every row writes at its own position. A step looks no further than the
furthest row stands, and when half of the rows are finished the others move together and go on as a smaller batch: of
answers that differ in length, most of the steps are for few rows.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.reasoner import cached_forward

ROWS = 2048  # of a batch, for callers that have more prompts: the caches of many more do not fit into a laptop's memory
_PREFILL_ROWS = 512
_CHECK_EVERY = 16
_WIDTH_STEP = 64
_WARM_UP = 2  # steps that run before a capture, and write that far ahead of a row
_FEWEST_ROWS = 64  # where a step is all launches


def generation_dtype(device: torch.device, *, bf16_on_cpu: bool) -> torch.dtype:
    """What to generate in: bfloat16, and on a CPU only if asked."""
    return torch.float32 if device.type == "cpu" and not bf16_on_cpu else torch.bfloat16


@dataclass
class _Batch:
    """What a step reads and writes, at fixed addresses: B rows, T positions, N new tokens."""

    caches: cached_forward.Caches  # per layer [B, K, T, d]
    token: Tensor  # [B, 1]
    position: Tensor  # [B, 1], where `token` goes
    is_done: Tensor  # [B]
    output: Tensor  # [B, N + warm-up]
    step: Tensor  # [1]
    graphs: dict[tuple[int, int], Any] = field(default_factory=dict)  # by rows and positions

    def state(self) -> list[Tensor]:
        """What belongs to each row, but for the caches."""
        return [self.token, self.position, self.is_done, self.output]

    def part(self, rows: int, width: int) -> "_Batch":
        """The first rows, up to a position, at the same addresses."""
        caches = [(keys[:rows, :, :width], values[:rows, :, :width]) for keys, values in self.caches]
        token, position, is_done, output = (tensor[:rows] for tensor in self.state())
        return replace(self, caches=caches, token=token, position=position, is_done=is_done, output=output)

    def gather(self, rows: Tensor) -> None:
        """Move some rows, in ascending order, to the front."""
        for tensor in [*self.state(), *(part for cache in self.caches for part in cache)]:
            tensor[: len(rows)] = tensor[rows]


class Generator:
    """Generates with a frozen copy of a model.

    Args:
        model: A Qwen2 or Qwen3 for causal language modelling; its weights are copied.
        stop_ids: Token ids that end a row; the end token is kept in the result.
        dtype: bfloat16 on an accelerator, float32 where results must equal the exported model's.
    """

    def __init__(self, model: Any, stop_ids: set[int], *, device: Any, dtype: torch.dtype) -> None:
        own = type(model)(model.config)  # not a deep copy: trainers hang hooks on the model they train
        own.load_state_dict(model.state_dict())
        self._model = own.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._device, self._dtype = torch.device(device), dtype
        self._stop = torch.tensor(sorted(stop_ids), device=device)
        self._first_stop = min(stop_ids)
        self._batches: dict[tuple[int, int, int, float], _Batch] = {}
        self._width = 0
        self._pool: Any = None  # of memory, shared by all graphs: they run one after the other

    def update(self, model: Any) -> None:
        """Take over a model's current weights, in place, so captured graphs stay valid."""
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(state[name])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, rows: int = 0
    ) -> list[list[int]]:
        """Continue every prompt; greedy at temperature 0.

        Args:
            prompts: Token ids.
            max_new_tokens: The most tokens to generate.
            temperature: Of sampling.
            seed: Of sampling.
            rows: Rows per batch; 0 takes all prompts at once. The last batch is filled up with copies.
        """
        rows = min(rows or len(prompts), len(prompts))
        furthest = max(map(len, prompts)) + max_new_tokens + _WARM_UP
        self._width = max(self._width, _rounded(furthest))  # a new width costs new graphs
        torch.manual_seed(seed)
        results: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            batch = prompts[start : start + rows]
            filled = batch + [batch[0]] * (rows - len(batch))
            results.extend(self._generate_batch(filled, max_new_tokens, temperature)[: len(batch)])
        return results

    def _generate_batch(self, prompts: list[list[int]], new: int, temperature: float) -> list[list[int]]:
        batch = self._cleared(len(prompts), new, temperature)
        self._prefill(batch, prompts, temperature)
        self._store(batch)
        longest = max(map(len, prompts))
        finished = torch.empty_like(batch.output)
        places = torch.arange(len(prompts), device=self._device)  # of the rows in `prompts`
        for start in range(1, new, _CHECK_EVERY):
            left = int((~batch.is_done[: len(places)]).sum())
            finished[places] = batch.output[: len(places)]
            if not left:
                break
            places = self._moved_together(batch, places, left)
            width = min(self._width, _rounded(longest + start + _CHECK_EVERY + _WARM_UP))
            self._run(batch, len(places), width, min(_CHECK_EVERY, new - start), temperature)
        finished[places] = batch.output[: len(places)]
        return self._trimmed(finished[:, :new])

    def _cleared(self, rows: int, new: int, temperature: float) -> _Batch:
        """The batch of this size, ready to begin."""
        key = (rows, self._width, new, temperature)
        if key not in self._batches:
            self._batches.clear()  # one size at a time: the cache is what fills the device

            def whole(*size: int) -> Tensor:
                return torch.zeros(size, device=self._device, dtype=torch.long)

            caches = cached_forward.allocate(self._model.config, rows, self._width, self._device, self._dtype)
            done = torch.zeros(rows, device=self._device, dtype=torch.bool)
            self._batches[key] = _Batch(
                caches, whole(rows, 1), whole(rows, 1), done, whole(rows, new + _WARM_UP), whole(1)
            )
        batch = self._batches[key]
        batch.step.zero_()
        batch.is_done.zero_()
        batch.output.fill_(self._first_stop)
        return batch

    def _prefill(self, batch: _Batch, prompts: list[list[int]], temperature: float) -> None:
        """Fill the caches; a prompt that stands in several rows is read once."""
        different = list(dict.fromkeys(map(tuple, prompts)))
        number = {prompt: index for index, prompt in enumerate(different)}
        numbers = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=self._device)
        for start in range(0, len(different), _PREFILL_ROWS):
            part = different[start : start + _PREFILL_ROWS]
            longest = max(map(len, part))
            ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in part], device=self._device)
            own = cached_forward.allocate(self._model.config, len(part), longest, self._device, self._dtype)
            hidden = cached_forward.prefill(self._model.model, ids, own)
            rows = ((numbers >= start) & (numbers < start + len(part))).nonzero().squeeze(-1)
            source = numbers[rows] - start
            for cache, kept in zip(batch.caches, own, strict=True):
                for whole, read in zip(cache, kept, strict=True):
                    whole[rows, :, :longest] = read[source]
            lengths = torch.tensor([len(prompt) for prompt in part], device=self._device)
            last = hidden[torch.arange(len(part), device=self._device), lengths - 1]
            batch.token[rows] = self._choose(last[source], temperature)
            batch.position[rows, 0] = lengths[source]

    def _moved_together(self, batch: _Batch, places: Tensor, left: int) -> Tensor:
        """Halve the batch while all rows that are left fit; returns the places of its rows."""
        rows = len(places)
        while left <= rows // 2 and rows // 2 >= _FEWEST_ROWS:
            rows //= 2
        if rows < len(places):
            kept = batch.is_done[: len(places)].long().argsort(stable=True)[:rows].sort().values
            batch.gather(kept)
            places = places[kept]
        return places

    def _run(self, batch: _Batch, rows: int, width: int, steps: int, temperature: float) -> None:
        part = batch.part(rows, width)
        if self._device.type != "cuda":
            for _ in range(steps):
                self._decode(part, temperature)
            return
        if (rows, width) not in batch.graphs:
            batch.graphs[rows, width] = self._capture(part, temperature)
        for _ in range(steps):
            batch.graphs[rows, width].replay()

    def _decode(self, batch: _Batch, temperature: float) -> None:
        hidden = cached_forward.decode(self._model.model, batch.token, batch.position, batch.caches)
        batch.token.copy_(self._choose(hidden[:, 0], temperature))
        batch.position.add_(1)
        self._store(batch)

    def _store(self, batch: _Batch) -> None:
        """Write the chosen tokens into column `step`; finished rows get the stop token."""
        batch.token.masked_fill_(batch.is_done[:, None], self._first_stop)
        batch.output.scatter_(1, batch.step.expand(batch.output.shape[0], 1), batch.token)
        batch.is_done |= (batch.token == self._stop).any(dim=-1)
        batch.step.add_(1)

    def _choose(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = self._model.lm_head(self._model.model.norm(hidden)).float()
        if temperature > 0:  # the Gumbel trick: argmax(logits / t + g) draws from softmax(logits / t)
            logits = logits / temperature - torch.empty_like(logits).exponential_().log()
        return logits.argmax(dim=-1, keepdim=True)

    def _capture(self, batch: _Batch, temperature: float) -> Any:
        """Record one decode step; the state it changes is put back afterwards."""
        state = [*batch.state(), batch.step]
        saved = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._decode(batch, temperature)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._decode(batch, temperature)
        return graph

    def _trimmed(self, output: Tensor) -> list[list[int]]:
        """Rows without what follows their first stop token."""
        is_stop = (output[:, :, None] == self._stop).any(dim=-1)
        ends = torch.where(is_stop.any(dim=1), is_stop.long().argmax(dim=1) + 1, output.shape[1])
        return [row[:end] for row, end in zip(output.tolist(), ends.tolist(), strict=True)]


def _rounded(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP
