"""Decode steps of several compiled models in one process, in turns: tells apart what fresh processes cannot.

    python benchmarks/decode_in_turns.py A B [A …] [--case 1@128 --case 8@128] [--turns 14] [--steps 12]

From one process to the next, and from one minute to the next, the same model may take 10 to 20 % longer on a shared host. Those
that take turns of a dozen steps see the same minutes, and half a per cent shows. Name the first model again at the end: how
far its two columns are apart is how far the others can be trusted. The steps are those of the runtime's session: no
sampling, no detokenizing. All models must fit in memory together.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompile.runtime.errors import QCompileError
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_session import open_ort_session

_WARM_UP = 2  # steps at the begin of a turn: the others' weights are in the caches


class _QuietOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
    """Threads that wait for work without spinning between runs: those of other sessions would take a core from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.add_session_config_entry("session.force_spinning_stop", "1")


def main() -> int:
    """Time every case and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument(
        "--case", action="append", type=_case, metavar="ROWS@CONTEXT", help="default: 1@128 1@1024 8@128"
    )
    parser.add_argument("--turns", type=int, default=14)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    if arguments.steps <= _WARM_UP or arguments.turns < 1:
        parser.error(
            f"--steps {arguments.steps} --turns {arguments.turns}; wanted more than {_WARM_UP} steps, and a turn"
        )
    cases = arguments.case or [(1, 128), (1, 1024), (8, 128)]
    onnxruntime.SessionOptions = _QuietOptions
    try:
        sessions = [open_ort_session(d, Manifest.load(d), arguments.threads) for d in arguments.models]
        for session in sessions:
            session.reserve(max(rows for rows, _ in cases), max(context for _, context in cases) + arguments.steps)
    except QCompileError as error:
        parser.error(str(error))
    print("median ms of a step, and how many times as fast as the first")
    for rows, context in cases:
        taken = in_turns(sessions, rows, context, arguments.turns, arguments.steps)
        medians = [float(np.median(seconds)) * 1e3 for seconds in taken]
        columns = "  ".join(f"{ms:7.2f} {medians[0] / ms:6.3f}" for ms in medians)
        print(f"{f'{rows}@{context}':>8}  {columns}", flush=True)
    return 0


def in_turns(sessions: list[Any], rows: int, context: int, turns: int, steps: int) -> list[list[float]]:
    """Return the seconds of each session's steps; every turn begins with another session.

    Args:
        sessions: With room for the rows and the context, and alike in vocabulary.
        rows: Tokens computed at once.
        context: Tokens behind which every turn begins anew.
        turns: Of every session.
        steps: Of every turn; the first two are not counted.
    """
    rng = np.random.default_rng(0)
    vocab_size = min(session.vocab_size for session in sessions)
    for row in range(rows):
        prompt = rng.integers(0, vocab_size, (1, context))
        for session in sessions:
            _prefill(session, row, prompt)
    taken: list[list[float]] = [[] for _ in sessions]
    for turn in range(turns):
        for place in range(len(sessions)):
            index = (place + turn) % len(sessions)
            for step in range(steps):
                ids = rng.integers(0, vocab_size, (rows, 1))
                started = time.perf_counter()
                sessions[index].forward(0, ids, [context + step] * rows)
                if step >= _WARM_UP:
                    taken[index].append(time.perf_counter() - started)
    return taken


def _prefill(session: Any, row: int, prompt: np.ndarray) -> None:
    chunk = min(session.max_chunk, 256) if session.can_extend else prompt.shape[1]
    for start in range(0, prompt.shape[1], chunk):
        session.forward(row, prompt[:, start : start + chunk], [start], need_scores=False)


def _case(text: str) -> tuple[int, int]:
    rows, at, context = text.partition("@")
    if not (at and rows.isdecimal() and context.isdecimal() and int(rows) and int(context)):
        raise argparse.ArgumentTypeError(f"'{text}'; wanted ROWS@CONTEXT, such as 8@128")
    return int(rows), int(context)


if __name__ == "__main__":
    sys.exit(main())
