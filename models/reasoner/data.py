"""Make problems of the four task types in English and Chinese, with step-by-step solutions, by program.

    python -m models.reasoner.data test --out models/reasoner     # writes test.jsonl and test_hard.jsonl
    python -m models.reasoner.data sample --count 8 --hard 0.5    # shows a few

Everything follows from a seed. See `problem.py` for how the splits are kept apart.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from models.reasoner import families_choice, families_code, families_logic, families_math, families_short, families_word
from models.reasoner.arguments import positive, share
from models.reasoner.problem import TYPES, Family, Problem, finish, normalised_prompt, parameter_key, split_of

FAMILIES: tuple[Family, ...] = (
    *families_math.FAMILIES,
    *families_word.FAMILIES,
    *families_choice.FAMILIES,
    *families_logic.FAMILIES,
    *families_short.FAMILIES,
    *families_code.FAMILIES,
)
BY_TYPE = {case_type: tuple(f for f in FAMILIES if f.type == case_type) for case_type in TYPES}
TEST_SEED = 20261123


def make(rng: random.Random, family: Family, *, is_hard: bool, is_chinese: bool) -> tuple[Problem, str]:
    """One problem and the split it belongs to; empty when its two hashes disagree."""
    parameters = family.draw(rng, is_hard)
    split = split_of(parameter_key(family.name, parameters))
    draft = family.render(parameters, is_chinese, rng)
    problem = finish(family, draft, is_chinese=is_chinese, is_hard=is_hard)
    agrees = split_of("prompt " + normalised_prompt(problem.prompt, problem.choices)) == split
    return problem, split if agrees else ""


def _split_ahead(rng: random.Random, family: Family, is_hard: bool) -> str:
    """The split of the parameters that `make` would draw next; few are of a small split, and rendering takes longest."""
    ahead = random.Random()
    ahead.setstate(rng.getstate())
    return split_of(parameter_key(family.name, family.draw(ahead, is_hard)))


def problems(
    seed: int,
    split: str,
    *,
    hard_share: float = 0.0,
    types: tuple[str, ...] = TYPES,
    weights: Mapping[tuple[str, bool], float] | None = None,
) -> Iterator[Problem]:
    """An endless stream of one split's problems.

    Types and languages come in equal parts, or, with `weights`, (family, is_hard) as often as they say.
    """
    rng = random.Random(f"{split} {seed}")
    by_name = {family.name: family for family in FAMILIES}
    kinds = list(weights or ())
    for case_type in cycle(types):
        while True:
            if weights:
                name, is_hard = rng.choices(kinds, [weights[kind] for kind in kinds])[0]
                family = by_name[name]
            else:
                family, is_hard = rng.choice(BY_TYPE[case_type]), rng.random() < hard_share
            is_chinese = rng.random() < 0.5
            if split != "train" and _split_ahead(rng, family, is_hard) != split:
                rng.random()  # on to other parameters
                continue
            problem, found = make(rng, family, is_hard=is_hard, is_chinese=is_chinese)
            if found == split:
                yield problem
                break


def test_set(*, is_hard: bool, per_type: int = 50, split: str = "test", seed: int = TEST_SEED) -> list[Problem]:
    """`per_type` problems of each type: families and languages in turn, no prompt twice."""
    rng = random.Random(f"{split} {seed} {is_hard}")
    chosen: list[Problem] = []
    seen: set[str] = set()
    for case_type in TYPES:
        count = 0
        while count < per_type:
            family = BY_TYPE[case_type][count // 2 % len(BY_TYPE[case_type])]
            problem, found = make(rng, family, is_hard=is_hard, is_chinese=count % 2 == 1)
            key = normalised_prompt(problem.prompt, problem.choices)
            if found != split or key in seen:
                continue
            seen.add(key)
            prefix = "hard" if is_hard else "test"
            chosen.append(replace(problem, id=f"{prefix}-{case_type.split('-')[0]}-{count:03d}"))
            count += 1
    return chosen


def write_cases(path: Path, cases: list[Problem]) -> None:
    """Write a case file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(c.record(), ensure_ascii=False) + "\n" for c in cases), encoding="utf-8")
    temporary.replace(path)


def _show(chosen: Iterable[Problem]) -> None:
    for problem in chosen:
        sys.stdout.write(f"--- {problem.type} / {problem.family}\n{problem.prompt}\n{problem.choices or ''}\n")
        sys.stdout.write(f"{problem.solution}\n{problem.tests or problem.answer}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Make reasoning problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    test = commands.add_parser("test", help="write test.jsonl and test_hard.jsonl")
    test.add_argument("--out", type=Path, default=Path(__file__).parent)
    sample = commands.add_parser("sample", help="show some problems with their solutions")
    sample.add_argument("--count", type=positive, default=8)
    sample.add_argument("--hard", type=share, default=0.0)
    sample.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.command == "test":
        if not options.out.is_dir():
            parser.error(f"--out {options.out}: is no directory; make it first")
        write_cases(options.out / "test.jsonl", test_set(is_hard=False))
        write_cases(options.out / "test_hard.jsonl", test_set(is_hard=True))
        return
    try:
        _show(islice(problems(options.seed, "train", hard_share=options.hard), options.count))
    except BrokenPipeError:  # the reader, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again


if __name__ == "__main__":
    main()
