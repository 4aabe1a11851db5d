"""Score a model on both test sets with the torch generator: the numbers between training stages.

    python -m models.reasoner.score runs/sft/model runs/grpo/model --out scores.json

`qcompile eval` measures the exported model; this measures the checkpoint, in fp32, greedily.
"""

import argparse
import json
import math
from typing import Any

import torch

from models.reasoner import corpus
from models.reasoner.architectures import load_model, load_tokenizer
from models.reasoner.arguments import count, model_directory, output_file
from models.reasoner.generate import Generator
from models.reasoner.prompts import messages
from models.reasoner.settings import Settings
from models.reasoner.validation import Validation
from qcompile.evaluate.asking import CASE_TYPES
from qcompile.evaluate.cases import case_from_record
from qcompile.evaluate.checkers import check_answer
from qcompile.evaluate.formats import parse_content


def interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959963984540054, successes / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)


def score(model: Any, tokenizer: Any, name: str, *, device: Any, max_new_tokens: int = 320) -> dict[str, Any]:
    """Greedy answers to a committed test set, judged."""
    cases = [case_from_record(record) for record in corpus.read_test(name)]
    texts = [tokenizer.apply_chat_template(messages(c), tokenize=False, add_generation_prompt=True) for c in cases]
    generator = Generator(model, {tokenizer.eos_token_id}, device=device, dtype=torch.float32)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = generator.generate(prompts, max_new_tokens=max_new_tokens)
    contents = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = [check_answer(case, text).is_correct is True for case, text in zip(cases, contents, strict=True)]
    formats = sum(parse_content(text).is_format_ok for text in contents)
    cut = sum(answer[-1] != tokenizer.eos_token_id for answer in answers)
    by_type = {kind: sum(ok for ok, case in zip(right, cases, strict=True) if case.type == kind) for kind in CASE_TYPES}
    return {
        "set": name,
        "cases": len(cases),
        "format": formats,
        "correct": sum(right),
        "interval": [round(x, 4) for x in interval(sum(right), len(cases))],
        "by_type": by_type,
        "cut_off": cut,
        "mean_tokens": round(sum(map(len, answers)) / len(answers), 1),
        "wrong": [case.id for ok, case in zip(right, cases, strict=True) if not ok],
    }


def show(name: str, entry: dict[str, Any]) -> str:
    """One line of a score."""
    low, high = entry["interval"]
    return (
        f"{name} {entry['set']}: correct {entry['correct']}/{entry['cases']} [{low:.3f}, {high:.3f}], "
        f"format {entry['format']}, cut off {entry['cut_off']}, {entry['by_type']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(description="Score checkpoints on the two test sets.")
    parser.add_argument("models", nargs="+", type=model_directory)
    parser.add_argument("--validate", type=count, default=0, help="also so many hard problems of the validation split")
    parser.add_argument("--out", type=output_file)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {}
    for directory in options.models:
        tokenizer = load_tokenizer(directory)
        model = load_model(directory)
        results[str(directory)] = [score(model, tokenizer, name, device=device) for name in ("test", "test_hard")]
        for entry in results[str(directory)]:
            print(show(str(directory), entry), flush=True)
        if options.validate:
            settings = Settings(validate=options.validate, model=str(directory))
            found = Validation(settings, tokenizer, device, torch.float32).measure(model)
            print(f"{directory} validation: {found['accuracy']:.4f} of {options.validate}", flush=True)
            results[str(directory)].append({"set": "validation", "cases": options.validate, **found})
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
