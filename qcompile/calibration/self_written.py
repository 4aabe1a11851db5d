"""Texts that the model itself writes: what it is later asked to repeat after quantization.

A reasoning model is judged on its own long traces, and calibration on them keeps more of its answers than calibration on
web text does (Liu et al. 2025, "Quantization Hurts Reasoning?", section 4). The traces are sampled as the model's
generation_config.json advises, with fixed seeds, and kept in the cache: writing them takes longer than calibrating.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.calibration.runner import Say
from qcompile.calibration.text import CalibrationText, built_in_texts
from qcompile.errors import QuantError
from qcompile.fetch import cache_directory
from qcompile.runtime.engine import Engine
from qcompile.runtime.manifest import Manifest

SELF = "self"
_FORMAT = "self-written 1"


@dataclass(frozen=True)
class WritingSettings:
    """How much the model writes.

    Attributes:
        num_tokens: Stop once there are so many, prompts included.
        max_new_tokens: Longest answer.
        batch_size: Answers written together.
        seed: Of the sampling.
    """

    num_tokens: int = 16384
    max_new_tokens: int = 512
    batch_size: int = 8
    seed: int = 0


def self_written_texts(
    directory: Path,
    prompts: Sequence[CalibrationText] | None = None,
    settings: WritingSettings | None = None,
    *,
    cache: Path | None = None,
    say: Say | None = None,
) -> list[CalibrationText]:
    """Let a model answer prompts and return prompts with answers, as token numbers.

    Args:
        directory: A compiled-model directory that this machine can run.
        prompts: Conversations, whose last answer is left out, and texts, whose first half is gone on with; by default
            the built-in ones. Asked again and again, with other seeds, until there are enough tokens.
        settings: How much.
        cache: Directory of calibrations; by default under qcompile's cache directory.
        say: Called with (what, done, total).

    Raises:
        QCompileError: The model cannot be run, or it writes nothing.
    """
    wanted = settings or WritingSettings()
    asked = list(built_in_texts() if prompts is None else prompts)
    manifest = Manifest.load(directory)
    place = (
        cache_directory() / "calibration" if cache is None else cache
    ) / f"self-{_key(manifest, asked, wanted)}.json"
    kept = _read(place)
    if kept is None:
        kept = _write(directory, asked, wanted, say or (lambda what, done, total: None))
        _keep(place, kept)
    return [CalibrationText(f"{SELF} {number}", ids=tuple(ids)) for number, ids in enumerate(kept, 1)]


def _write(directory: Path, prompts: Sequence[CalibrationText], settings: WritingSettings, say: Say) -> list[list[int]]:
    with Engine(directory, max_batch_size=settings.batch_size) as engine:
        questions = [_question(engine, prompt, settings.max_new_tokens) for prompt in prompts]
        texts: list[list[int]] = []
        total = 0
        while total < settings.num_tokens:
            first = len(texts)
            batch = [questions[(first + i) % len(questions)] for i in range(settings.batch_size)]
            params = [
                engine.sampling_params(max_new_tokens=settings.max_new_tokens, seed=settings.seed + first + i)
                for i in range(len(batch))
            ]
            completions = engine.generate(batch, params)
            if not any(completion.token_ids for completion in completions):
                raise QuantError(f"{directory}: the model wrote nothing to calibrate on; give a calibration file")
            texts += [[*ids, *c.token_ids] for ids, c in zip(batch, completions, strict=True)]
            total = sum(map(len, texts))
            say("writing", min(total, settings.num_tokens), settings.num_tokens)
        return texts


def _question(engine: Engine, prompt: CalibrationText, max_new_tokens: int) -> list[int]:
    """Return the tokens that an answer is asked for."""
    if prompt.messages is not None:
        messages = list(prompt.messages)
        while len(messages) > 1 and messages[-1].get("role") == "assistant":
            messages.pop()
        ids = engine.encode_chat(messages)
    elif prompt.ids is not None:
        ids = list(prompt.ids)
    else:
        ids = engine.tokenizer.encode(prompt.text or "")
        ids = ids[: max(1, len(ids) // 2)]
    room = engine.max_model_len - max_new_tokens
    return ids[: room if room > 0 else max(1, engine.max_model_len // 2)]


def _key(manifest: Manifest, prompts: Sequence[CalibrationText], settings: WritingSettings) -> str:
    entry = manifest.graph()
    files = [entry.file.sha256, *(file.sha256 for file in entry.data)]
    asked = [(p.text, p.messages, p.ids) for p in prompts]
    return hashlib.blake2b(repr((_FORMAT, files, asked, settings)).encode(), digest_size=16).hexdigest()


def _read(path: Path) -> list[list[int]] | None:
    """Return kept texts, or None when there are none or the file is not what was written."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_whole = isinstance(record, list) and all(
        isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in record
    )
    return record if is_whole and record else None


def _keep(path: Path, texts: list[list[int]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(texts, stream)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise QuantError(f"{path}: the written texts cannot be kept: {error.strerror or error}") from error
