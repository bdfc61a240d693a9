import resource
import time
from datetime import datetime
from pathlib import Path

import pytest

from minillama.errors import UserError
from minillama.tokenizer.template import has_generation, render

FILE = Path("model/chat_template.jinja")
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rendered(template, messages=MESSAGES, **options):
    return render(
        template, {"messages": messages, "bos_token": "<s>"}, now=datetime(2024, 7, 26), where=FILE, **options
    )


def grows(value: str, how: str) -> str:
    loop = f"{{% for i in range(60) %}}{{% set x.v = {how} %}}{{% endfor %}}"
    return f"{{% set x = namespace(v={value}) %}}{loop}{{{{ x.v }}}}"


FAILS = {
    "{{ 1/0 }}": "ZeroDivisionError: division by zero",
    "{% for i in range(10**9) %}a{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "calls itself without end",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "calls itself without end",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "nested too deeply",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "nested too deeply",
    "{{ messages | lipsum }}": "No filter named 'lipsum'",
    "{{ lipsum(n=10**9) }}": "'lipsum' is undefined",
    "{% include 'x' %}": "no loader",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ namespace(__class__=1) }}": "underscore",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ messages[0].nothing.x }}": "has no attribute 'nothing'",
    "{% for %}": "Expected an expression",
    "{{ strftime_now(5) }}": "must be str",
}
STOPPED = {
    "{{ 'a' * 10**10 }}": "makes a text of 10,000,000,000 characters",
    "{{ 10**10 * ['a'] }}": "makes a list of 10,000,000,000 items",
    "{% for i in range(999) %}{% for j in range(9999) %}" + "a" * 9999 + "{% endfor %}{% endfor %}": "makes a text of",
    grows("'aaaa'", "x.v + x.v"): "makes a text of",
    grows("'aaaa'", "x.v ~ x.v"): "takes more than 128 MiB",
    grows("7", "x.v * x.v"): "whole numbers of thousands of digits",
    "{{ 2 ** (2 ** 40) }}": "whole numbers of thousands of digits",
    "{{ 1 | round(10**9, 'ceil') }}": "whole numbers of thousands of digits",
    "{{ 'a' | center(10**10) }}": "takes more than 128 MiB",
    "{{ 'a'.ljust(10**10) }}": "takes more than 128 MiB",
    "{{ '%9999999999d' % 1 }}": "takes more than 128 MiB",
    "{{ '{:>9999999999}'.format(1) }}": "takes more than 128 MiB",
    "{{ ('a' * 10**7).replace('', 'b' * 10**7) }}": "takes more than 128 MiB",
    "{{ messages | tojson(indent=10**10) }}": "takes more than 128 MiB",
    "{{ (['a' * 10**7] * 99999) | map('upper') | map('length') | sum }}": "computes for more than 0.2 seconds",
    "a" * (2**17 + 1): "has more than 131,072 characters",
}


@pytest.mark.parametrize("template", [*FAILS, *STOPPED], ids=lambda template: template[:40])
def test_a_template_ends_in_one_message_that_names_its_file(template, monkeypatch):
    monkeypatch.setattr("minillama.tokenizer.template.SECONDS", 0.2)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(UserError) as caught:
        rendered(template)
    message = str(caught.value)
    assert message.startswith(f"{FILE}: the chat template ") and (FAILS | STOPPED)[template] in message
    assert ("put a chat_template.jinja that comes to an end" in message) == (template in STOPPED)
    assert time.thread_time() - started < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == (resource.RLIM_INFINITY,) * 2  # as it was


def test_what_has_passed_a_bound_is_not_tried_for_each_row(monkeypatch):
    monkeypatch.setattr("minillama.tokenizer.template.SECONDS", 0.5)
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    for messages, most in ((MESSAGES, 5), ([{"role": "user", "content": "else"}], 0.3)):
        started = time.thread_time()
        with pytest.raises(UserError, match=r"more than 0\.5 seconds"):
            rendered(template, messages)
        assert time.thread_time() - started < most


def test_what_cannot_be_compiled_is_not_tried_for_each_row():
    template = "{{ a" + ".b" * 40_000 + " }}"
    for most in (5, 0.05):
        started = time.thread_time()
        with pytest.raises(UserError, match="the chat template fails: it calls itself"):
            rendered(template)
        assert time.thread_time() - started < most


def test_long_conversations_are_within_the_bounds():
    messages = [{"role": "user", "content": "é" * 10**6} for _ in range(30)]
    text = rendered(
        "{% for m in messages %}{{ m.role ~ m.content | trim }}{{ '\n' + m.content }}{% endfor %}", messages
    )
    assert len(text) == 30 * (4 + 1 + 2 * 10**6)


def test_the_day_is_the_one_that_is_given():
    assert rendered("{{ strftime_now('%d %b %Y %H:%M') }}") == "26 Jul 2024 00:00"


def test_marks():
    ids = {id(message): number for number, message in enumerate(MESSAGES)}
    template = "{{ bos_token }}{% for m in messages %}{% for c in 'ab' %}{{ c }}{% endfor %}{{ m.role }}{% endfor %}E"
    marked = rendered(template, marked=ids)
    assert marked.replace("\ufdd0", "<").replace("\ufdd1", ">") == "<s><0:0>ab<1>user<0:1>ab<1>assistant<0>E"
    assert rendered(template) == "<s>abuserabassistantE"
    buffered = "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | length }}"
    assert rendered(buffered, marked=ids) == rendered(buffered) == "13"
    generates = (
        "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.role }}{% endgeneration %}{{ x }}{% endfor %}"
    )
    marked = rendered(generates, marked=ids)
    assert marked.replace("\ufdd0", "<").replace("\ufdd1", ">") == "<0:0><g>user</g><0:1><g>assistant</g><0>"
    assert has_generation(generates, FILE) and not has_generation("{{ 'generation' }}", FILE)
