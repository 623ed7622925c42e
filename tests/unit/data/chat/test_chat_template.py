"""Chat templates: text equal to transformers', within bounds; every failure has one message."""

import datetime

import pytest

from trainer.data.chat import chat_template, growth, sandbox
from trainer.data.chat.chat_template import ChatRefused, ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "user", "content": "hi", "name": None}, {"role": "assistant", "reasoning": "hm", "content": "a<b"}]


def rendered(text: str) -> str:
    return ChatTemplate(text, name="t.jinja").render(MESSAGES).text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.name is defined }}{{ m.thinking }}{% break %}{% endfor %}", "False"),
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueFalse"),
        ("{{ [3, '\u00e9<'] | tojson(indent=1) }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", None),
        ("{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + ns.self %}{{ ns.a }}{{ dict(x=1) }}", "3{'x': 1}"),
        ("{% macro f(x) %}{{ x ~ x }}{% endmacro %}{{ f('ab') | center(9) }}{{ 'a' * 3 + '%03d' % 7 }}", None),
        ("{{ undefined_name }}{{ messages[0].nothing }}|{{ messages | map(attribute='role') | join(',') }}", None),
    ],
)
def test_text_equals_that_of_transformers(text: str, wanted: str | None):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils")
    kept = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    [reference], _ = theirs.render_jinja_template([kept], chat_template=text)
    assert rendered(text) == reference
    assert wanted in (None, reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% if %}", r"t\.jinja:1: Expected an expression"),
        ("a\n{% endfor %}", r"t\.jinja:2: "),
        ("{% include '/etc/passwd' %}", r"t\.jinja: line 1: reads another file \(include\); write the whole template"),
        ("{% from 'x' import y %}", "reads another file"),
        ("{{ ''.__class__.__mro__ }}", r"t\.jinja:1: does what is not allowed: access to attribute '__class__'"),
        ("\n{{ messages.append(1) }}", r"t\.jinja:2: does what is not allowed"),
        ("{{ [1] | random }}", "does what is not allowed"),
        ("{% set ns = namespace(_a=1) %}", "does what is not allowed"),
        ("{{ strftime_now('%Y') }}", r"asks for the date .* set data\.chat_template\.date"),
        (
            "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}c{{ x }}",
            "has a generation block inside a macro",
        ),
        ("x" * (chat_template.MAX_TEMPLATE_CHARACTERS + 1), "characters, and 1048576 are allowed"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(text: str, message: str):
    with pytest.raises(ChatTemplateError, match=message) as error:
        rendered(text)
    assert not isinstance(error.value, ChatRefused)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message", "reason"),
    [
        (
            "\n\n{{ raise_exception('one\nat a time') }}",
            r"t\.jinja:3: refuses the conversation: one at a time",
            "refused",
        ),
        ("{{ messages[7].content.x }}", r"t\.jinja:1: cannot render the conversation \(list object has no", "refused"),
        ("{{ open('/etc/passwd') }}", "cannot render the conversation", "refused"),
        ("{{ messages[0].content + 1 }}", r"cannot render the conversation \(TypeError", "refused"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render the conversation .*recursion", "refused"),
        ("{{ 'a' * 10 ** 9 }}", "makes 1000000000 characters", "too large"),
        ("{{ 'a' | center(10 ** 9) }}{{ 1 }}", "makes 1000000000 characters", "too large"),
        ("{{ 'a'.ljust(10 ** 9) }}", "makes 1000000000 characters", "too large"),
        ("{{ ('x' * 10 ** 5) | replace('x', 'y' * 10 ** 5) }}", "makes 10000100000 characters", "too large"),
        ("{{ ('x' * 10 ** 5).replace('x', 'y' * 10 ** 5) }}", "makes 10000100000 characters", "too large"),
        ("{{ (['x' * 10 ** 5] * 10 ** 5) | map('upper') | join }}", "makes 336", "too large"),
        ("{{ (['x' * 10 ** 5] * 10 ** 5) | map('upper') | list }}", "makes 336", "too large"),
        ("{{ ''.join(['x' * 10 ** 5] * 10 ** 5) }}", "makes 10000000000 characters", "too large"),
        ("{{ '%9999999999d' % 1 }}", "a width of more than a million", "too large"),
        ("{{ '%*d' % (9999999999, 1) }}", "makes 9999999999 characters", "too large"),
        ("{{ '{:{}}'.format(1, 9999999999) }}", "makes 9999999999 characters", "too large"),
        ("{{ '%9999999999d' | format(1) }}", "a width of more than a million", "too large"),
        ("{{ 9 ** 9 ** 9 ** 9 ** 9 }}", "computes a number of more than 4096 bits", "too large"),
    ],
)
def test_a_conversation_that_cannot_be_rendered_is_refused(text: str, message: str, reason: str):
    with pytest.raises(ChatRefused, match=message) as error:
        rendered(text)
    assert error.value.reason.startswith(reason)
    assert "\n" not in str(error.value)


GROWING = (
    "{% set ns.x = ns.x ~ ns.x %}",
    "{% set ns.x = ns.x + ns.x %}",
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}",
    "{% set ns.x = [ns.x, ns.x] | join %}",
    "{% set ns.x = ns.x.replace('a', 'aa') %}",
    "{{ ns.x }}",
)


@pytest.mark.parametrize("step", GROWING)
def test_text_cannot_grow_without_bound(step: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "MAX_CHARACTERS", 1 << 10)
    loop = f"{{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}}{{% for _ in range(99) %}}{step}{{% endfor %}}"
    with pytest.raises(ChatRefused, match="characters, and 1024 are allowed"):
        rendered(loop)


@pytest.mark.parametrize(
    "text",
    [
        "{% for a in range(9) %}{% for b in range(99) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
        "{% for a in [[[]] * 30] * 30 recursive %}{{ loop(a) }}{% endfor %}",
    ],
)
def test_loops_cannot_turn_without_bound(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_MAX_STEPS", 500)
    with pytest.raises(ChatRefused, match="its loops turn more than 500 times"):
        rendered(text)


def test_a_date_is_the_configured_one():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", name="t", today=datetime.date(2026, 1, 31))
    assert template.render(MESSAGES).text == "31 Jan 2026"
    assert template.fingerprint != ChatTemplate(template.text, name="t").fingerprint
