"""The whole training of the bundled model inside limited time on one GPU.

    python -m models.reasoner.schedule probe --work W            # a few steps of each stage: does it run, how fast
    python -m models.reasoner.schedule sft --work W --seconds 450      # teacher and student SFT, side by side
    python -m models.reasoner.schedule distill --work W --seconds 280  # student from the teacher
    python -m models.reasoner.schedule grpo --work W --seconds 200
    python -m models.reasoner.schedule score --work W --out results/   # all student checkpoints, both test sets
    python -m models.reasoner.schedule pack --work W --stages grpo --out results/ --part-mb 15

Every stage is its own process (`models.reasoner.train`); what it did is in W/STAGE/log.txt and steps.jsonl. The number
of steps follows from the step time that the probe measured, so that the learning rate reaches its end in time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

STUDENT_SFT_STEPS = 900
_PROBE_STEPS = {"teacher-sft": 24, "student-sft": 24, "student-distill": 16, "student-grpo": 4}
_SAFETY = 0.94


def start(recipe: str, out: Path, *overrides: str) -> "subprocess.Popen[bytes]":
    """One training stage as a process; its output goes to OUT/log.txt."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "models.reasoner.train", recipe, "--out", str(out)]
    command += [text for override in overrides for text in ("--set", override)]
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Wait; on failure show the end of the log and stop everything."""
    code = process.wait()
    log = (out / "log.txt").read_text(errors="replace").splitlines()
    print(f"[{time.strftime('%H:%M:%S')}] {out.name}: exit {code}; " + " | ".join(log[-1:])[:300], flush=True)
    if code:
        print("\n".join(log[-40:]), flush=True)
        raise SystemExit(code)


def seconds_per_step(out: Path) -> float:
    """Median time between the later steps."""
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    times = [step["seconds"] for step in steps if "train_runtime" not in step]
    times = times[len(times) // 2 - 1 :]
    return statistics.median(b - a for a, b in zip(times, times[1:], strict=False))


def probe(work: Path) -> None:
    """Run a few steps of each stage at full batch size and write their times to WORK/probe.json."""
    shutil.rmtree(work / "probe", ignore_errors=True)
    times: dict[str, float] = {}
    base = work / "probe"
    for recipe, steps in _PROBE_STEPS.items():
        out = base / recipe
        overrides = [f"steps={steps}", "warmup=4"]
        if recipe in ("student-distill", "student-grpo"):
            overrides.append(f"model={base / 'student-sft' / 'model'}")
        if recipe == "student-distill":
            overrides += [f"teacher={base / 'teacher-sft' / 'model'}", "answers=512"]
        begin = time.monotonic()
        finish(start(recipe, out, *overrides), out)
        times[recipe] = seconds_per_step(out)
        print(f"{recipe}: {times[recipe]:.3f} s a step, {time.monotonic() - begin:.0f} s in all", flush=True)
    (work / "probe.json").write_text(json.dumps(times, indent=1))


def sft(work: Path, seconds: float) -> None:
    """Teacher and student side by side, so that one fills the gaps of the other."""
    times = json.loads((work / "probe.json").read_text())
    spare = seconds - 45 - STUDENT_SFT_STEPS * times["student-sft"]
    steps = int(_SAFETY * spare / times["teacher-sft"])
    print(f"sft: student {STUDENT_SFT_STEPS} steps, teacher {steps} steps", flush=True)
    teacher = start("teacher-sft", work / "teacher", f"steps={steps}", f"limit_s={seconds - 25}")
    student = start("student-sft", work / "sft", f"steps={STUDENT_SFT_STEPS}", f"limit_s={seconds - 25}")
    finish(student, work / "sft")
    finish(teacher, work / "teacher")


def distill(work: Path, seconds: float) -> None:
    """The student learns from the teacher's logits and checked answers."""
    times = json.loads((work / "probe.json").read_text())
    steps = int(_SAFETY * (seconds - 75) / times["student-distill"])
    overrides = [f"model={work / 'sft' / 'model'}", f"teacher={work / 'teacher' / 'model'}", f"steps={steps}"]
    print(f"distill: {steps} steps", flush=True)
    out = work / "distill"
    finish(start("student-distill", out, *overrides, f"limit_s={seconds - 20}"), out)


def grpo(work: Path, seconds: float, source: str, name: str, overrides: list[str]) -> None:
    """Reinforcement learning from the distilled student."""
    times = json.loads((work / "probe.json").read_text())
    steps = int(_SAFETY * (seconds - 30) / times["student-grpo"])
    out = work / name
    print(f"{name}: at most {steps} steps", flush=True)
    settings = [f"model={work / source / 'model'}", f"steps={steps}", f"limit_s={seconds - 15}", *overrides]
    finish(start("student-grpo", out, *settings), out)


def score(work: Path, out: Path) -> None:
    """Score every student that is there, and the teacher."""
    out.mkdir(parents=True, exist_ok=True)
    found = [work / name / "model" for name in ("teacher", "sft", "distill", "grpo", "grpo2")]
    command = [sys.executable, "-m", "models.reasoner.score", *(str(path) for path in found if path.exists())]
    subprocess.run([*command, "--out", str(out / "scores.json")], check=True)


def pack(work: Path, out: Path, stages: list[str], part_mb: int) -> None:
    """Copy weights in parts and the logs, for transports that limit the size of a file."""
    out.mkdir(parents=True, exist_ok=True)
    size = part_mb << 20
    for stage in stages:
        content = (work / stage / "model" / "model.safetensors").read_bytes()
        for index, offset in enumerate(range(0, len(content), size)):
            (out / f"{stage}.safetensors.{index}").write_bytes(content[offset : offset + size])
    logs = {
        path.parent.name: {
            "config": (path.parent / "model" / "config.json").read_text() if (path.parent / "model").exists() else "",
            "steps": path.read_text(),
            "log": (path.parent / "log.txt").read_text(errors="replace"),
        }
        for path in sorted(work.glob("*/steps.jsonl"))
    }
    (out / "logs.json").write_text(json.dumps(logs))


def main() -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Train the bundled model within limited time.")
    parser.add_argument("action", choices=("probe", "sft", "distill", "grpo", "score", "pack"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--stages", default="", help="comma-separated, for pack")
    parser.add_argument("--source", default="distill", help="grpo: the stage to start from")
    parser.add_argument("--name", default="grpo", help="grpo: the name of the stage")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--part-mb", type=int, default=15)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    actions = {
        "probe": lambda: probe(options.work),
        "sft": lambda: sft(options.work, options.seconds),
        "distill": lambda: distill(options.work, options.seconds),
        "grpo": lambda: grpo(options.work, options.seconds, options.source, options.name, options.overrides),
        "score": lambda: score(options.work, options.out),
        "pack": lambda: pack(options.work, options.out, [s for s in options.stages.split(",") if s], options.part_mb),
    }
    actions[options.action]()


if __name__ == "__main__":
    main()
