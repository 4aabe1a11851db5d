"""`qcompile eval` batched against one by one, and its texts against transformers on the same weights.

    python benchmarks/eval_batched.py COMPILED_DIR CASES.jsonl [--checkpoint HF_DIR] [--json FILE]

Every case is answered greedily, one text each, through the runner of `qcompile eval` (journal included). One by one
means one request in the engine at a time. The two take turns: the cases one by one are cut into parts, and the whole
file is answered batched before each part, so that a busy machine slows both. With --checkpoint the texts are compared
with those of transformers (float32, eager attention, one prompt at a time, one argmax per step). Prints a table and,
as its last line, JSON.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qcompile.errors import EvaluateError, QCompileError
from qcompile.evaluate.asking import STOP
from qcompile.evaluate.cases import read_cases
from qcompile.evaluate.evaluate import identity
from qcompile.evaluate.journal import Journal
from qcompile.evaluate.runner import Request, Runner, make_requests
from qcompile.evaluate.settings import EvalSettings, token_limits
from qcompile.evaluate.templates import Templates
from qcompile.export.torch_tracer import cache_argument
from qcompile.runtime import Engine
from qcompile.runtime.host import default_threads


class Timing(NamedTuple):
    """Tokens and seconds of one pass, and its texts by key."""

    tokens: int
    seconds: float
    texts: dict[str, str]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compiled", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory: compare the texts.")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--parts", type=int, default=4, help="Turns that the two take.")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path, help="Also write the JSON to this file.")
    options = parser.parse_args()
    try:
        measure(options)
    except QCompileError as error:
        parser.error(" ".join(str(error).split()))


def measure(options: argparse.Namespace) -> None:
    """Measure and print what the command line asks for.

    Raises:
        QCompileError: The model or the cases cannot be read.
    """
    settings = EvalSettings(token_limits((), options.max_new_tokens), samples=1)
    cases, _ = read_cases(options.cases)
    if not cases:
        raise EvaluateError(f"{options.cases}: not one line is a case")
    with (
        Engine(options.compiled, options.threads, options.batch_size) as many,
        Engine(options.compiled, options.threads, 1) as one,
    ):
        requests, refusals = make_requests(many, cases, Templates.load(), settings)
        if refusals:
            raise EvaluateError(f"{options.cases}: case {refusals[0].case.id} cannot be asked: {refusals[0].message}")
        report = compare(many, one, requests, settings, options.batch_size, options.parts)
        if options.checkpoint is not None:
            report["transformers"] = texts_of_transformers(options, many, requests, report.pop("texts"))
    report.pop("texts", None)
    report["machine"] = {"cpus": os.cpu_count(), "machine": platform.machine(), "threads": options.threads}
    line = json.dumps(report)
    if options.json is not None:
        options.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def compare(
    many: Engine, one: Engine, requests: Sequence[Request], settings: EvalSettings, batch_size: int, parts: int
) -> dict[str, Any]:
    """Answer everything `parts` times batched and once one by one, in turns."""
    answer(many, requests[:batch_size], settings, batch_size)  # warm up
    answer(one, requests[:2], settings, 1)
    batched: list[Timing] = []
    single: list[Timing] = []
    size = -(-len(requests) // parts)
    for start in range(0, len(requests), size):
        batched.append(answer(many, requests, settings, batch_size))
        single.append(answer(one, requests[start : start + size], settings, 1))
        print(f"batched {rate([batched[-1]]):7.1f} tokens/s, one by one {rate([single[-1]]):7.1f}", flush=True)
    texts = batched[0].texts
    alone = {key: text for timing in single for key, text in timing.texts.items()}
    speedup = rate(batched) / rate(single)
    print(f"together {rate(batched):.1f} against {rate(single):.1f} tokens/s: {speedup:.2f} times")
    return {
        "cases": len(requests),
        "batch_size": batch_size,
        "tokens": batched[0].tokens,
        "batched_tokens_per_s": round(rate(batched), 2),
        "batched_tokens_per_s_median": round(statistics.median(rate([timing]) for timing in batched), 2),
        "single_tokens_per_s": round(rate(single), 2),
        "speedup": round(speedup, 3),
        "same_text_batched_and_single": sum(texts[key] == text for key, text in alone.items()),
        "texts": texts,
    }


def rate(timings: Sequence[Timing]) -> float:
    """Tokens per second."""
    return sum(timing.tokens for timing in timings) / sum(timing.seconds for timing in timings)


def answer(engine: Engine, requests: Sequence[Request], settings: EvalSettings, batch_size: int) -> Timing:
    """One pass of the runner with a journal of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / "results.json", identity(engine.path, settings)) as journal,
    ):
        started = time.perf_counter()
        Runner(engine, journal, batch_size).run(requests)
        seconds = time.perf_counter() - started
        texts = {request.key: journal.samples[request.key].text for request in requests}
        return Timing(journal.generated.tokens, seconds, texts)


def texts_of_transformers(
    options: argparse.Namespace, engine: Engine, requests: Sequence[Request], texts: dict[str, str]
) -> dict[str, Any]:
    """Answer with transformers and count equal texts."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.checkpoint)
    different = []
    for number, request in enumerate(requests):
        if number % 50 == 0:
            print(f"transformers: {number} of {len(requests)}, {len(different)} different", flush=True)
        with torch.inference_mode():
            text = greedy_text(model, tokenizer, request, engine.end_ids)
        if text != texts[request.key]:
            different.append(request.case.id)
    same = len(requests) - len(different)
    print(f"same text as transformers: {same} of {len(requests)}; different: {', '.join(different) or 'none'}")
    return {"same": same, "cases": len(requests), "different": different, "version": transformers.__version__}


def greedy_text(model: Any, tokenizer: Any, request: Request, end_ids: Sequence[int]) -> str:
    """The greedy text of transformers, up to an end token or the stop string."""
    import torch

    chat = tokenizer.decode(request.prompt_ids)
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == list(request.prompt_ids)
    step, cache, ids = torch.tensor([request.prompt_ids]), None, []
    for _ in range(request.options["max_new_tokens"]):
        output = model(step, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
        cache, step = getattr(output, cache_argument(model)), output.logits[:, -1:].argmax(-1)
        ids.append(int(step))
        if ids[-1] in end_ids:
            break
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if STOP in text:
            return str(text[: text.index(STOP) + len(STOP)])
    return str(tokenizer.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    main()
