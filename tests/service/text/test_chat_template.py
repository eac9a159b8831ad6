"""Chat templates, which are programs of strangers: what they may raise, and that they come to an end."""

import json
import time
from pathlib import Path

import pytest

from service.errors import InvalidRequest
from service.text import sandbox
from service.text.chat_template import ChatTemplate, read_template

USER = [{"role": "user", "content": "hello"}]
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"


def refusal(source: str, messages: list[dict[str, str]] | None = None) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages or USER)
    assert caught.value.param == "messages"
    return caught.value.message


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (CHATML, True),
        (
            CHATML.replace("{% for", "{% if messages[1:] %}{{ raise_exception('system first') }}{% endif %}{% for"),
            False,
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", False),
        ("{{ nothing.at.all }}", False),
    ],
)
def test_whether_a_later_system_message_is_shown(source: str, takes: bool) -> None:
    assert ChatTemplate(source, {}).takes_later_system is takes


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].content }}{% break %}", ["is not valid: SyntaxError", "outside loop", "send `prompt`"]),
        ("{% for %}", ["is not valid: TemplateSyntaxError"]),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", ["is not valid: RecursionError"]),
        ("{{ x | no_such_filter }}", ["is not valid: TemplateAssertionError", "no_such_filter"]),
        ("{{ messages[0]['content'] + 1 }}", ["fails on these messages: TypeError", "send `prompt`"]),
        ("{{ messages[7].content.text }}", ["UndefinedError"]),
        ("{{ 1 // 0 }}", ["ZeroDivisionError"]),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.x() }}", ["SecurityError"]),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", ["RecursionError"]),
        ("{% include 'other' %}", ["TypeError: no loader"]),
        ("{{ strftime_now(7) }}", ["TypeError"]),
        ("{{ messages | tojson(indent={}) }}", ["TypeError"]),
        ("{{ raise_exception('roles must alternate') }}", ["refuses these messages: roles must alternate"]),
        ("{{ lipsum() }}", ["UndefinedError"]),
    ],
)
def test_a_template_that_cannot_be_rendered_is_told_in_its_own_words(source: str, words: list[str]) -> None:
    message = refusal(source)
    assert [word for word in words if word not in message] == []


NEVER = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(9) %}{{ m(n + 1) if n < 99 }}{% endfor %}{% endmacro %}{{ m(0) }}",
    "{% for a in range(99999) if range(99999) | list %}{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{% set n = 10 ** 12 %}{{ [1] * n }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(x=7) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set s = namespace(x='ab') %}{% for i in range(99) %}{% set s.x %}{{ s.x }}{{ s.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x={}) %}{% for i in range(99) %}{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.zfill(width=1000000000) }}",
    "{{ ('\\t' * 1000).expandtabs(1000000) }}",
    "{{ ([1] * 1000) | tojson(indent=1000000) }}",
    "{{ ('x ' * 1000) | indent(1000000) }}",
    "{{ range(99999) | join('x' * 100000) }}",
    "{{ ('x' * 100000).join('x' * 100000) }}",
]


@pytest.mark.parametrize("source", NEVER)
def test_a_template_without_end_is_cut_off_at_start_and_then_refuses_at_once(source: str) -> None:
    began_s = time.monotonic()
    template = ChatTemplate(source, {})
    took_s = time.monotonic() - began_s
    assert took_s < 10 * sandbox.MAX_S
    assert template.fault is not None
    assert "does not come to an end: it was cut off" in template.fault
    with pytest.raises(InvalidRequest, match="does not come to an end"):
        template.render(USER)


def test_messages_that_make_a_template_endless_are_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    template = ChatTemplate("{% for a in messages %}{% for b in messages %}{{ a.role }}{% endfor %}{% endfor %}", {})
    assert template.fault is None
    with pytest.raises(InvalidRequest, match="cut off after 1000 steps; send fewer messages"):
        template.render(USER * 100)
    assert template.render(USER * 3) == "user" * 9


def test_a_long_conversation_is_far_from_the_limits() -> None:
    template = ChatTemplate(CHATML, {})
    messages = USER * 8000 + [{"role": "user", "content": "word " * 200_000}]
    assert len(template.render(messages)) == 8000 * len("<|user|>hello\n") + len("<|user|>") + 1_000_000


def test_what_templates_do_is_as_before() -> None:
    source = (
        "{% macro tag(x, y='|') %}{{ '<' ~ y ~ x ~ y ~ '>' }}{% endmacro %}"
        "{% set ns = namespace(found=false, n=1 + 2 * 3) %}{% set parts = ['a', 'b'] + ['c'] %}"
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ tag(m.role) }}"
        "{% if m.role in ('user', 'system') %}{{ m.content | trim | upper }}{% set ns.found = true %}{% endif %}"
        "{% if m.content == 'stop' %}{% break %}{% endif %}{% endfor %}"
        "{{ {'a': parts, 'n': ns.n} | tojson }}{{ parts[::-1] | join(', ') }}{{ '%s-%02d' % ('x', 7) }}"
        "{{ 'é'.join(parts) }}{{ '{}!'.format(ns.found) }}{{ (1, 2) | length }}{{ 'ab' * 2 }}{{ none }}"
        "{% generation %}{{ messages | map(attribute='role') | list | tojson(indent=2) }}{% endgeneration %}"
    )
    expected = '<s><|user|>HELLO{"a": ["a", "b", "c"], "n": 7}c, b, ax-07aébécTrue!2ababNone[\n  "user"\n]'
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(USER) == expected


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.json"])
def test_named_templates_without_a_default(tmp_path: Path, where: str) -> None:
    named = [{"name": "chat", "template": "X"}, {"name": "tool_use", "template": "Y"}]
    (tmp_path / where).write_text(json.dumps({"chat_template": named}))
    template = read_template(tmp_path)
    assert template is not None
    with pytest.raises(InvalidRequest, match="has no default: it has 'chat', 'tool_use' alone; send `prompt`"):
        template.render(USER)
    (tmp_path / where).write_text(json.dumps({"chat_template": [*named, {"name": "default", "template": "Z"}]}))
    template = read_template(tmp_path)
    assert template is not None
    assert template.render(USER) == "Z"


def test_a_broken_template_is_told_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% break %}")
    read_template(tmp_path)
    assert "the chat template is not valid: SyntaxError" in caplog.text
