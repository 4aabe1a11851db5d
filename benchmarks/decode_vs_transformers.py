"""Decode speed of a compiled model against transformers (eager attention, fp32) on the same weights.

    python benchmarks/decode_vs_transformers.py COMPILED_DIR CHECKPOINT [--new-tokens 64] [--runs 5]

CHECKPOINT is the Hugging Face directory or the .gguf file that COMPILED_DIR was made from. Both decode the
same prompts greedily, at batch 1, with the same number of threads, taking turns run by run; what is reported
is the median. transformers is driven by the plainest loop (one forward call and one argmax per token), which
is faster than its generate(). Prints a table and, as its last line, JSON.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from qcompile.export.torch_tracer import cache_argument
from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.host import default_threads

PROMPTS = {
    "English": "Explain in a few sentences why the sky is blue.",
    "Chinese": "请用几句话解释为什么天空是蓝色的。",
    "code": "Write a Python function that merges two sorted lists.",
    "long": "Summarize this text.\n" + "The quick brown fox jumps over the lazy dog by the river. " * 45,
}
_SETTLE_S = 0.3  # idle worker threads spin a while; let them sleep before the other side is timed


class Run(NamedTuple):
    """One generation: the tokens, seconds to the first, tokens per second after it."""

    token_ids: list[int]
    ttft_s: float
    tokens_per_s: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", nargs="+", choices=list(PROMPTS), default=list(PROMPTS), help="Prompts.")
    parser.add_argument("--json", type=Path, help="Also write the JSON to this file.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    reference = load_reference(arguments.checkpoint)
    with Engine(arguments.compiled, arguments.threads, max_batch_size=1, reuse_prefixes=False) as engine:
        results = [
            compare(engine, reference, name, PROMPTS[name], arguments.new_tokens, arguments.runs)
            for name in arguments.only
        ]
    report = {"machine": machine(arguments.threads), "compiled": str(arguments.compiled), "prompts": results}
    print_table(results)
    line = json.dumps(report, ensure_ascii=False)
    if arguments.json is not None:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def load_reference(checkpoint: Path) -> Any:
    """Load the transformers model in float32 with eager attention."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    if checkpoint.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
    from qcompile.export.checkpoint import EMBEDDING, HEAD
    from qcompile.export.export_checkpoint import open_checkpoint

    source = open_checkpoint(str(checkpoint))
    fields = source.config.to_dict() | {"tie_word_embeddings": source.ties_head}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields), **options)
    tensors = dict(source.tensors)
    if source.ties_head:  # a GGUF may hold both; the export keeps the finer one for both
        tensors[EMBEDDING] = tensors.pop(HEAD) if HEAD in tensors else tensors[EMBEDDING]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            columns = tensor.shape[-1]
            rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
            block = np.ascontiguousarray(tensor.block(slice(0, rows), slice(0, columns)), np.float32)
            parameters[name].copy_(torch.from_numpy(block).reshape(tensor.shape))
    return model.eval()


def compare(engine: Engine, reference: Any, name: str, text: str, count: int, runs: int) -> dict[str, Any]:
    """Let both sides take turns on one prompt; the first turn of each warms up and is not counted."""
    chat = engine.tokenizer.has_chat_template
    ids = engine.encode_chat([{"role": "user", "content": text}]) if chat else engine.tokenizer.encode(text)
    ours: list[Run] = []
    theirs: list[Run] = []
    for _ in range(runs + 1):
        for side, run in ((ours, run_engine), (theirs, run_transformers)):
            time.sleep(_SETTLE_S)
            side.append(run(engine if side is ours else reference, ids, count))
    speeds = [statistics.median(run.tokens_per_s for run in side[1:]) for side in (ours, theirs)]
    ttfts = [statistics.median(run.ttft_s for run in side[1:]) for side in (ours, theirs)]
    return {
        "prompt": name,
        "num_prompt_tokens": len(ids),
        "num_new_tokens": count,
        "runs": runs,
        "qcompile_tokens_per_s": round(speeds[0], 3),
        "transformers_tokens_per_s": round(speeds[1], 3),
        "speedup": round(speeds[0] / speeds[1], 3),
        "qcompile_ttft_s": round(ttfts[0], 4),
        "transformers_ttft_s": round(ttfts[1], 4),
        "same_tokens": ours[0].token_ids == theirs[0].token_ids,
    }


def run_engine(engine: Engine, ids: list[int], count: int) -> Run:
    """Generate with qcompile."""
    completion = engine.generate([ids], SamplingParams(max_new_tokens=count, ignore_eos=True))[0]
    return Run(completion.token_ids, completion.ttft_s, completion.tokens_per_s)


def run_transformers(model: Any, ids: list[int], count: int) -> Run:
    """Generate with transformers: forward, argmax, again."""
    started = time.perf_counter()
    tokens: list[int] = []
    given = torch.tensor([ids])
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        while len(tokens) < count:
            output = model(input_ids=given, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
            given = output.logits[:, -1:].argmax(dim=-1)
            tokens.append(int(given))
            if len(tokens) == 1:
                first = time.perf_counter()
    seconds = time.perf_counter() - first
    return Run(tokens, first - started, (count - 1) / seconds)


def machine(threads: int) -> dict[str, Any]:
    """Name what the figures were measured on."""
    import onnxruntime

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one line per prompt."""
    head = f"{'prompt':10} {'tokens':>7} {'qcompile':>12} {'transformers':>13} {'ratio':>6}"
    print(f"{head}   TTFT (s)      same tokens")
    for r in results:
        print(
            f"{r['prompt']:10} {r['num_prompt_tokens']:>7} {r['qcompile_tokens_per_s']:>8.2f} t/s "
            f"{r['transformers_tokens_per_s']:>9.2f} t/s {r['speedup']:>5.2f}x   "
            f"{r['qcompile_ttft_s']:.3f} / {r['transformers_ttft_s']:.3f}   {r['same_tokens']}"
        )


if __name__ == "__main__":
    main()
