"""Problems as `qcompile eval` asks them: the same templates, the same chat messages."""

from functools import lru_cache

from models.reasoner.problem import Problem
from qcompile.evaluate.cases import Case
from qcompile.evaluate.templates import Templates


@lru_cache(maxsize=1)
def templates() -> Templates:
    """The built-in templates."""
    return Templates.load()


def case_of(problem: Problem) -> Case:
    """The problem as an evaluation case."""
    is_code = problem.type == "code-generate"
    return Case(
        id=problem.id,
        type=problem.type,
        prompt=problem.prompt,
        choices=problem.choices,
        answers=() if is_code else (problem.answer,),
        tests=problem.tests,
    )


def user_prompt(case: Case) -> str:
    """The user message."""
    return templates().prompt(case)


def messages(case: Case) -> list[dict[str, str]]:
    """The chat."""
    return templates().messages(case)
