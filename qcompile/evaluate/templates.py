"""Prompt templates: one text per task type and language, from the built-in TOML or the user's."""

import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qcompile.errors import EvaluateError
from qcompile.evaluate.asking import CASE_TYPES, LANGUAGES, fill, language_of
from qcompile.evaluate.cases import Case

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Templates:
    """The texts by (type, language) and the system message; an empty system message is not sent."""

    texts: dict[tuple[str, str], str]
    system: str = ""

    @classmethod
    def load(cls, override: str | Path | None = None) -> "Templates":
        """The built-in templates with the entries of `override` in their place.

        Raises:
            EvaluateError: The file is not TOML, names an unknown type or language, or a text lacks a blank.
        """
        built_in = files("qcompile.evaluate").joinpath("templates.toml").read_text(encoding="utf-8")
        texts, system = _entries(tomllib.loads(built_in), "templates.toml")
        if override is not None:
            own_texts, own_system = _entries(_read(Path(override)), str(override))
            texts.update(own_texts)
            system = own_system if own_system is not None else system
        return cls(texts, system or "")

    def messages(self, case: Case) -> list[dict[str, str]]:
        """The chat messages that ask this case."""
        user = {"role": "user", "content": self.prompt(case)}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]

    def prompt(self, case: Case) -> str:
        """The user message: the template with the question (and the choices, one a line) put in."""
        return fill(self.texts[case.type, language_of(case.prompt)], case.prompt, case.choices)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EvaluateError(f"{path}: cannot be read as TOML: {error}") from None
    except RecursionError:
        raise EvaluateError(
            f"{path}: cannot be read as TOML: lists or tables lie too deep inside one another"
        ) from None


def _entries(table: dict[str, Any], where: str) -> tuple[dict[tuple[str, str], str], str | None]:
    texts: dict[tuple[str, str], str] = {}
    system = table.get("system")
    if system is not None and not isinstance(system, str):
        raise EvaluateError(f"{where}: 'system' must be a string")
    for case_type, by_language in table.items():
        if case_type == "system":
            continue
        if case_type in CASE_TYPES and not isinstance(by_language, dict):
            raise EvaluateError(f'{where}: {case_type} is no table; write [{case_type}] and under it en = "..."')
        if case_type not in CASE_TYPES:
            raise EvaluateError(f"{where}: [{case_type}] is no task type; one of {', '.join(CASE_TYPES)}")
        blanks = ("{prompt}", "{choices}") if case_type == "choice" else ("{prompt}",)
        for language, text in by_language.items():
            if language not in LANGUAGES:
                raise EvaluateError(f"{where}: [{case_type}] {language!r} is no language; 'en' or 'zh'")
            for blank in blanks:
                if not isinstance(text, str) or blank not in text:
                    raise EvaluateError(f"{where}: [{case_type}] {language}: the text must hold {blank}")
            texts[case_type, language] = text.strip("\n")
    return texts, system
