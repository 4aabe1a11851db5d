"""Solved problems as token ids, made by many processes, in batches of near-equal length.

The rows of the dataset are in training order: batch after batch, so a sequential sampler needs no padding to speak of.
"""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from models.reasoner.architectures import load_tokenizer
from models.reasoner.data import problems
from models.reasoner.problem import Problem
from models.reasoner.prompts import case_of, messages

IGNORED = -100
_BATCHES_PER_POOL = 64
_ASKED_PART = 2048


def chat_text(tokenizer: Any, problem: Problem) -> str:
    """The prompt as the model reads it, up to and with the assistant's header."""
    return str(tokenizer.apply_chat_template(messages(case_of(problem)), tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, prompts: Sequence[str], solutions: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """Token ids of prompt, solution and end token, and the length of each prompt."""
    ends = [solution + tokenizer.eos_token for solution in solutions]
    head = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    tail = tokenizer(ends, add_special_tokens=False)["input_ids"]
    return [a + b for a, b in zip(head, tail, strict=True)], [len(a) for a in head]


def _make_part(seed: int, *, count: int, hard_share: float, split: str, tokenizer_from: str) -> tuple[Any, Any, Any]:
    tokenizer = load_tokenizer(tokenizer_from)
    made = list(islice(problems(seed, split, hard_share=hard_share), count))
    rows, prompt_lengths = encode(tokenizer, [chat_text(tokenizer, p) for p in made], [p.solution for p in made])
    lengths = np.array([len(row) for row in rows], np.int32)
    return np.concatenate([np.array(row, np.int32) for row in rows]), lengths, np.array(prompt_lengths, np.int32)


def solved(
    count: int, *, seed: int, hard_share: float, batch_size: int, tokenizer_from: str, split: str = "train"
) -> Dataset:
    """`count` solved problems as a dataset of input_ids and labels (-100 on the prompt)."""
    workers = max(1, min(os.cpu_count() or 1, count // 2000))
    share = -(-count // workers)
    make = partial(_make_part, count=share, hard_share=hard_share, split=split, tokenizer_from=tokenizer_from)
    seeds = [seed * 1000 + worker for worker in range(workers)]
    parts = _in_processes(make, seeds)
    flat, lengths, prompts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return in_batches(flat, lengths, prompts, batch_size=batch_size, seed=seed)


def _in_processes(make: Callable[[int], Any], seeds: list[int]) -> list[Any]:
    if len(seeds) == 1:
        return [make(seeds[0])]
    # fork: a spawned worker would import torch again, which takes longer than its share of the work
    with ProcessPoolExecutor(min(len(seeds), os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        return list(pool.map(make, seeds))


def in_batches(flat: Any, lengths: Any, prompt_lengths: Any, *, batch_size: int, seed: int) -> Dataset:
    """Order the rows so that each run of `batch_size` rows has nearly one length; whole batches only."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    batches: list[Any] = []
    pool = batch_size * _BATCHES_PER_POOL
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = [rows[i : i + batch_size] for i in range(0, len(rows) - batch_size + 1, batch_size)] or [rows]
        batches.extend(cut[i] for i in rng.permutation(len(cut)))
    order = np.concatenate(batches)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([flat[starts[row] : starts[row + 1]] for row in order])
    is_prompt = np.concatenate([np.arange(lengths[row]) < prompt_lengths[row] for row in order])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64))
    columns = {
        "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        "labels": pa.LargeListArray.from_arrays(offsets, pa.array(np.where(is_prompt, IGNORED, ids))),
    }
    return Dataset(pa.table(columns))


def _ask_part(
    seed: int, *, count: int, split: str, hard_share: float, weights: Any, tokenizer_from: str
) -> dict[str, list[str]]:
    tokenizer = load_tokenizer(tokenizer_from)
    made = list(islice(problems(seed, split, hard_share=hard_share, weights=weights), count))
    return {
        "prompt": [chat_text(tokenizer, problem) for problem in made],
        "problem": [json.dumps(asdict(problem), ensure_ascii=False) for problem in made],
    }


def asked(
    count: int, *, seed: int, hard_share: float, tokenizer_from: str, split: str = "train", weights: Any = None
) -> Dataset:
    """Unsolved problems for reinforcement learning: the prompt as the model reads it, and the problem as JSON."""
    each = _ASKED_PART if split == "train" else _ASKED_PART // 16  # one problem in 600 is of a small split
    ask = partial(
        _ask_part, count=each, split=split, hard_share=hard_share, weights=weights, tokenizer_from=tokenizer_from
    )
    parts = _in_processes(ask, [seed * 1000 + part for part in range(-(-count // each))])
    columns = {name: [entry for part in parts for entry in part[name]] for name in parts[0]}
    return Dataset.from_dict({name: column[:count] for name, column in columns.items()})


def read_test(name: str) -> list[dict[str, Any]]:
    """The committed test file `test` or `test_hard`, as records."""
    path = Path(__file__).with_name(f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
