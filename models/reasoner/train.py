"""Run one training stage.

    python -m models.reasoner.train student-sft --out runs/sft
    python -m models.reasoner.train qwen-grpo --out runs/grpo --set model=/path/to/Qwen2.5-0.5B-Instruct
    accelerate launch -m models.reasoner.train qwen-sft --out runs/sft --set model=...   # several devices

Runs on CUDA, on an Ascend NPU with torch_npu installed (not run on a device by us), or, tiny, on a CPU. Writes the
trained model in Hugging Face form to OUT/model, one JSON line per step to OUT/steps.jsonl and curves to OUT/*.png.
"""

import argparse
import importlib.util
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from datasets import Dataset, concatenate_datasets

from models.reasoner import corpus, probe
from models.reasoner.architectures import SHAPES, load_model, load_tokenizer, num_parameters, save_model
from models.reasoner.arguments import model_directory, output_directory
from models.reasoner.data import problems
from models.reasoner.generate import ROWS, Generator, generation_dtype
from models.reasoner.rewards import is_correct
from models.reasoner.settings import Settings
from models.reasoner.trainers import grpo_trainer, sft_trainer
from models.reasoner.validation import KEPT, Validation

_VALIDATION = 7000  # plus the seed of the run: other problems than those of `score`, and than those of other runs


def device() -> torch.device:
    """CUDA, NPU or CPU."""
    if importlib.util.find_spec("torch_npu") is not None:
        importlib.import_module("torch_npu")
        return torch.device("npu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sound_attention() -> None:
    """Keep attention off cuDNN, whose backward pass gives NaN for lengths of 64 modulo 128 with a mask on an H100.

    Reported as pytorch issue 196678 for torch 2.11; met in GRPO, where left padding takes a mask: one finite loss with
    a NaN gradient, and every weight after it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def teacher_answers(settings: Settings, teacher: Any, tokenizer: Any) -> Dataset | None:
    """Solutions sampled from the teacher on fresh problems, those the checker accepts."""
    if not settings.answers:
        return None
    stream = problems(settings.seed + 7919, "train", hard_share=settings.hard_share)
    asked = list(islice(stream, settings.answers))
    prompts = tokenizer([corpus.chat_text(tokenizer, p) for p in asked], add_special_tokens=False)["input_ids"]
    generator = Generator(teacher, {tokenizer.eos_token_id}, device=device(), dtype=_generation_dtype(settings))
    answers = generator.generate(
        prompts, max_new_tokens=settings.max_new_tokens, temperature=0.7, seed=settings.seed, rows=ROWS
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    kept = [
        (prompt, answer)
        for prompt, answer, text, problem in zip(prompts, answers, texts, asked, strict=True)
        if answer[-1] == tokenizer.eos_token_id and _is_right(problem, text)
    ]
    print(f"teacher answers: {len(kept)} of {len(asked)} accepted by the checker", flush=True)
    kept = kept[: len(kept) // settings.batch_size * settings.batch_size]
    if not kept:
        return None
    flat = np.concatenate([np.array(prompt + answer, np.int32) for prompt, answer in kept])
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in kept], np.int32)
    heads = np.array([len(prompt) for prompt, _ in kept], np.int32)
    return corpus.in_batches(flat, lengths, heads, batch_size=settings.batch_size, seed=settings.seed)


def _is_right(problem: Any, text: str) -> bool:
    """The made solution itself is right; everything else is checked."""
    return text == problem.solution or is_correct(problem, text)


def training_rows(settings: Settings, tokenizer: Any, model: Any, teacher: Any, out: Path) -> Dataset:
    """What a stage trains on, in training order."""
    if settings.stage == "grpo":
        return _asked_rows(settings, tokenizer, model, out)
    count = settings.num_rows or settings.steps * settings.batch_size * settings.accumulate
    own = teacher_answers(settings, teacher, tokenizer) if settings.stage == "distill" else None
    fresh = _fresh_rows(settings, count - (len(own) if own is not None else 0))
    if own is None:
        return fresh
    rows = concatenate_datasets([fresh, own])
    batches = np.random.default_rng(settings.seed).permutation(len(rows) // settings.batch_size)
    return rows.select((batches[:, None] * settings.batch_size + np.arange(settings.batch_size)).ravel())


def _asked_rows(settings: Settings, tokenizer: Any, model: Any, out: Path) -> Dataset:
    count = settings.steps * settings.batch_size * settings.accumulate // settings.group
    weights = None
    if settings.probe:
        found = probe.probe(settings, model, tokenizer, device(), _generation_dtype(settings))
        probe.write(found, out / "probe.json")
        print(f"pass@1 {found['pass_1']}, pass@{found['k']} {found['pass_k']} when sampling", flush=True)
        weights = probe.weights(found, settings.demonstrate)
    return corpus.asked(
        count, seed=settings.seed, hard_share=settings.hard_share, weights=weights, tokenizer_from=settings.model
    )


def _generation_dtype(settings: Settings) -> torch.dtype:
    return generation_dtype(device(), bf16_on_cpu=settings.bf16_on_cpu)


def _fresh_rows(settings: Settings, count: int) -> Dataset:
    if settings.rows:
        rows = Dataset.load_from_disk(settings.rows)
        return rows.select(range(min(count, len(rows))))
    return corpus.solved(
        count,
        seed=settings.seed,
        hard_share=settings.hard_share,
        batch_size=settings.batch_size,
        tokenizer_from=settings.model,
    )


def train(settings: Settings, out: Path, *, resume: bool = False) -> Path:
    """Run a stage; returns the directory of the trained model."""
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in ("steps.jsonl", "validation.jsonl"):
            (out / name).unlink(missing_ok=True)
    start = time.monotonic()
    sound_attention()
    tokenizer = load_tokenizer(settings.model)
    model = load_model(settings.model, seed=settings.seed)
    teacher = load_model(settings.teacher) if settings.stage == "distill" else None
    rows = training_rows(settings, tokenizer, model, teacher, out)
    print(f"{settings.stage}: {num_parameters(model) / 1e6:.2f}M parameters, {len(rows)} rows", flush=True)
    print(
        f"Total parameters: {model.num_parameters() / 1e9:.2f}B; data took {time.monotonic() - start:.1f} s", flush=True
    )
    if settings.limit_s:
        settings = replace(settings, limit_s=max(1.0, settings.limit_s - (time.monotonic() - start)))
    if settings.compile_layers:
        torch._dynamo.config.recompile_limit = 64  # teacher and student, with and without gradients
        for layer in [*model.model.layers, *(teacher.model.layers if teacher is not None else ())]:
            layer.compile(dynamic=True)
    if settings.stage == "grpo":
        validation = None
        if settings.validate:
            validation = Validation(
                settings, tokenizer, device(), _generation_dtype(settings), seed=_VALIDATION + settings.seed
            )
        trainer = grpo_trainer(settings, model, tokenizer, rows, out, validation)
    else:
        trainer = sft_trainer(settings, model, tokenizer, rows, out, teacher)
    begin = time.monotonic()
    trainer.train(resume_from_checkpoint=str(checkpoints(out)[-1]) if resume else None)
    took = time.monotonic() - begin
    print(f"{settings.stage}: {trainer.state.global_step} steps in {took:.1f} s", flush=True)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora_rank:
        trained = trained.merge_and_unload()
    if trainer.accelerator.is_main_process:
        save_model(trained, settings.model, out / "model")
    return out / "model"


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first: what ends a checkpoint is its trainer_state.json."""
    found = [path.parent for path in (out / "trainer").glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def check_checkpoints(out: Path, *, resume: bool, validates: bool = False) -> None:
    """Look at what an earlier run left, before anything is loaded or written.

    Raises:
        ValueError: There is nothing to resume, or what there is would be taken for this run's when it is resumed.
    """
    found = checkpoints(out)
    if resume and not found:
        raise ValueError(
            f"{out / 'trainer'} has no whole checkpoint; without --resume the run begins anew, "
            "--set save_every=N keeps checkpoints"
        )
    if resume and validates and not (found[-1] / KEPT).is_file():
        raise ValueError(
            f"{found[-1]} has no {KEPT}, the best weights so far; delete it to go on from the one before it, or give "
            "--set validate=0, or another --out without --resume"
        )
    if found and not resume:
        raise ValueError(f"{found[-1]} is of an earlier run; --resume goes on from it, or give another --out")


def check_sources(settings: Settings) -> None:
    """Look at what a run reads before anything is loaded or written.

    Raises:
        ValueError: No model, or no teacher for a stage that needs one.
        argparse.ArgumentTypeError: A directory is not what it should be.
    """
    if not settings.model:
        raise ValueError("no model to train; give --set model=DIR, a directory in Hugging Face form")
    if settings.model not in SHAPES:
        model_directory(settings.model)
    elif (
        settings.stage == "grpo" and settings.kl_beta
    ):  # TRL reads the model it started from once more, from its directory
        raise ValueError(
            f"setting kl_beta is {settings.kl_beta}; {settings.model} is a new model, which is not worth staying near: "
            "give --set model=DIR, or --set kl_beta=0"
        )
    if settings.stage == "distill":
        if not settings.teacher:
            raise ValueError("no teacher to learn from; give --set teacher=DIR, a directory in Hugging Face form")
        model_directory(settings.teacher)
        own, other = (
            {number: token for token, number in load_tokenizer(name).get_vocab().items()}
            for name in (settings.model, settings.teacher)
        )
        if any(own[number] != other[number] for number in own.keys() & other.keys()):
            raise ValueError(
                f"{settings.teacher} has another vocabulary than {settings.model}; its logits teach nothing"
            )
    if settings.rows and not Path(settings.rows).is_dir():
        raise argparse.ArgumentTypeError(f"{settings.rows} is no directory; wanted rows saved by `corpus.solved`")
    if settings.rows and not (Path(settings.rows) / "state.json").is_file():
        raise argparse.ArgumentTypeError(f"{settings.rows} has no state.json; wanted rows saved by `corpus.solved`")


def main(arguments: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Run one training stage.")
    parser.add_argument("recipe")
    parser.add_argument("--out", type=output_directory, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    options = parser.parse_args(arguments)
    try:
        settings = Settings.load(options.recipe, options.overrides)
        check_sources(settings)
        validates = settings.stage == "grpo" and settings.validate > 0
        check_checkpoints(options.out, resume=options.resume, validates=validates)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    train(settings, options.out, resume=options.resume)
    if importlib.util.find_spec("matplotlib") is not None:
        from models.reasoner.curves import draw

        draw(options.out / "steps.jsonl", options.out)


if __name__ == "__main__":
    main()
