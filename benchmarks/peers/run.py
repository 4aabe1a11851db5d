"""qcompile and its peers on the same checkpoint, prompts and tokens, side by side in one interleaved run.

    python benchmarks/peers/run.py CHECKPOINT --ours int8=DIR --ours int4=DIR [--peers NAME ...] [--rounds 3] [-o out/peers]
    python benchmarks/peers/run.py CHECKPOINT --ours … --reference FP32_DIR --text out/reference.jsonl --quality-tokens 6144

CHECKPOINT is a Hugging Face directory; every DIR was compiled from it. `--reference` lets a float32 model that qcompile
compiled stand for transformers, whose environment is then not needed; `--text` compares on pieces of 512 tokens spread over
that text. Each peer gets an environment of its own under the output directory, with the exact versions of peers.toml, and
converts the checkpoint once. Then, round by round, every engine runs once in a fresh process. Quality is KL, top-1 and p99
against the checkpoint in float32 on the same given tokens, and the length of the common beginning of greedy answers. A peer
that cannot be installed, converted or run is a row that says why.

Writes results.json, results.md, and results.jsonl as it goes; a second call goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from measure import Job, Plan, Runner, measure_all
from results import markdown, summarize
from setup_peers import Ours, prepare, read_peers

from qcompile.benchmark.machine import busy_warning, describe_machine
from qcompile.quality.documents import PROMPTS, built_in_documents, read_documents
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer

SHORT, LONG, BATCH = 128, 1024, 8
REFERENCE, OWN_REFERENCE = "transformers-fp32", "fp32"
PIECE_TOKENS = 512


def main() -> int:
    """Set up, measure, write."""
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    peers = read_peers(Path(__file__).with_name("peers.toml"))
    wanted = arguments.peers or list(peers)
    unknown = [name for name in wanted if name not in peers]
    if unknown:
        print(f"run.py: no peer '{unknown[0]}'; there are {', '.join(peers)}", file=sys.stderr)
        return 2
    ours = [Ours(*pair.split("=", 1)) for pair in arguments.ours]
    reference = REFERENCE
    if arguments.reference is not None:
        ours.insert(0, Ours(OWN_REFERENCE, str(arguments.reference)))
        reference = f"qcompile-{OWN_REFERENCE}"
    writes_reference = arguments.reference is None and arguments.quality_tokens > 0
    names = with_reference(wanted) if writes_reference else wanted
    prepared = [prepare(peers[name], arguments.checkpoint, arguments.output, say) for name in names]
    prepared += [one.prepared(sys.executable) for one in ours]
    machine = describe_machine(arguments.threads)
    job = Job(
        checkpoint=str(arguments.checkpoint),
        threads=arguments.threads,
        logits=str(arguments.output / "reference-logits.f32"),
        **texts(Path(ours[0].directory), arguments.quality_tokens, arguments.text),
    )
    plan = Plan(job, tuple(prepared), reference, arguments.rounds, skip_quality=not arguments.quality_tokens)
    samples = measure_all(plan, arguments.output / "results.jsonl", Runner(), say)
    record = {
        "machine": machine,
        "checkpoint": str(arguments.checkpoint),
        "peers": summarize(prepared, samples, reference),
    }
    record["warning"] = busy_warning(machine["load_average"], machine["cores"])
    write(arguments.output / "results.json", json.dumps(record, indent=1) + "\n")
    table = markdown(record)
    write(arguments.output / "results.md", table)
    print(table)
    return 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--ours", action="append", required=True, metavar="NAME=DIR", help="A compiled model; repeatable."
    )
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="Which; by default all of peers.toml.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--quality-tokens", type=int, default=600, help="Tokens to compare; 0: none.")
    parser.add_argument("--text", type=Path, help="A .jsonl to compare on, such as that of reference_text.py.")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="A float32 compiled model to compare with.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/peers"))
    arguments = parser.parse_args()
    if any("=" not in pair for pair in arguments.ours):
        parser.error("--ours: NAME=DIR is wanted")
    arguments.output = arguments.output.resolve()
    arguments.checkpoint = arguments.checkpoint.resolve()
    return arguments


def with_reference(names: list[str]) -> list[str]:
    """Return the names with the reference first: it writes the logits that all others are compared with."""
    return [REFERENCE, *(name for name in names if name != REFERENCE)]


def texts(directory: Path, quality_tokens: int, text: Path | None) -> dict[str, Any]:
    """Return prompts and texts as token ids, cut by the tokenizer of a compiled model."""
    tokenizer = Tokenizer(directory, Manifest.load(directory))
    documents = [tokenizer.encode(document.text or "") for document in built_in_documents()]
    everything = [i for ids in documents for i in ids]
    chat = [tokenizer.chat_template.render([{"role": "user", "content": text}]) for _, text in PROMPTS]
    share = max(2, quality_tokens // len(documents))
    return {
        "prompts": {
            "short": [cut(everything, row * 777, SHORT) for row in range(BATCH)],
            "long": [cut(everything, 2000, LONG)],
            "chat": [tokenizer.encode(text, add_special_tokens=False) for text in chat],
        },
        "texts": [ids[:share] for ids in documents] if text is None else spread(tokenizer, text, quality_tokens),
    }


def spread(tokenizer: Tokenizer, text: Path, num_tokens: int) -> list[list[int]]:
    """Return pieces of 512 tokens, evenly from all whole ones of the documents."""
    documents = [tokenizer.encode(document.text or "") for document in read_documents(text)]
    pieces = [
        ids[start : start + PIECE_TOKENS]
        for ids in documents
        for start in range(0, len(ids) - PIECE_TOKENS + 1, PIECE_TOKENS)
    ]
    count = max(1, min(num_tokens // PIECE_TOKENS, len(pieces)))
    return [pieces[round(i * (len(pieces) - 1) / max(count - 1, 1))] for i in range(count)]


def cut(ids: list[int], start: int, length: int) -> list[int]:
    """Return tokens from `start` on, going round."""
    return [ids[(start + i) % len(ids)] for i in range(length)]


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
