"""Chat templates: as transformers renders them, and harmless whatever they hold."""

import time
from typing import Any

import pytest

from qcompile.runtime.chat_template import ChatTemplate
from qcompile.runtime.errors import RequestError, TokenizerError
from tests.tiny_checkpoints import CHAT_TEMPLATE

USER = [{"role": "user", "content": "Hi <b>&'\" 你好"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"é": ["<", 1, None]}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    USER,
    [{"role": "system", "content": "Be brief."}, *USER],
    [*USER, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}],
    [
        *USER,
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": "ü"}}]},
        {"role": "tool", "content": "7"},
    ],
]
FEATURES = [
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}",
    "  {% if true %}\n  x\n  {% endif %}\n  y",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "{{ bos_token }}{{ eos_token }}{{ nothing }}|{{ tools is none }}",
    "{% set ns = namespace(n=0) %}{% for c in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ 'a' ~ 1 ~ none ~ messages[0].role }}",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f('b') }}",
    "{{ messages[0]['content'].split(' ')[0].strip() + 'x' * 3 }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{{ messages | map(attribute='role') | join(', ') }} {{ 'a-b' | replace('-', '+') }}",
    "{{ '%s is %d' % ('a', 3) }} {{ '{:>5}'.format('a') }} {{ 'ab' | indent(2) }} {{ 7 // 2 }} {{ 2 ** 10 }}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}",
    "{{ messages[::-1][0].role }}{{ messages | length }}",
]


@pytest.mark.torch
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, *FEATURES])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_as_transformers(template: str, conversation: list[dict[str, Any]]) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    for tools in (None, [TOOL]):
        for generation in (False, True):
            expected, _ = chat_template_utils.render_jinja_template(
                conversations=[conversation],
                tools=tools,
                chat_template=template,
                add_generation_prompt=generation,
                **specials,
            )
            got = ChatTemplate(template, specials).render(conversation, generation, tools=tools)
            assert got == expected[0]


def test_the_qwen_template() -> None:
    text = ChatTemplate(CHAT_TEMPLATE).render([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are Qwen")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_more_variables() -> None:
    template = ChatTemplate("{% if enable_thinking is defined and not enable_thinking %}off{% endif %}")
    assert template.render(USER, enable_thinking=False) == "off"
    assert template.render(USER) == ""


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


def test_a_template_that_raises() -> None:
    template = ChatTemplate("{{ raise_exception('roles must\nalternate') }}", origin="dir/chat_template.jinja")
    with pytest.raises(TokenizerError) as caught:
        template.render(USER)
    assert str(caught.value) == "dir/chat_template.jinja: the template raised: roles must alternate"


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% unknown %}", "{{ 1 | nofilter }}", "{% if %}"])
def test_a_text_that_is_no_template(source: str) -> None:
    with pytest.raises(TokenizerError, match="not a valid jinja2 template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    ["{{ messages[99].role }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ 'a'.nothing() }}", "{{ x.y.z }}"],
)
def test_a_template_that_fails(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"the template (raised|failed)"):
        ChatTemplate(source).render(USER)


ATTACKS = {
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10**12) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "binary recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1,2] recursive %}{{ loop([1,2]) }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "repetition": "{{ 'a' * 10**11 }}",
    "repetition reversed": "{{ 10**11 * 'a' }}",
    "list repetition": "{{ [0] * 10**11 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "squares": "{% set n = namespace(x=10**50) %}{% for i in [1]*99 %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by ~": (
        "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    ),
    "doubling by +": (
        "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "doubling lists": (
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "doubling by join": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}{% set n.s = [n.s, n.s]|join %}{% endfor %}"
    ),
    "doubling by replace": (
        "{% set n = namespace(s='aa') %}{% for i in 'abcdefghi' %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}"
    ),
    "doubling by the filter": (
        "{% set n = namespace(s='aa') %}{% for i in 'abcdefghi' %}{% set n.s = n.s|replace('a', n.s) %}{% endfor %}"
    ),
    "str.join": "{% set s = 'a' * 9999 %}{{ s.join(s) }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "starred width": "{{ '%*d' % (10**11, 1) }}",
    "format width": "{{ '{:>99999999999}'.format('a') }}",
    "format filter": "{{ '%99999999999d' | format(1) }}",
    "center": "{{ 'a' | center(10**11) }}",
    "ljust": "{{ 'a'.ljust(10**11) }}",
    "zfill": "{{ 'a'.zfill(10**11) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**11) }}",
    "indent": "{{ ('a\n' * 9999) | indent(999999) }}",
    "tojson indent": "{{ [1] | tojson(indent=10**11) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "batch": "{{ [1] | batch(10**9, 1) | list }}",
    "wordwrap": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 99999) }}",
    "map of range": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in [1]*60 %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested tuples": "{% set n = namespace(x=1) %}{% for i in [1]*60 %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "nested dicts": "{% set n = namespace(x=1) %}{% for i in [1]*60 %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
    "comparison": (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in [1]*60 %}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
    ),
    "shared lists": "{% set x = [0] * 9999 %}{% set y = [x] * 9999 %}{{ [y] * 9999 | tojson }}",
    "large strings in a list": "{% set x = ['a' * 999999] * 9999 %}{{ x | string | length }}",
    "nested width": "{{ '{:{a}{b}}'.format('x', a=99999, b=99999) }}",
    "many formats": "{{ ('%s' * 9999) % (('a' * 9999,) * 9999) }}",
    "repeated field": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "literal text in a block": (
        "{% set s %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}{{ s | length }}"
    ),
    "literal text in a macro": (
        "{% macro f() %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endmacro %}{{ f() | length }}"
    ),
    "slow loop": (
        "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{% if (s ~ 'b') in s %}{% endif %}{% endfor %}"
    ),
    "block set": "{% set s %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("source", list(ATTACKS.values()), ids=list(ATTACKS))
def test_no_template_hangs_or_fills_memory(source: str) -> None:
    """Each either fails or gives something small, in a bounded time."""
    started = time.perf_counter()
    try:
        text = ChatTemplate(source).render(USER)
    except TokenizerError:
        text = ""
    assert len(text) < 5_000_000
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    "name",
    ["attributes", "nested loops", "binary recursion", "output", "repetition", "power", "width", "replace"],
)
def test_the_dangerous_ones_are_refused(name: str) -> None:
    source = ATTACKS.get(name) or ATTACKS["doubling by replace"]
    with pytest.raises(TokenizerError):
        ChatTemplate(source).render(USER)


def test_after_a_refusal_the_next_rendering_has_a_full_budget() -> None:
    template = ChatTemplate(
        "{% for i in range(messages[0].content|int) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    )
    for _ in range(2):
        with pytest.raises(TokenizerError, match="loop rounds and calls"):
            template.render([{"role": "user", "content": "50"}])
        assert len(template.render([{"role": "user", "content": "1"}])) == 99999


def test_long_messages_are_no_attack() -> None:
    text = "word " * 2_000_000
    assert (
        ChatTemplate("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}").render(
            [{"role": "user", "content": text}]
        )
        == f"<{text}>"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('system ' * 200 + '%s|%s') % (messages[0].content, 1) }}",
        "{{ ('{} ' + 'x' * 5000).format(messages[0].content) }}",
        "{{ messages[0].content | indent(4) | wordwrap(79) | replace('word', 'w') }}",
        "{{ messages | tojson(indent=2) }}{{ '%d' % 1700000000 }}{{ 5000000 | default(9000000) }}",
        "{{ messages[0].content.split(' ') | join('__') }}",
    ],
)
def test_ordinary_work_on_long_messages_is_no_attack(source: str) -> None:
    messages = [{"role": "user", "content": "word " * 200_000}]
    assert len(ChatTemplate(source).render(messages)) > 100_000


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"content": "x"}], "message 0: a dict with a 'role'"),
        ([{"role": "user", "content": 5}], "message 0 .role 'user'.: 'content' is of type int, a string is wanted"),
        ([{"role": "user", "content": {"a": "b"}}], "message 0 .role 'user'.: 'content' is of type dict"),
        ([*USER, "x"], "message 1: a dict"),
        ([{"role": "user"}], "message 0 .role 'user'.: no 'content'"),
        ([{"role": 3, "content": "x"}], "message 0"),
    ],
)
def test_what_is_no_conversation(messages: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        ChatTemplate("x").render(messages)
