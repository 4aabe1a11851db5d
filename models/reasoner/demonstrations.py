"""Made solutions among a model's own completions, for problems that it hardly ever solves by itself.

Of groups that are all wrong GRPO learns nothing, and what a model never does it cannot be rewarded for. There the made
solution takes the place of one wrong completion: it is the right one that the others are compared with ("Learning to
Reason under Off-Policy Guidance", Yan et al., 2025, arXiv 2504.14945, equation 4, with the ratio of probabilities at 1).
"""

from typing import Any

from models.reasoner.rewards import judge, problem_of


def demonstrate(
    problems: list[str], completions: list[list[int]], tokenizer: Any, *, group: int, share: float, longest: int
) -> int:
    """Put the made solution in place of the last wrong completion of each group of which at most `share` is right.

    Args:
        problems: For each completion its problem as JSON (`corpus.asked`); groups stand together.
        completions: Token ids, changed in place.
        tokenizer: Of the model.
        group: Completions of one problem.
        share: The most that may be right; 0.25 takes in what is guessed among four.
        longest: Tokens; a solution that has more is not shown.

    Returns:
        How many groups were shown a solution.
    """
    different = list(dict.fromkeys(map(tuple, completions)))
    decoded = tokenizer.batch_decode([list(ids) for ids in different], skip_special_tokens=True)
    texts = dict(zip(different, decoded, strict=True))
    pairs = [(problem, texts[tuple(ids)]) for problem, ids in zip(problems, completions, strict=True)]
    verdicts = judge(pairs)
    shown = 0
    for start in range(0, len(pairs), group):
        wrong = [i for i in range(start, start + group) if not verdicts[pairs[i]]]
        if len(wrong) == 0 or group - len(wrong) > share * group:
            continue
        solution = problem_of(problems[start]).solution + tokenizer.eos_token
        ids = tokenizer(solution, add_special_tokens=False)["input_ids"]
        if len(ids) <= longest:
            completions[wrong[-1]] = ids
            shown += 1
    return shown
