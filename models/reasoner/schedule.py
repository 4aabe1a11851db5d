"""The whole training of the bundled model inside limited time on one GPU, in one process.

    python -m models.reasoner.schedule base --work W --out R --seconds 560   # SFT of both, distillation, scores
    python -m models.reasoner.schedule long --work W --out R --seconds 530 --source DIR   # more SFT, then GRPO
    python -m models.reasoner.schedule grpo --work W --out R --seconds 400 --source weights   # reinforcement learning

A second process makes the training rows meanwhile. Weights leave in parts of 15 MiB (R/NAME.safetensors.0, .1), logs and
scores as JSON, after every stage, so that an interruption loses no finished stage. `--join R` puts parts together.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.reasoner.settings import Settings

STEPS = {"student-sft": 900, "teacher-sft": 1900, "student-distill": 1000}
_FOLDERS = {
    "student-sft": "sft",
    "teacher-sft": "teacher",
    "student-distill": "distill",
    "student-grpo": "grpo",
    "student-long": "long",
}
_PART_BYTES = 15 << 20
_START = time.monotonic()


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", flush=True)


def make_rows(work: Path, recipes: list[str]) -> None:
    """Write the rows of supervised stages, in the order in which they are needed."""
    from models.reasoner import corpus

    for recipe in recipes:
        settings = Settings.load(recipe, [])
        rows = corpus.solved(
            settings.num_rows or STEPS[recipe] * settings.batch_size,
            seed=settings.seed,
            hard_share=settings.hard_share,
            batch_size=settings.batch_size,
            tokenizer_from="student",
        )
        temporary = work / "rows" / f"{recipe}.tmp"
        rows.save_to_disk(str(temporary))
        temporary.rename(work / "rows" / recipe)
        _say(f"rows for {recipe}: {len(rows)}")


def _start_rows(work: Path, recipes: list[str]) -> "subprocess.Popen[bytes]":
    (work / "rows").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "models.reasoner.schedule", "rows", "--work", str(work)]
    command += ["--recipes", ",".join(recipes)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, env=environment)


def _await_rows(work: Path, recipe: str, producer: "subprocess.Popen[bytes]") -> str:
    path = work / "rows" / recipe
    while not path.exists():
        if producer.poll() not in (None, 0):
            raise SystemExit(f"the process that makes the rows ended with {producer.returncode}")
        time.sleep(0.2)
    return str(path)


def _stage(recipe: str, work: Path, overrides: dict[str, Any]) -> Path:
    """Run one stage in this process and free what it held."""
    import torch

    from models.reasoner.train import train

    out = work / _FOLDERS[recipe]
    model = train(replace(Settings.load(recipe, []), **overrides), out)
    gc.collect()
    torch.cuda.empty_cache()
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    marks = steps[:: max(1, len(steps) // 5)] + steps[-2:-1]
    keys = ("loss", "mean_token_accuracy", "kl", "reward", "rewards/accuracy_reward/mean", "completions/mean_length")
    for step in marks:
        shown = {key.rpartition("/")[0] or key: round(step[key], 4) for key in keys if key in step}
        _say(f"{recipe} step {step['step']} at {step['seconds']:.0f} s: {shown}")
    return model


def _score(directory: Path, results: dict[str, Any], out: Path) -> None:
    import torch

    from models.reasoner.architectures import load_model, load_tokenizer
    from models.reasoner.score import score, show

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    name = directory.parent.name
    results[name] = [score(model, tokenizer, test, device=device) for test in ("test", "test_hard")]
    for entry in results[name]:
        _say(show(name, entry))
    (out / "scores.json").write_text(json.dumps(results, indent=1) + "\n")


def pack(work: Path, out: Path, stages: tuple[str, ...]) -> None:
    """Copy weights in parts, and all logs, to `out`."""
    for stage in stages:
        content = (work / stage / "model" / "model.safetensors").read_bytes()
        for index, offset in enumerate(range(0, len(content), _PART_BYTES)):
            (out / f"{stage}.safetensors.{index}").write_bytes(content[offset : offset + _PART_BYTES])
    logs = {}
    for path in sorted(work.glob("*/steps.jsonl")):
        config = path.parent / "model" / "config.json"
        logs[path.parent.name] = {"steps": path.read_text(), "config": config.read_text() if config.exists() else ""}
    (out / "logs.json").write_text(json.dumps(logs))


def join(parts: Path, work: Path, template: Path) -> None:
    """Put the parts in `parts` together as WORK/STAGE/model, with the small files of `template`."""
    for first in sorted(parts.glob("*.safetensors.0")):
        stage = first.name.partition(".")[0]
        directory = work / stage / "model"
        directory.mkdir(parents=True, exist_ok=True)
        content = b"".join(path.read_bytes() for path in sorted(parts.glob(f"{stage}.safetensors.*")))
        (directory / "model.safetensors").write_bytes(content)
        for path in template.iterdir():
            if path.suffix in (".json", ".jinja"):
                (directory / path.name).write_bytes(path.read_bytes())


def base(work: Path, out: Path, seconds: float) -> None:
    """Student SFT, teacher SFT, distillation, then GRPO for the time that is left."""
    producer = _start_rows(work, list(STEPS))
    results: dict[str, Any] = {}
    rows = _await_rows(work, "student-sft", producer)
    sft = _stage("student-sft", work, {"rows": rows, "steps": STEPS["student-sft"], "limit_s": 150.0})
    pack(work, out, ("sft",))
    rows = _await_rows(work, "teacher-sft", producer)
    teacher = _stage("teacher-sft", work, {"rows": rows, "steps": STEPS["teacher-sft"], "limit_s": 210.0})
    _score(sft, results, out)
    _score(teacher, results, out)
    rows = _await_rows(work, "student-distill", producer)
    left = seconds - (time.monotonic() - _START)
    overrides = {"rows": rows, "model": str(sft), "teacher": str(teacher), "steps": STEPS["student-distill"]}
    distilled = _stage("student-distill", work, overrides | {"limit_s": left - 50})
    pack(work, out, ("sft", "distill"))
    _score(distilled, results, out)
    left = seconds - (time.monotonic() - _START)
    if left > 50:
        _stage("student-grpo", work, {"model": str(distilled), "steps": 40, "limit_s": left - 40})
        pack(work, out, ("sft", "distill"))
        _score(work / "grpo" / "model", results, out)


def longer(work: Path, out: Path, seconds: float, source: Path) -> None:
    """More supervised training of a student, about half of the time, then reinforcement learning."""
    producer = _start_rows(work, ["student-long"])
    import torch  # noqa: F401 - takes long; meanwhile the rows are made

    import models.reasoner.train  # noqa: F401

    results: dict[str, Any] = {}
    rows = _await_rows(work, "student-long", producer)
    student = _stage("student-long", work, {"rows": rows, "model": str(source), "limit_s": 0.5 * seconds})
    pack(work, out, ("long",))
    _score(student, results, out)
    left = seconds - (time.monotonic() - _START)
    model = _stage("student-grpo", work, {"model": str(student), "limit_s": left - 30})
    pack(work, out, ("long", "grpo"))
    _score(model, results, out)


def grpo(work: Path, out: Path, seconds: float, source: Path, overrides: list[str]) -> None:
    """Reinforcement learning from a finished student; both are scored."""
    results: dict[str, Any] = {}
    own = Settings.load("student-grpo", overrides)
    changed = {name: getattr(own, name) for name in Settings.__dataclass_fields__}
    changed |= {"model": str(source), "limit_s": seconds - 45 - (time.monotonic() - _START)}
    model = _stage("student-grpo", work, changed)
    pack(work, out, ("grpo",))
    _score(model, results, out)


def main() -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the bundled model within limited time.")
    parser.add_argument("action", choices=("base", "long", "grpo", "rows", "join"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--recipes", default="", help="rows: whose rows to make")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--source", type=Path, help="grpo: the model to start from")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    for directory in (options.work, options.out):
        directory.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        if options.action == "base":
            base(options.work, options.out, options.seconds)
        elif options.action == "long":
            longer(options.work, options.out, options.seconds, options.source)
        elif options.action == "grpo":
            grpo(options.work, options.out, options.seconds, options.source, options.overrides)
        elif options.action == "rows":
            make_rows(options.work, options.recipes.split(","))
        else:
            join(options.out, options.work, Path(__file__).parent / "weights")
    except Exception:
        traceback.print_exc()
        if options.action in ("base", "long", "grpo"):
            pack(options.work, options.out, ())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
