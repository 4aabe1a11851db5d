"""The three stages as TRL trainers: SFT, distillation (SFT with a divergence from a teacher), GRPO."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import GRPOConfig, SFTConfig

from models.reasoner.architectures import save_model
from models.reasoner.callbacks import FiniteGuard, StepLog
from models.reasoner.reinforced import FastRollout, PackedGRPOTrainer
from models.reasoner.rewards import accuracy_reward, format_reward
from models.reasoner.settings import Settings
from models.reasoner.supervised import SupervisedTrainer, collate
from models.reasoner.validation import KeepBest

_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LOG_EVERY = 20


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
        "bf16": on_cuda or _has_npu() or settings.bf16_on_cpu,
        "use_cpu": not on_cuda and not _has_npu(),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it waits for the device at every step; StepLog looks instead
        "accelerator_config": {"non_blocking": on_cuda},
        "remove_unused_columns": False,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 500,
        "save_total_limit": 2,
        "report_to": [],
        "seed": settings.seed,
        "data_seed": settings.seed,
        "disable_tqdm": True,
        "dataloader_num_workers": settings.workers if on_cuda else 0,
        "dataloader_persistent_workers": on_cuda and settings.workers > 0,
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
        **_shared_arguments(settings, out) | {"logging_steps": min(_LOG_EVERY, settings.steps)},
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        max_length=None,
        packing=False,
    )
    log = StepLog(out / "steps.jsonl", settings.limit_s)
    trainer = SupervisedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows.with_format("numpy"),
        processing_class=tokenizer,
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        callbacks=[log],
        peft_config=_lora(settings),
        log=log,
        teacher=teacher,
        alpha=settings.kd_alpha,
        temperature=settings.kd_temperature,
    )
    trainer.remove_callback(PrinterCallback)
    _schedule_by_time(trainer, settings)
    return trainer


def grpo_trainer(
    settings: Settings, model: Any, tokenizer: Any, rows: Dataset, out: Path, validation: Any = None
) -> Any:
    """The trainer of the stage grpo: format and accuracy rewards, groups of completions per prompt."""
    arguments = GRPOConfig(
        **_shared_arguments(settings, out) | {"dataloader_num_workers": 0, "dataloader_persistent_workers": False},
        num_generations=settings.group,
        steps_per_generation=settings.accumulate * settings.minibatches,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        beta=settings.kl_beta,
        epsilon_high=settings.epsilon_high,
        loss_type="dapo",
        scale_rewards="group",
        reward_weights=[settings.format_weight, 1.0],
        mask_truncated_completions=False,
    )
    callbacks: list[Any] = [FiniteGuard(), StepLog(out / "steps.jsonl", settings.limit_s)]
    if validation is not None:
        log, end = out / "validation.jsonl", partial(save_model, tokenizer_from=settings.model, directory=out / "end")
        callbacks.append(KeepBest(validation, log, settings.validate_every, settings.average, end))
    trainer = PackedGRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=[format_reward, accuracy_reward],
        callbacks=callbacks,
        peft_config=_lora(settings),
        rollout_func=FastRollout(settings, rows) if settings.rollout == "fast" else None,
    )
    trainer.remove_callback(PrinterCallback)
    _schedule_by_time(trainer, settings)
    return trainer
