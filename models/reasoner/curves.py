"""Curves of a run from its steps.jsonl: loss, and for GRPO reward, format, accuracy and length over the steps."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_PANELS = (
    ("loss", ("loss",)),
    ("KL and cross entropy per token", ("kl", "cross_entropy")),
    ("reward", ("reward",)),
    ("format", ("rewards/format_reward/mean",)),
    ("accuracy", ("rewards/accuracy_reward/mean",)),
    ("length in tokens", ("completions/mean_length",)),
)


def read(path: Path) -> list[dict[str, Any]]:
    """The steps; a line torn by a crash is left out."""
    steps = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(step, dict) and "step" in step:
            steps.append(step)
    return steps


def draw(path: Path, directory: Path) -> Path | None:
    """Write curves.png with one panel per quantity that the run reports."""
    steps = read(path)
    panels = [(title, [k for k in keys if any(k in step for step in steps)]) for title, keys in _PANELS]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(step["step"], step[key]) for step in steps if key in step]
            axis.plot(*zip(*points, strict=True), label=key, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    target = directory / "curves.png"
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def main(arguments: list[str] | None = None) -> None:
    """Draw the curves of one run."""
    parser = argparse.ArgumentParser(description="Draw the curves of a run.")
    parser.add_argument("steps", type=Path)
    options = parser.parse_args(arguments)
    if not options.steps.is_file():
        parser.error(f"{options.steps} is no file; wanted the steps.jsonl of a run")
    if draw(options.steps, options.steps.parent) is None:
        parser.error(f"{options.steps} has no step to draw; wanted the steps.jsonl of a run")


if __name__ == "__main__":
    main()
