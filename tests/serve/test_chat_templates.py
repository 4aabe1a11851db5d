"""Models without a template, with one that refuses, and with one that opens the thinking."""

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.runtime.test_tokenizer import edit_config
from tests.runtime.toy_compiler import compile_tiny
from tests.serve.conftest import NAME, running

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "no chat template"), ("{{ raise_exception('not like this') }}", "not like this")],
)
def test_what_the_template_refuses_is_400(tmp_path: Path, template: str | None, words: str) -> None:
    model = compile_tiny(tmp_path)
    edit_config(model, chat_template=template)
    with running(model) as served:
        with pytest.raises(openai.BadRequestError, match=words):
            served.openai.chat.completions.create(model=NAME, messages=HELLO)
        assert served.openai.completions.create(model=NAME, prompt="Hello", max_tokens=1).usage


def test_a_template_that_opens_the_thinking(tmp_path: Path) -> None:
    model = compile_tiny(tmp_path)
    edit_config(model, chat_template="{{ messages[0].content }}<think>\n")
    with running(model, reasoning="think") as served:
        options: Any = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 6}
        message = served.openai.chat.completions.create(**options).choices[0].message
        assert message.content == ""
        assert message.model_extra["reasoning_content"]  # random weights: the thinking never ends


def test_a_template_variable_is_a_value(tmp_path: Path) -> None:
    model = compile_tiny(tmp_path)
    edit_config(
        model, chat_template="{{ messages[0].content }}{% if enable_thinking is false %} not thinking{% endif %}"
    )
    with running(model) as served:
        sizes = [
            served.openai.chat.completions.create(
                model=NAME,
                messages=HELLO,
                max_tokens=1,
                extra_body={"chat_template_kwargs": {"enable_thinking": choice}},
            ).usage.prompt_tokens
            for choice in (True, False)
        ]
        assert sizes[0] < sizes[1]
