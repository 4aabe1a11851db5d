"""The rung between the .om and the CPU: the checkpoint itself, run by transformers on torch_npu.

It has the methods of the runtime's engine that the loop uses, and its tokenizer, sampling and stopping. Texts are
computed in batches that begin and end together: prompts padded on the left, one token for every row at a step.
"""

from collections import deque
from itertools import count
from pathlib import Path
from typing import Any, Deque, Dict, List, Mapping, Optional, Sequence

import numpy as np

from qcompile.runtime.completion import Delta
from qcompile.runtime.manifest import FileEntry, Manifest, ModelShape, sha256_of
from qcompile.runtime.prompt import check_prompt
from qcompile.runtime.sampling import SamplingParams, choose_tokens
from qcompile.runtime.sequence import Sequence as Text
from qcompile.runtime.session import Scores
from qcompile.runtime.stop import end_ids
from qcompile.runtime.tokenizer import Tokenizer, read_json_file

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json")


class TransformersBackend:
    """A checkpoint on a torch device.

    Args:
        path: A Hugging Face directory.
        max_batch_size: The most texts computed together.
        device: The first NPU when None, and then float16; another device computes in float32.

    Raises:
        ImportError: torch_npu or transformers is not installed.
        RuntimeError: There is no NPU.
    """

    def __init__(self, path: Path, max_batch_size: int, device: Optional[str] = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if device is None:
            import torch_npu

            if not torch_npu.npu.is_available():
                raise RuntimeError("torch_npu is installed, but there is no NPU")
        self._torch = torch
        self._device = device or "npu:0"
        dtype = torch.float32 if device else torch.float16
        model = AutoModelForCausalLM.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
        self._model = model.to(self._device).eval()
        config = self._model.config
        self._max_tokens: int = config.max_position_embeddings
        self._vocab_size: int = config.vocab_size
        manifest = _manifest(path, config)
        self.tokenizer = Tokenizer(path, manifest)
        configs = [read_json_file(path, manifest, name) for name in ("generation_config.json", "config.json")]
        self._end_ids = end_ids(configs, self.tokenizer)
        self._max_batch_size = max_batch_size
        self._numbers = count()
        self._waiting: Deque[Text] = deque()
        self._rows: List[Text] = []  # of the batch; finished ones stay as padding until it ends
        self._mask: Any = None
        self._cache: Any = None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> List[int]:
        """Return the prompt ids of a conversation."""
        text = self.tokenizer.chat_template.render(messages, **template_variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue one text; returns its number."""
        ids = check_prompt(prompt, self._vocab_size, self._max_tokens, 0)
        number = next(self._numbers)
        ends = (*self._end_ids, *params.stop_token_ids)
        self._waiting.append(Text(number, 0, ids, params, ends, self._max_tokens, self.tokenizer))
        return number

    def abort(self, request_id: int) -> None:
        """End one text; nothing is told of it any more."""
        self._waiting = deque(text for text in self._waiting if text.request_id != request_id)
        for row in self._rows:
            if row.request_id == request_id and not row.is_finished:
                row.end("abort")

    def step(self) -> List[Delta]:
        """Compute one token for every text of the batch; begin the next batch when all have ended."""
        try:
            with self._torch.inference_mode():
                return self._advance()
        except BaseException:
            self._rows, self._cache, self._mask = [], None, None
            raise

    def close(self) -> None:
        """Release the model."""
        self._rows, self._cache, self._mask, self._model = [], None, None, None

    def _advance(self) -> List[Delta]:
        if all(row.is_finished for row in self._rows):
            self._rows = [self._waiting.popleft() for _ in range(min(self._max_batch_size, len(self._waiting)))]
            if not self._rows:
                return []
            inputs = self._pad()
        else:
            ids = [[row.last_token_id if row.completion.token_ids else 0] for row in self._rows]
            inputs = self._torch.tensor(ids, device=self._device)
            self._mask = self._torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        output = self._model(
            input_ids=inputs,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        return self._take(output.logits[:, -1].float().cpu().numpy())

    def _pad(self) -> Any:
        """The prompts of a new batch [B, S], padded on the left."""
        longest = max(len(row.prompt_ids) for row in self._rows)
        ids = np.zeros((len(self._rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(self._rows):
            ids[index, longest - len(row.prompt_ids) :] = row.prompt_ids
            mask[index, longest - len(row.prompt_ids) :] = 1
        self._cache = None
        self._mask = self._torch.from_numpy(mask).to(self._device)
        return self._torch.from_numpy(ids).to(self._device)

    def _take(self, logits: np.ndarray) -> List[Delta]:
        live = [index for index, row in enumerate(self._rows) if not row.is_finished]
        rows = [self._rows[index] for index in live]
        deltas = []
        for row, choice in zip(rows, choose_tokens(Scores(logits[live]), [row.sampler for row in rows])):
            if choice.error is not None:
                deltas.append(row.end("error", choice.error))
            else:
                deltas.append(row.append(choice.token_id, choice.logprob))
        return deltas


def _manifest(path: Path, config: Any) -> Manifest:
    """What the runtime's tokenizer reads a directory by."""
    heads = config.num_attention_heads
    sizes: Dict[str, int] = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings,
    }
    present = [path / name for name in _FILES if (path / name).is_file()]
    files = tuple(FileEntry(file.name, file.stat().st_size, sha256_of(file)) for file in present)
    return Manifest("checkpoint", ModelShape(config.model_type, **sizes), (), files)
