"""The whole path on a small model, each step the command a user would type: run by `make demo`.

    python -m examples.demo [--checkpoint DIR] [--work DIR] [--prompt TEXT]

Takes the bundled reasoner (models/reasoner/weights) where it is there, else writes a small Qwen2 with random
weights from a fixed seed: everything is real but what it says. Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qcompile.evaluate import check_answer, read_cases
from qcompile.evaluate.templates import Templates
from tests.tiny_checkpoints import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]
REASONER = ROOT / "models" / "reasoner" / "weights"
PROBLEMS = ROOT / "models" / "reasoner" / "test.jsonl"
SHOWN = ("test-choice-004", "test-math-005", "test-generic-006", "test-code-007")  # one of each type
SEED = 20260
SMALL_QWEN2 = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PROMPT = "Write a function that adds two numbers."

console = Console(highlight=False)


def program() -> str:
    """Return how the shell calls this environment's qcompile: by name only where PATH leads to it."""
    script = Path(sys.executable).with_name("qcompile")
    found = shutil.which("qcompile")
    if found is not None and Path(found).resolve() == script.resolve():
        return "qcompile"
    words = [_shown(script)] if script.is_file() else [_shown(Path(sys.executable)), "-m", "qcompile.cli.main"]
    return shlex.join(words)


def qcompile(*arguments: str | Path) -> None:
    """Show a qcompile command and run it, its output going to the terminal."""
    console.print(Text(f"$ {program()} {shlex.join(map(_shown, arguments))}", style="bold"), soft_wrap=True)
    subprocess.run([sys.executable, "-m", "qcompile.cli.main", *map(str, arguments)], cwd=ROOT, check=True)
    console.print()


def qcompile_json(*arguments: str | Path) -> Any:
    """Run a qcompile command with --json; returns what it prints, whatever its exit code."""
    command = [sys.executable, "-m", "qcompile.cli.main", *map(str, arguments), "--json"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not finished.stdout.strip():
        raise SystemExit(finished.stderr.strip())
    return json.loads(finished.stdout)


def _shown(argument: str | Path) -> str:
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else str(argument)


def checkpoint_for_demo(work: Path) -> tuple[Path, bool]:
    """Return a checkpoint directory and whether it is the trained reasoner."""
    if (REASONER / "config.json").is_file() and any(REASONER.glob("*.safetensors")):
        return REASONER, True
    return write_tiny_checkpoint(work / "checkpoint", "qwen2", seed=SEED, **SMALL_QWEN2), False


def show_problems(model: Path) -> None:
    """Let the reasoner solve some problems of its test set, and check its answers."""
    cases = {case.id: case for case in read_cases(PROBLEMS)[0]}
    num_right = 0
    for name in SHOWN:
        case = cases[name]
        prompt = Templates.load().prompt(case)
        answer = qcompile_json("generate", model, prompt, "--max-new-tokens", "320")["completions"][0]["text"]
        verdict = check_answer(case, answer)
        num_right += verdict.is_correct is True
        judged = "correct" if verdict.is_correct else f"wrong: {verdict.reason}"
        for title, text in ((f"problem {name}", prompt), ("the model", answer), ("checked", judged)):
            console.print(Rule(title, align="left", style="dim"))
            console.print(Text(text))
        console.print()
    all_of_them = f"{program()} eval {_shown(model)} {_shown(PROBLEMS)}"
    console.print(f"{num_right} of {len(SHOWN)} correct; all 200: {all_of_them}\n", soft_wrap=True)


def table_of(models: dict[str, Path], fused: dict[str, int], agreement: dict[str, dict[str, Any]]) -> Table:
    """Return one column per model: what it holds, how far it is from the export, how fast it decodes here."""
    table = Table(title="what happened", title_justify="left", header_style="dim")
    table.add_column("", no_wrap=True)
    summaries = {name: qcompile_json("inspect", path)["models"][0] for name, path in models.items()}
    speeds = {name: _decode_speed(path) for name, path in models.items()}
    for name in models:
        table.add_column(name, justify="right")
    rows = {
        "bytes of weights": [f"{s['weight_bytes']:,}" for s in summaries.values()],
        "nodes": [f"{s['nodes']:,}" for s in summaries.values()],
        **{f"fused: {op}": ["", *[str(count)] * (len(models) - 1)] for op, count in sorted(fused.items())},
        "max logit difference": ["", *[f"{a['max_logit_difference']:.1e}" for a in agreement.values()]],
        "same greedy tokens": ["", *[f"{a['same_tokens']} of {a['num_tokens']}" for a in agreement.values()]],
        "mean KL": ["", *[f"{a['mean_kl']:.1e}" for a in agreement.values()]],
        "decode tokens/s here": [f"{speed:,.0f}" for speed in speeds.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _decode_speed(model: Path) -> float:
    """Return decode tokens per second: the best of three runs of 64 tokens that do not stop early."""
    from qcompile.runtime import Engine, SamplingParams

    params = SamplingParams(max_new_tokens=64, ignore_eos=True)
    with Engine(model) as engine:
        return max(engine.generate(["Hello"], params)[0].tokens_per_s for _ in range(3))


def fused_counts(report: Path) -> dict[str, int]:
    """Return rewrites per fusion out of an optimize report."""
    results = json.loads(report.read_text(encoding="utf-8"))["passes"]
    names = {"fuse-add-rms-norm": "AddRmsNorm", "fuse-attention": "Attention", "fuse-qkv": "packed QKV"}
    names |= {"fuse-gate-up": "packed gate/up", "fuse-swiglu": "SwiGlu"}
    return {names[r["name"]]: r["rewrites"] for r in results if r["name"] in names and r["rewrites"]}


def main() -> None:
    """Run the steps and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="another Hugging Face directory or .gguf file")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "demo", help="emptied first")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    work: Path = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    checkpoint, is_reasoner = (options.checkpoint, False) if options.checkpoint else checkpoint_for_demo(work)
    exported, fused, small = work / "exported", work / "fused", work / "fused-int8"

    qcompile("export", checkpoint, "-o", exported)
    qcompile("optimize", exported, "--passes", "fuse", "-o", fused)
    report = work / "report.json"
    qcompile("optimize", exported, "--passes", "fuse,int8", "-o", small, "--report", report)
    qcompile("verify", exported, fused)
    qcompile("verify", exported, small)
    if is_reasoner:
        show_problems(fused)
    else:
        qcompile("generate", small, options.prompt, "--max-new-tokens", "48")
    if not is_reasoner and options.checkpoint is None:
        console.print("The weights are random (fixed seed), so the text means nothing; the checks above do.\n")
    agreement = {path.name: qcompile_json("verify", exported, path) for path in (fused, small)}
    models = {path.name: path for path in (exported, fused, small)}
    console.print(table_of(models, fused_counts(report), agreement))


if __name__ == "__main__":
    main()
