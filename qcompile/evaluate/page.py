"""The cases as a page: one self-contained file, no network, everything escaped, readable on a phone.

It shares the style sheet of `qcompile inspect`; what belongs to the cases is in `cases.css` and `cases.js`. With
scripts switched off every case is there to read; the script adds the filters, the language and the theme.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qcompile.evaluate.formats import parse_content
from qcompile.evaluate.submission import write_text
from qcompile.evaluate.table import interval, percent
from qcompile.report.numbers import printable
from qcompile.report.words import both

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_TYPE_WORDS = {
    "choice": ("choice", "选择"),
    "math": ("math", "数学"),
    "generic-generate": ("short answer", "简答"),
    "code-generate": ("code", "代码"),
}
_VERDICT_WORDS = {
    "right": ("right", "正确"),
    "wrong": ("wrong", "错误"),
    "unknown": ("no known answer", "无参考答案"),
    "error": ("not answered", "未作答"),
}
_KEPT = "\n\t"


def write_page(record: dict[str, Any], path: Path) -> None:
    """Write the page of a scoreboard.

    Raises:
        EvaluateError: It cannot be written; an older one is left as it was.
    """
    write_text(path, page_html(record))


def page_html(record: dict[str, Any]) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, interval=interval, visible=visible)
    environment.globals.update(say=_say)
    files = resources.files("qcompile")
    template = environment.from_string((files / "evaluate" / "page.html.jinja").read_text(encoding="utf-8"))
    used = {case["verdict"] for case in record["cases"]}
    return template.render(
        record=record,
        name=visible(Path(record["model"]["path"]).name),
        data=visible(Path(record["data"]["path"]).name),
        cases=[_case(case) for case in record["cases"]],
        verdicts=[name for name in _VERDICT_WORDS if name in used],
        passes=sorted({k for score in record["by_type"].values() for k in score.get("pass_at", {})}, key=int),
        words=_TYPE_WORDS | _VERDICT_WORDS,
        policy=_POLICY,
        style=_inline(files / "report" / "page.css") + _inline(files / "evaluate" / "cases.css"),
        script=_inline(files / "evaluate" / "cases.js"),
    )


def visible(text: object) -> str:
    """Text of a model or file with control and formatting characters spelled out, line ends and tabs kept."""
    return "".join(char if char in _KEPT else printable(char) for char in str(text).replace("\r\n", "\n"))


def _say(english: str, chinese: str) -> Markup:
    return Markup(both(english, chinese))


def _inline(file: Any) -> Markup:
    return Markup(file.read_text(encoding="utf-8"))


def _case(case: dict[str, Any]) -> dict[str, Any]:
    texts = []
    for text in case["texts"]:
        parsed = parse_content(text["text"])
        verdict = {True: "right", False: "wrong", None: "unknown"}[text["is_correct"]]
        texts.append({**text, "thinking": parsed.thinking, "answer": parsed.answer, "verdict": verdict})
    return {**case, "texts": texts}
