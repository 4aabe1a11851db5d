"""KL, top-1 and size of many compiled models against one reference, in one pass over a text.

    python benchmarks/reference_text.py out/reference.jsonl
    python benchmarks/quality_table.py FP32_DIR int8=DIR int4=DIR … --data out/reference.jsonl [--tokens 20480] [--json FILE]

All models are loaded and read the same pieces of 1,024 tokens, spread evenly over the text, so the reference is computed
once for all of them; figures are those of `qcompile quality`, whose windows overlap. MB are those of the whole directory,
tokenizer included. Each row is printed with the standard error of its mean KL; memory is that of all models together. With
`--keep DIR` what was computed of each piece is kept there, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.quality.divergence import RowScorer, Summary, TokenScores
from qcompile.quality.documents import read_documents
from qcompile.quality.models import open_model
from qcompile.quality.scorer import Scorer
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer

CHUNK = 256


def main() -> int:
    """Read the text with all models, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a piece.")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="Where the scores of finished pieces are kept.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if any("=" not in pair for pair in arguments.models):
        parser.error("NAME=DIR is wanted")
    directories = {name: Path(path) for name, path in (pair.split("=", 1) for pair in arguments.models)}
    pieces = spread(arguments.reference, arguments.data, arguments.tokens, arguments.length)
    rows = measure(arguments.reference, directories, pieces, arguments.keep)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def spread(directory: Path, data: Path, num_tokens: int, length: int) -> list[tuple[str, np.ndarray]]:
    """Return (group, ids) of whole pieces, evenly from all of them; fewer when the text has fewer."""
    tokenizer = Tokenizer(directory, Manifest.load(directory))
    found = []
    for document in read_documents(data):
        ids = np.array(tokenizer.encode(document.text or ""), np.int64)
        found += [(document.group, ids[i : i + length]) for i in range(0, len(ids) - length + 1, length)]
    count = min(-(-num_tokens // (length - 1)), len(found))
    if not count:
        raise SystemExit(f"{data}: no piece of {length} tokens")
    return [found[i] for i in dict.fromkeys(np.linspace(0, len(found) - 1, count).round().astype(int).tolist())]


def measure(
    reference: Path, directories: dict[str, Path], pieces: list[tuple[str, np.ndarray]], keep: Path | None
) -> list[dict[str, Any]]:
    """Return one record per model."""
    parts: dict[str, dict[str, list[TokenScores]]] = {name: {} for name in directories}
    run = _Run(reference, directories, len(pieces[0][1]))
    models = b"".join((path / "qcompile.json").read_bytes() for path in (reference, *directories.values()))
    for number, (group, ids) in enumerate(pieces, 1):
        kept = None if keep is None else keep / f"{hashlib.sha256(models + ids.tobytes()).hexdigest()[:16]}.npz"
        scores = load(kept, list(directories)) or run.scores(ids)
        if kept is not None:
            save(kept, scores)
        for name, rows in scores.items():
            parts[name].setdefault(group, []).append(rows)
        print(f"{number}/{len(pieces)}", file=sys.stderr, flush=True)
    return [record(name, directories[name], groups) for name, groups in parts.items()]


class _Run:
    """All models, loaded when the first piece is not kept yet."""

    def __init__(self, reference: Path, directories: dict[str, Path], length: int) -> None:
        self.paths, self.length = {"reference": reference, **directories}, length
        self.judge = RowScorer(("reference", "model"), default_threads())
        self.scorers: dict[str, Scorer] = {}

    def scores(self, ids: np.ndarray) -> dict[str, TokenScores]:
        """Return what each model makes of a piece."""
        if not self.scorers:
            self.scorers = {
                name: Scorer(open_model(path), self.length, default_threads(), with_stream=False)
                for name, path in self.paths.items()
            }
        for scorer in self.scorers.values():
            scorer.reset()
        found: dict[str, list[TokenScores]] = {}
        for start in range(0, self.length - 1, CHUNK):
            stop = min(start + CHUNK, self.length - 1)
            wanted = self.scorers["reference"].extend(ids[start:stop]).logits
            for name, scorer in list(self.scorers.items())[1:]:
                logits = scorer.extend(ids[start:stop]).logits
                found.setdefault(name, []).append(self.judge.score(wanted, logits, ids[start + 1 : stop + 1]))
        return {name: TokenScores.joined(rows) for name, rows in found.items()}


def load(path: Path | None, names: list[str]) -> dict[str, TokenScores] | None:
    """Return the kept scores of a piece if they are those of these models."""
    if path is None or not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        if set(stored.files) != {f"{name}.{f.name}" for name in names for f in fields(TokenScores)}:
            return None
        return {n: TokenScores(**{f.name: stored[f"{n}.{f.name}"] for f in fields(TokenScores)}) for n in names}


def save(path: Path, scores: dict[str, TokenScores]) -> None:
    """Keep the scores of a piece, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"{n}.{f.name}": getattr(s, f.name) for n, s in scores.items() for f in fields(s)}
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def record(name: str, directory: Path, groups: dict[str, list[TokenScores]]) -> dict[str, Any]:
    """Return the figures of one model."""
    everything = TokenScores.joined([part for own in groups.values() for part in own])
    size = sum(f.stat().st_size for f in directory.iterdir() if f.is_file())
    by_group = {group: float(TokenScores.joined(own).kl.mean()) for group, own in groups.items()}
    return {"name": name, "size_bytes": size, **vars(Summary.of(everything)), "groups": by_group}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    groups = list(rows[0]["groups"])
    lines = [
        f"{rows[0]['num_tokens']} tokens",
        "",
        f"| model | mean KL | ± | 99 % | top-1 | {' | '.join(groups)} | MB |",
        "|" + "---|" * (6 + len(groups)),
    ]
    for row in rows:
        own = " | ".join(f"{row['groups'][group]:.5f}" for group in groups)
        figures = (
            f"{row['mean_kl']:.5f} | {row['kl_standard_error']:.5f} | {row['p99_kl']:.4f} | {row['top1_agreement']:.2%}"
        )
        lines.append(f"| {row['name']} | {figures} | {own} | {row['size_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
