"""Chat templates: what they must not do, and how answers are marked. What they may do is compared
with transformers in test_tokenizers."""

import contextlib
import time

import pytest

from btx_jax.data import chat_template
from btx_jax.data.chat_template import ChatTemplate, TemplateError
from btx_jax.errors import UserError

ENDS = ("memory", "recurse")  # these kill the process
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
    ],
)
def test_a_template_that_reaches_for_what_is_behind_its_values_gets_nothing(source):
    text = ""  # jinja's sandbox raises, or returns an undefined value
    with contextlib.suppress(TemplateError):
        text = ChatTemplate(source, {}).render(HELLO).text
    assert text == ""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        (
            "{% set ns = namespace(s='a') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}"
            "{% endfor %}",
            "memory",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurse"),
        ("{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}", "characters"),
        ("{{ (messages | first).content.no.such }}", "UndefinedError"),
        ("{% include '/etc/passwd' %}", "TypeError|no loader"),
    ],
)
def test_a_template_that_cannot_render_says_why_in_one_line(source, why):
    with pytest.raises(UserError, match=why) as raised:
        ChatTemplate(source, {}).render(HELLO)
    assert isinstance(raised.value, TemplateError) == (why not in ENDS), (
        "one chat's fault, or all's"
    )
    assert "\n" not in str(raised.value)
    assert ChatTemplate("{{ messages[0].content }}", {}).render(HELLO).text == "hello", "goes on"


def test_a_template_that_loops_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(UserError, match="ran longer than 1 seconds"):
        ChatTemplate(endless, {}).render(HELLO)
    assert time.monotonic() - start < 30
    assert ChatTemplate("{{ messages[0].content }}", {}).render(HELLO).text == "hello"


def test_a_chat_longer_than_a_pipe():
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(ChatTemplate("{{ messages[0].content }}", {}).render(long).text) == 3_000_000


def test_null_and_reasoning_as_transformers_gives_them_to_a_template():
    template = ChatTemplate(
        "{{ messages[0].content is defined }} {{ messages[0].reasoning_content }}"
        " {{ messages[0].thinking }} {{ tools }} {{ bos_token }}",
        {"bos_token": "<s>"},
    )
    message = {"role": "assistant", "content": None, "reasoning": "because"}
    assert template.render([message]).text == "False because because None <s>"


def test_generation_tags_give_the_spans_of_what_is_said():
    source = (
        "{% for m in messages %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
        "{%- endgeneration %}{% else %}{{ m.content }}{% endif %}]{% endfor %}"
    )
    template = ChatTemplate(source, {})
    messages = [*HELLO, {"role": "assistant", "content": "four"}] * 2
    text, spans = template.render(messages)
    assert text == "[hello][four!][hello][four!]"
    assert [text[start:stop] for start, stop in spans] == ["four!", "four!"]
    assert template.marks_answers and not ChatTemplate("{{ 'generation' }}", {}).marks_answers


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages | foo }}", "{% generation %}x"])
def test_a_source_that_is_no_template_is_refused_before_any_chat(source):
    with pytest.raises(UserError, match=r"chat template: Template\w+Error"):
        ChatTemplate(source, {})
