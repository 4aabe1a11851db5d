"""Tokens per second over concurrencies, input lengths and output lengths, each cell in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.benchmark.cases import Case, prompts_of
from qcompile.benchmark.run import run_in_process
from qcompile.errors import PackageError
from qcompile.quality.documents import built_in_documents
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer

_CHILD = "qcompile.benchmark.child"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        concurrency: Requests together.
        input_tokens: Of each prompt.
        output_tokens: Of each answer.
        tokens_per_s: Output tokens of all requests over the whole time; None when it did not run.
        duration_ms: From the requests to the last token.
        ttft_ms: From the requests to the first token.
        reason: Why it did not run.
    """

    concurrency: int
    input_tokens: int
    output_tokens: int
    tokens_per_s: float | None
    duration_ms: float = 0.0
    ttft_ms: float = 0.0
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """The fields for JSON."""
        return dict(vars(self))


def measure_matrix(
    directory: Path,
    concurrencies: Sequence[int],
    input_lengths: Sequence[int],
    output_lengths: Sequence[int],
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Time every combination.

    Raises:
        ManifestError: The directory is damaged or is none.
        PackageError: It is compiled for an NPU.
    """
    manifest = Manifest.load(directory)
    if manifest.target.startswith("ascend"):
        raise PackageError(f"{directory}: compiled for {manifest.target}; times need the device, and none is here")
    tokenizer = Tokenizer(directory, manifest)
    ids = [i for document in built_in_documents() for i in tokenizer.encode(document.text or "")]
    cells = []
    for concurrency in concurrencies:
        for context in input_lengths:
            for length in output_lengths:
                say(f"concurrency {concurrency}, {context} tokens in, {length} out")
                case = Case(concurrency, context, max(1, length - 1))
                cells.append(_cell(directory, manifest, case, ids, length, threads))
    return cells


def _cell(
    directory: Path, manifest: Manifest, case: Case, ids: Sequence[int], length: int, threads: int | None
) -> Cell:
    most = manifest.model.max_position_embeddings
    if case.room > most:
        reason = f"{case.room} tokens are needed, the model holds {most}"
        return Cell(case.batch, case.context, length, None, reason=reason)
    job = {
        "directory": str(directory.resolve()),
        "prompts": prompts_of(ids, case),
        "steps": case.steps,
        "room": case.room - case.context,
        "max_model_len": case.room,
        "threads": threads or default_threads(),
    }
    answer = run_in_process(_CHILD, job)
    if "error" in answer:
        return Cell(case.batch, case.context, length, None, reason=str(answer["error"]))
    seconds = answer["prefill_s"] + answer["decode_s"]
    tokens = case.batch + answer["decode_tokens"]  # the first of each came with its prompt
    return Cell(
        case.batch,
        case.context,
        length,
        round(tokens / seconds, 2),
        round(1000 * seconds, 1),
        round(1000 * answer["ttft_s"], 1),
    )
