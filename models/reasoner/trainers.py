"""The three stages as TRL trainers: SFT, distillation (SFT with a divergence from a teacher), GRPO."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from models.reasoner.corpus import IGNORED
from models.reasoner.generate import Generator
from models.reasoner.rewards import accuracy_reward, format_reward
from models.reasoner.settings import Settings

_logger = logging.getLogger(__name__)
_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PAD_TO = 32


class StepLog(TrainerCallback):  # type: ignore[misc]
    """One JSON line per step, and a stop when the time is up."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path, self._limit_s, self._start = path, limit_s, time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append what the trainer reports."""
        record = {"step": state.global_step, "seconds": round(time.monotonic() - self._start, 3), **(logs or {})}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Ask for a stop at the time limit."""
        if self._limit_s and time.monotonic() - self._start > self._limit_s:
            control.should_training_stop = True
        return control


class FiniteGuard(TrainerCallback):  # type: ignore[misc]
    """Drop an update whose gradients are not finite.

    Seen once in GRPO on an H100: one step's gradient was NaN with a finite loss, and every weight after it.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Runs after clipping, which has made all gradients NaN when one is."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            _logger.warning("step %d: gradients are not finite; the update is dropped", state.global_step + 1)
            for gradient in gradients:
                gradient.zero_()


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to a multiple of 32.

    The mask is all ones on purpose: with causal attention nothing looks at padding on its right, its labels are
    ignored, and without a padding mask attention takes its fast path.
    """
    longest = -(-max(len(row["input_ids"]) for row in rows) // _PAD_TO) * _PAD_TO
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        size = len(row["input_ids"])
        ids[index, :size] = torch.as_tensor(row["input_ids"], dtype=torch.long)
        labels[index, :size] = torch.as_tensor(row["labels"], dtype=torch.long)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class TimedRate:
    """Warm-up and cosine as a factor of the learning rate, by steps or by time, whichever is further.

    So a run that meets its time limit early still ends with a small rate.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._start = settings, 0.0

    def __call__(self, step: int) -> float:
        """The factor for a step."""
        settings = self._settings
        if step < settings.warmup:
            self._start = time.monotonic()
            return (step + 1) / (settings.warmup + 1)
        progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
        if settings.limit_s:
            spent = time.monotonic() - self._start
            progress = max(progress, spent / max(1.0, settings.limit_s - self.warmup_s))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return settings.min_lr_share + (1 - settings.min_lr_share) * cosine

    warmup_s = 0.0


def _schedule_by_time(trainer: Any, settings: Settings) -> None:
    """Give a trainer the timed rate in place of its own schedule."""
    rate, begin = TimedRate(settings), time.monotonic()

    def create(num_training_steps: int, optimizer: Any = None) -> Any:
        def factor(step: int) -> float:
            if step <= settings.warmup:
                rate.warmup_s = time.monotonic() - begin
            return rate(step)

        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or trainer.optimizer, factor)
        return trainer.lr_scheduler

    trainer.create_scheduler = create


class DistillTrainer(SFTTrainer):  # type: ignore[misc]
    """SFT whose loss is alpha * KL(teacher || student) + (1 - alpha) * cross entropy, on the solution's tokens.

    Hinton et al. 2015, eq. 2-4; the divergence is scaled by the squared temperature as there.
    """

    def __init__(self, *args: Any, teacher: Any, alpha: float, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        self._alpha, self._temperature = alpha, temperature

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mixed loss over every solution token of the whole batch."""
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        wanted = labels[:, 1:] != IGNORED
        targets = labels[:, 1:][wanted]
        with torch.no_grad(), self.accelerator.autocast():
            told = self._teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][wanted]
        outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        said = outputs.logits[:, :-1][wanted].float()
        t = self._temperature
        teacher = functional.log_softmax(told.float() / t, dim=-1)
        divergence = functional.kl_div(
            functional.log_softmax(said / t, dim=-1), teacher, reduction="sum", log_target=True
        )
        entropy = functional.cross_entropy(said, targets, reduction="sum")
        count = wanted.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (self._alpha * t * t * divergence + (1 - self._alpha) * entropy) / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        scale = max(1, int(wanted.sum()))
        self._metrics["train"]["kl"].append(float(divergence.detach()) / scale)
        self._metrics["train"]["cross_entropy"].append(float(entropy.detach()) / scale)
        return (loss, outputs) if return_outputs else loss


def _shared_arguments(settings: Settings, out: Path) -> dict[str, Any]:
    on_cuda = torch.cuda.is_available()
    return {
        "output_dir": str(out / "trainer"),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_share},
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.adam_beta2,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused" if on_cuda else "adamw_torch",
        "bf16": on_cuda or _has_npu(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 500,
        "save_total_limit": 2,
        "report_to": [],
        "seed": settings.seed,
        "data_seed": settings.seed,
        "disable_tqdm": True,
        "dataloader_num_workers": settings.workers if on_cuda else 0,
        "dataloader_pin_memory": on_cuda,
    }


def _has_npu() -> bool:
    return hasattr(torch, "npu") and bool(torch.npu.is_available())


def _lora(settings: Settings) -> Any:
    if not settings.lora_rank:
        return None
    return LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=_LORA_TARGETS, task_type="CAUSAL_LM"
    )


def sft_trainer(settings: Settings, model: Any, tokenizer: Any, rows: Dataset, out: Path, teacher: Any = None) -> Any:
    """The trainer of the stages sft and distill; `rows` are in training order."""
    arguments = SFTConfig(
        **_shared_arguments(settings, out),
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        max_length=None,
        packing=False,
        remove_unused_columns=False,
    )
    shared = {
        "model": model,
        "args": arguments,
        "train_dataset": rows.with_format("numpy"),
        "processing_class": tokenizer,
        "data_collator": lambda batch: collate(batch, tokenizer.pad_token_id),
        "callbacks": [StepLog(out / "steps.jsonl", settings.limit_s), FiniteGuard()],
        "peft_config": _lora(settings),
    }
    if teacher is None:
        trainer = SFTTrainer(**shared)
    else:
        more = {"teacher": teacher, "alpha": settings.kd_alpha, "temperature": settings.kd_temperature}
        trainer = DistillTrainer(**shared, **more)
    trainer.remove_callback(PrinterCallback)
    _schedule_by_time(trainer, settings)
    return trainer


def grpo_trainer(settings: Settings, model: Any, tokenizer: Any, rows: Dataset, out: Path) -> Any:
    """The trainer of the stage grpo: format and accuracy rewards, groups of completions per prompt."""
    arguments = GRPOConfig(
        **_shared_arguments(settings, out) | {"dataloader_num_workers": 0},
        num_generations=settings.group,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=0.0,
        epsilon_high=settings.epsilon_high,
        loss_type="dapo",
        scale_rewards="group",
        reward_weights=[settings.format_weight, 1.0],
        mask_truncated_completions=False,
        remove_unused_columns=False,
    )
    trainer = GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[format_reward, accuracy_reward],
        callbacks=[StepLog(out / "steps.jsonl", settings.limit_s), FiniteGuard()],
        peft_config=_lora(settings),
        rollout_func=FastRollout(settings) if settings.rollout == "fast" else None,
    )
    trainer.remove_callback(PrinterCallback)
    _schedule_by_time(trainer, settings)
    return trainer


class FastRollout:
    """TRL's rollout hook on `Generator`: takes over the current weights, then completes every prompt."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._generator: Generator | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Prompts come repeated, one entry per wanted completion."""
        tokenizer = trainer.processing_class
        texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._generator is None:
            device = trainer.accelerator.device
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            self._generator = Generator(model, {tokenizer.eos_token_id}, device=device, dtype=dtype)
        self._generator.update(model)
        seed = self._settings.seed * 100_003 + trainer.state.global_step * 101 + trainer.accelerator.process_index
        completions = self._generator.generate(
            ids, max_new_tokens=self._settings.max_new_tokens, temperature=self._settings.temperature, seed=seed
        )
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}
