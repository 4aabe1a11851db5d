"""How often a model solves problems when it samples: pass@1 against pass@k, and what is worth practising.

A group whose completions are all right or all wrong teaches GRPO nothing. So the families are drawn by p (1 - p), p
the share of right samples of one problem, averaged over its problems: a family comes up seldom when it is always or never
solved, and when half of its problems always are and the others never.
"""

import json
from pathlib import Path
from typing import Any

from models.reasoner import corpus
from models.reasoner.data import BY_TYPE, FAMILIES
from models.reasoner.generate import ROWS, Generator
from models.reasoner.rewards import judge, problem_of
from models.reasoner.settings import Settings

_KINDS = [(family.name, is_hard) for family in FAMILIES for is_hard in (False, True)]
_FLOOR = 0.02  # what was not asked is drawn this often too
_EASY = 0.3  # a family's easy problems are practised less


def probe(settings: Settings, model: Any, tokenizer: Any, device: Any, dtype: Any) -> dict[str, Any]:
    """Ask `settings.probe` problems of the validation split `settings.group` times each.

    Returns:
        Over all problems and for each family, easy and hard: pass_1, the share of right samples, pass_k, and variance,
        that of right among the samples of one problem.
    """
    rows = corpus.asked(
        settings.probe,
        seed=settings.seed,
        hard_share=settings.hard_share,
        split="valid",
        tokenizer_from=settings.model,
    )
    asked = [problem_of(source) for source in rows["problem"]]
    prompts = tokenizer(list(rows["prompt"]), add_special_tokens=False)["input_ids"]
    generator = Generator(model, {tokenizer.eos_token_id}, device=device, dtype=dtype)
    repeated = [prompt for prompt in prompts for _ in range(settings.group)]
    answers = generator.generate(
        repeated,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        rows=ROWS,
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    sources = [source for source in rows["problem"] for _ in range(settings.group)]
    pairs = list(zip(sources, texts, strict=True))
    verdicts = judge(pairs)
    right = [
        sum(verdicts[pair] for pair in pairs[i : i + settings.group]) for i in range(0, len(pairs), settings.group)
    ]
    kinds: dict[str, list[int]] = {}
    for problem, count in zip(asked, right, strict=True):
        kinds.setdefault(f"{problem.family}/{'hard' if problem.is_hard else 'easy'}", []).append(count)
    families = {kind: _summary(counts, settings.group) for kind, counts in sorted(kinds.items())}
    return {**_summary(right, settings.group), "k": settings.group, "problems": len(asked), "families": families}


def _summary(right: list[int], group: int) -> dict[str, float]:
    share = sum(right) / (len(right) * group)
    some = sum(count > 0 for count in right) / len(right)
    within = sum(count * (group - count) for count in right) / (len(right) * group * max(1, group - 1))
    return {"pass_1": round(share, 4), "pass_k": round(some, 4), "variance": round(within, 4)}


def weights(found: dict[str, Any], demonstrate: float = 0.0) -> dict[tuple[str, bool], float]:
    """(family, is_hard) -> how often to draw it; of a choice among four, what guessing gives is taken off first.

    That is s (1 - s), s the share above guessing, times the part of the variance of all samples that lies within
    problems. Where solutions are shown (`Settings.demonstrate`) what is not solved teaches too: plus demonstrate (1 - s).
    A choice is drawn s times as often again: where letters are guessed, what gets the reward is luck, and practice made
    such families worse.
    """
    guessed = {family.name for family in BY_TYPE["choice"]}
    result = dict.fromkeys(_KINDS, _FLOOR)
    for kind, entry in found["families"].items():
        family, level = kind.split("/")
        chance = 0.25 if family in guessed else 0.0
        right = entry["pass_1"]
        share = max(0.0, (right - chance) / (1 - chance))
        within = entry["variance"] / (right * (1 - right)) if 0 < right < 1 else 0.0
        worth = (share * within + demonstrate) * (1 - share) * (share if chance else 1.0)
        result[family, level == "hard"] = worth * (1.0 if level == "hard" else _EASY) + _FLOOR
    return result


def write(found: dict[str, Any], path: Path) -> None:
    """Keep the measurement beside the run."""
    path.write_text(json.dumps(found, indent=1) + "\n")
