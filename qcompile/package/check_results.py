"""Is what get_results returned in the judge's form, with every id, and how much of it passes the format gate?"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

from qcompile.evaluate.asking import MAX_SUBMITTED_SAMPLES
from qcompile.evaluate.formats import EXTRACTION, parse_content
from qcompile.package.check_layout import MODEL
from qcompile.package.findings import INFERENCE, NO_SUCCESS, Finding
from qcompile.package.schemas import load_schema

_FORM = '{"result": {"results": [{"id": ..., "content": ...}]}}'
_CODE = "code-generate"


def check_result(
    text: str, questions: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Judge one answer to one test file.

    Args:
        text: What get_results returned, as JSON.
        questions: The file.
        name: Of the file, for messages.

    Returns:
        The results in order, and the findings.
    """
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return [], [Finding(MODEL, f"{name}: get_results returned no JSON: {error}", f"return {_FORM}", NO_SUCCESS)]
    validator = jsonschema.Draft202012Validator(load_schema("contest_result"))
    fault = jsonschema.exceptions.best_match(validator.iter_errors(record))
    if fault is not None:
        return [], [Finding(MODEL, f"{name}: get_results returned {_wrong(fault)}", _form_cure(fault), NO_SUCCESS)]
    results: list[dict[str, Any]] = record["result"]["results"]
    findings = [*_ids(results, questions, name), *_contents(results, questions, name)]
    return results, findings


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def format_score(results: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many first texts pass the official gate and hold an answer of their type, of how many."""
    types = {question["id"]: question["type"] for question in questions}
    passed = 0
    for result in results:
        parsed = parse_content(first_text(result))
        expression = EXTRACTION.get(types.get(result["id"], ""))
        passed += parsed.is_format_ok and (expression is None or expression.search(parsed.answer) is not None)
    return passed, len(questions)


def first_text(result: Mapping[str, Any]) -> str:
    """The text that format is judged on."""
    content = result["content"]
    return str(content if isinstance(content, str) else (content or [""])[0])


def _wrong(error: jsonschema.ValidationError) -> str:
    where = error.json_path.removeprefix("$").lstrip(".") or "the wrong form"
    return f"{where}: {error.message[:200]}"


def _form_cure(error: jsonschema.ValidationError) -> str:
    if error.path and error.path[-1] == "id":
        return "give the id back as it came, as a string"
    if "content" in error.path:
        return "content is a string; for code-generate a string or a list of up to three"
    return f"return {_FORM}"


def _ids(results: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]], name: str) -> list[Finding]:
    wanted, seen = [question["id"] for question in questions], Counter(result["id"] for result in results)
    missing = [one for one in wanted if one not in seen]
    strange = [one for one in seen if one not in wanted]
    twice = [one for one, times in seen.items() if times > 1]
    findings = []
    if missing:
        message = f"{name}: {len(missing)} of {len(wanted)} ids have no result ({missing[0]!r} first)"
        findings.append(
            Finding(MODEL, message, "return an entry for every question, an empty text if need be", NO_SUCCESS)
        )
    if strange:
        message = f"{name}: the id {strange[0]!r} was not asked"
        findings.append(Finding(MODEL, message, "give every id back exactly as it came", NO_SUCCESS))
    if twice:
        message = f"{name}: the id {twice[0]!r} has several results"
        findings.append(
            Finding(MODEL, message, "one entry per question; several texts of code go into a list", INFERENCE)
        )
    return findings


def _contents(results: Sequence[Mapping[str, Any]], questions: Sequence[Mapping[str, Any]], name: str) -> list[Finding]:
    types = {question["id"]: question["type"] for question in questions}
    findings = []
    lists = [r["id"] for r in results if isinstance(r["content"], list) and types.get(r["id"]) != _CODE]
    if lists:
        message = f"{name}: content of {lists[0]!r} is a list; only code-generate takes one"
        findings.append(Finding(MODEL, message, "return one string", NO_SUCCESS))
    long = [r["id"] for r in results if isinstance(r["content"], list) and len(r["content"]) > MAX_SUBMITTED_SAMPLES]
    if long:
        message = (
            f"{name}: content of {long[0]!r} has more than {MAX_SUBMITTED_SAMPLES} texts: the judge draws three of them"
        )
        findings.append(Finding(MODEL, message, "return your best three", ""))
    empty = [result["id"] for result in results if not first_text(result).strip()]
    if empty:
        message = f"{name}: {len(empty)} of {len(results)} answers are empty ({empty[0]!r} first)"
        findings.append(
            Finding(
                MODEL, message, "see the log below for the reason", NO_SUCCESS if len(empty) == len(results) else ""
            )
        )
    return findings
