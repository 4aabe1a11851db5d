"""GRPO with two replacements inside TRL's trainer: rollouts by `Generator`, and forward passes without left padding."""

import time
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from models.reasoner.corpus import IGNORED
from models.reasoner.demonstrations import demonstrate
from models.reasoner.generate import Generator, generation_dtype
from models.reasoner.settings import Settings

_PAD_TO = 32
_CHUNK = 256
_CHUNK_ON_CPU = 32  # less padding; there a small chunk takes no longer


class PackedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPO that leaves out what teaches nothing, and moves every row to the left edge before the forward pass.

    A row without advantage, from a group that is all right or all wrong, adds nothing to loss and gradient. TRL pads
    prompts on the left, which takes an attention mask: a slower kernel, and for padding rows one with nothing to attend
    to. Rows that start at the left edge need no mask, are as long as the longest of their own chunk, and see the
    positions that they were generated with.
    """

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        advantages = inputs["advantages"]
        if self.beta == 0.0 and advantages.dim() == 1:
            chosen = advantages.nonzero().squeeze(-1)
            chosen = chosen if len(chosen) else torch.zeros(1, dtype=torch.long, device=advantages.device)
            size = len(advantages)
            rows = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() and len(v) == size}
            inputs = inputs | {name: value[chosen] for name, value in rows.items()}
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        order = attention_mask.sum(dim=1).argsort()
        logps, entropies = [], []
        most = _CHUNK_ON_CPU if input_ids.device.type == "cpu" else _CHUNK
        for chunk in order.split(min(batch_size or most, most)):
            mask = attention_mask[chunk]
            rows, labels, where = pack_left(input_ids[chunk], mask, logits_to_keep)
            with self.accelerator.autocast():
                outputs = model(input_ids=rows, labels=labels, fused_lm_head=True)
            padding = mask[:, -logits_to_keep:] == 0
            logps.append(outputs.log_probs.gather(1, where).masked_fill(padding, 0.0))
            if compute_entropy:
                entropies.append(outputs.entropy.gather(1, where).masked_fill(padding, 0.0))
        back = order.argsort()
        return torch.cat(logps)[back], torch.cat(entropies)[back] if compute_entropy else None, None


def pack_left(ids: Tensor, mask: Tensor, num_completion: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn rows `[padding, prompt, completion, padding]` into `[prompt, completion, padding]`.

    Args:
        ids: [B, T] token ids.
        mask: [B, T] 1 on tokens, 0 on padding.
        num_completion: C, the last columns, which hold the completions.

    Returns:
        The moved rows [B, T'], their labels [B, T'] (-100 but on completions), and for each of the C columns its place
        in per-token results that start at the second token [B, C].
    """
    total = ids.shape[1]
    prompt = total - num_completion
    padding = (mask[:, :prompt] == 0).sum(dim=1, keepdim=True)
    longest = int((mask.cumsum(dim=1).argmax(dim=1, keepdim=True) + 1 - padding).max())
    longest = min(total, -(-longest // _PAD_TO) * _PAD_TO)
    columns = torch.arange(longest, device=ids.device)
    source = (columns + padding) % total
    rows, is_token = ids.gather(1, source), mask.gather(1, source) != 0
    is_completion = is_token & (columns >= prompt - padding) & (columns + padding < total)
    labels = torch.where(is_completion, rows, IGNORED)
    where = prompt - padding - 1 + torch.arange(num_completion, device=ids.device)
    return rows, labels, where.clamp(max=longest - 2)


class FastRollout:
    """TRL's rollout hook on `Generator`: takes over the current weights, then completes every prompt.

    Args:
        settings: Of the stage.
        rows: What is asked, with the columns prompt and problem.
    """

    def __init__(self, settings: Settings, rows: Dataset) -> None:
        self._settings = settings
        self._problems = dict(zip(rows["prompt"], rows["problem"], strict=True)) if settings.demonstrate else {}
        self._generator: Generator | None = None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Prompts come repeated, one entry per wanted completion."""
        tokenizer = trainer.processing_class
        ids = _prompt_ids(prompts, tokenizer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._generator is None:
            device = trainer.accelerator.device
            dtype = generation_dtype(device, bf16_on_cpu=self._settings.bf16_on_cpu)
            self._generator = Generator(model, {tokenizer.eos_token_id}, device=device, dtype=dtype)
        begin = time.monotonic()
        self._generator.update(model)
        seed = self._settings.seed * 100_003 + trainer.state.global_step * 101 + trainer.accelerator.process_index
        completions = self._generator.generate(
            ids, max_new_tokens=self._settings.max_new_tokens, temperature=self._settings.temperature, seed=seed
        )
        trainer._metrics["train"]["rollout_time"].append(time.monotonic() - begin)
        if self._settings.demonstrate:
            shown = demonstrate(
                [self._problems[prompt] for prompt in prompts],
                completions,
                tokenizer,
                group=self._settings.group,
                share=self._settings.demonstrate,
                longest=self._settings.max_new_tokens,
            )
            trainer._metrics["train"]["demonstrated"].append(shown * self._settings.group / len(prompts))
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def _prompt_ids(prompts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts, each different one read once."""
    different = list(dict.fromkeys(prompts))
    by_prompt = dict(zip(different, tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
    return [by_prompt[prompt] for prompt in prompts]
