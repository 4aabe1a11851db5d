"""The whole training of the bundled model on one GPU in two commands of about ten minutes each.

    python -m models.reasoner.schedule teach  --work W --out R --seconds 570   # student SFT, teacher SFT
    python -m models.reasoner.schedule finish --work W --out R --seconds 570   # distillation, GRPO
    python -m models.reasoner.schedule grpo   --work W --out R --seconds 400 --source DIR   # GRPO alone
    python -m models.reasoner.schedule short  --work W --out R --seconds 570   # student SFT, then GRPO at once

`finish` needs W as `teach` left it. A second process makes the training rows meanwhile. Weights leave in parts of 15 MiB
(R/NAME.safetensors.0, .1), logs and scores as JSON, after every stage, so that an interruption loses no finished stage;
`join --out R --work W` puts the parts together as W/NAME/model.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from models.reasoner.arguments import model_directory
from models.reasoner.settings import Settings

_FOLDERS = {
    "student-sft": "sft", "teacher-sft": "teacher", "student-distill": "distill",
}  # fmt: skip
_GRPO = "student-grpo"
_LOGS = {"probe": "probe.json", "validation": "validation.jsonl"}  # what a stage may leave beside its steps
_SUPERVISED = ("student-sft", "teacher-sft", "student-distill")
_PART_BYTES = 15 << 20
_STUDENT_S = 135  # of student SFT, with compiling
_DISTILL_SHARE = 0.66
_SCORE_S = 40  # to save, score and pack a model
_START = time.monotonic()


def _say(text: str) -> None:
    print(f"[{_spent():6.1f} s] {text}", flush=True)


def _spent() -> float:
    return time.monotonic() - _START


def make_rows(work: Path, recipes: list[str]) -> None:
    """Write the rows of the supervised stages, in the order in which they are needed."""
    from models.reasoner import corpus

    for recipe in recipes:
        if (work / "rows" / recipe).exists():
            continue
        settings = Settings.load(recipe, [])
        rows = corpus.solved(
            settings.num_rows or settings.steps * settings.batch_size,
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
    command = [sys.executable, "-m", "models.reasoner.schedule", "rows", "--work", str(work), "--recipes", *recipes]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(["nice", "-n", "5", *command], env=environment, start_new_session=True)


def _await_rows(work: Path, recipe: str, producer: "subprocess.Popen[bytes]") -> str:
    path = work / "rows" / recipe
    while not path.exists():
        if producer.poll() not in (None, 0):
            raise SystemExit(f"the process that makes the rows ended with {producer.returncode}")
        time.sleep(0.2)
    return str(path)


def _stage(recipe: str, work: Path, overrides: list[str]) -> Path:
    """Run one stage in this process, show how it went, and free what it held."""
    import torch

    from models.reasoner.train import train

    out = work / _FOLDERS.get(recipe, "grpo")
    model = train(Settings.load(recipe, overrides), out)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    keys = [f"rewards/{name}_reward/mean" for name in ("format", "accuracy")]
    keys += ["loss", "kl", "grad_norm", "completions/mean_length", "entropy", "rollout_time", "step_time"]
    for step in [*steps[:: max(1, len(steps) // 12)], *steps[-2:-1]]:
        shown = {key.partition("/")[2] or key: round(step[key], 5) for key in keys if key in step}
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
        for key, name in _LOGS.items():
            if (path.parent / name).exists():
                logs[path.parent.name][key] = (path.parent / name).read_text()
    (out / "logs.json").write_text(json.dumps(logs))


def join(parts: Path, work: Path) -> None:
    """Put the parts in `parts` together as WORK/STAGE/model, with their config and the bundled tokenizer."""
    tokenizer = Path(__file__).parent / "weights"
    logs = json.loads((parts / "logs.json").read_text())
    for first in sorted(parts.glob("*.safetensors.0")):
        stage = first.name.partition(".")[0]
        directory = work / stage / "model"
        directory.mkdir(parents=True, exist_ok=True)
        content = b"".join(path.read_bytes() for path in sorted(parts.glob(f"{stage}.safetensors.*")))
        (directory / "model.safetensors").write_bytes(content)
        (directory / "config.json").write_text(logs[stage]["config"])
        for key, name in _LOGS.items():
            if key in logs[stage]:
                (directory.parent / name).write_text(logs[stage][key])
        (directory.parent / "steps.jsonl").write_text(logs[stage]["steps"])
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / name).write_bytes((tokenizer / name).read_bytes())


def _student(work: Path, out: Path, producer: "subprocess.Popen[bytes]", results: dict[str, Any]) -> Path:
    rows = _await_rows(work, "student-sft", producer)
    student = _stage("student-sft", work, [f"rows={rows}", f"limit_s={_STUDENT_S}"])
    pack(work, out, ("sft",))
    _score(student, results, out)
    return student


def teach(work: Path, out: Path, seconds: float) -> None:
    """SFT of the student (the baseline of the results table), then of the teacher with the time that is left."""
    producer = _start_rows(work, list(_SUPERVISED))
    results: dict[str, Any] = {}
    _student(work, out, producer, results)
    rows = _await_rows(work, "teacher-sft", producer)
    teacher = _stage("teacher-sft", work, [f"rows={rows}", f"limit_s={seconds - _spent() - _SCORE_S}"])
    _score(teacher, results, out)
    pack(work, out, ("sft",))


def finish(work: Path, out: Path, seconds: float) -> None:
    """Distillation of the student for two thirds of the time, then GRPO."""
    producer = _start_rows(work, list(_SUPERVISED))
    results: dict[str, Any] = {}
    rows = _await_rows(work, "student-distill", producer)
    models = [f"model={work / 'sft' / 'model'}", f"teacher={work / 'teacher' / 'model'}", f"rows={rows}"]
    student = _stage("student-distill", work, [*models, f"limit_s={_DISTILL_SHARE * (seconds - _spent()) - _SCORE_S}"])
    pack(work, out, ("distill",))
    _score(student, results, out)
    grpo(work, out, seconds, student, _GRPO, [], results)


def grpo(
    work: Path,
    out: Path,
    seconds: float,
    source: Path,
    recipe: str,
    overrides: list[str],
    results: dict[str, Any] | None = None,
) -> None:
    """Reinforcement learning from a finished student, to the end of the time."""
    found = {} if results is None else results
    limit = seconds - _spent() - _SCORE_S
    model = _stage(recipe, work, [f"model={source}", f"limit_s={limit}", *overrides])
    pack(work, out, ("distill", "grpo") if (work / "distill" / "model").exists() else ("grpo",))
    _score(model, found, out)


def short(work: Path, out: Path, seconds: float, recipe: str, overrides: list[str]) -> None:
    """SFT of the student, then reinforcement learning from it without distillation."""
    results: dict[str, Any] = {}
    student = _student(work, out, _start_rows(work, ["student-sft"]), results)
    grpo(work, out, seconds, student, recipe, overrides, results)


def _check(options: argparse.Namespace) -> None:
    """Look at what is given before anything is loaded or written.

    Raises:
        ValueError: A setting or recipe that is none, or `grpo` without a model.
        argparse.ArgumentTypeError: The model is none.
    """
    if options.action in ("grpo", "short"):
        if Settings.load(options.recipe, options.overrides).stage != "grpo":
            raise ValueError(f"--recipe {options.recipe}: wanted one of the stage grpo, such as {_GRPO}")
    elif options.overrides:
        raise ValueError(f"--set is for grpo and short; {options.action} has its own settings")
    if options.action == "grpo":
        if options.source is None:
            raise ValueError("grpo wants --source DIR, the model to start from")
        model_directory(str(options.source))


def main(arguments: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the bundled model within limited time.")
    parser.add_argument("action", choices=("teach", "finish", "grpo", "short", "rows", "join"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=570)
    parser.add_argument("--source", type=Path, help="grpo: the model to start from")
    parser.add_argument("--recipe", default=_GRPO, help="grpo, short: the recipe of the stage grpo")
    parser.add_argument("--recipes", nargs="*", default=list(_SUPERVISED), help="rows: for which recipes")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    for directory in (options.work, options.out):
        directory.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    actions = {
        "teach": lambda: teach(options.work, options.out, options.seconds),
        "finish": lambda: finish(options.work, options.out, options.seconds),
        "grpo": lambda: grpo(
            options.work, options.out, options.seconds, options.source, options.recipe, options.overrides
        ),
        "short": lambda: short(options.work, options.out, options.seconds, options.recipe, options.overrides),
        "rows": lambda: make_rows(options.work, options.recipes),
        "join": lambda: join(options.out, options.work),
    }
    try:
        actions[options.action]()
    except Exception:
        traceback.print_exc()
        if options.action not in ("rows", "join"):
            pack(options.work, options.out, ())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
