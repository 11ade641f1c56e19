"""Chat templates: transformers' text for each family's style, and hostile ones that end in a clean error."""

from __future__ import annotations

import datetime
import gc
import json
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sharp import chat_template, template_worker
from sharp.chat_template import MAX_SOURCE_CHARS, ChatTemplate

FOLDER = Path(__file__).parent / "golden"
sys.path.insert(0, str(FOLDER))
from templates import TEMPLATE_CHATS, TEMPLATES  # noqa: E402

GOLDEN = json.loads((FOLDER / "chats.json").read_text(encoding="utf-8"))
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], GOLDEN["special_tokens"])
    rows = GOLDEN["rows"][name]
    assert len(rows) == len(TEMPLATE_CHATS) > 10
    for chat, row in zip(TEMPLATE_CHATS, rows, strict=True):
        if isinstance(row, str):  # the template's own complaint
            with pytest.raises(ValueError) as error:
                template.render(chat, True)
            assert str(error.value) == f"the chat template refused these messages: {row}"
        else:
            assert [template.render(chat, prompt) for prompt in (True, False)] == row


def test_what_templates_may_use() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}|{{ tools is none }}|{{ x is defined }}", {})
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert template.render(CHAT, True) == f"{today}|True|False"
    odd = [{"role": "user", "content": "\x00\u2028 \ud83d \U0001f600", "name": "n"}]  # a lone surrogate, too
    assert ChatTemplate("{{ messages[0].content + messages[0].name }}", {}).render(odd, True) == (
        odd[0]["content"] + "n"
    )
    assert ChatTemplate("{{ [1, '<'] | tojson(indent=1) }}", {}).render(CHAT, True) == '[\n 1,\n "<"\n]'


HOSTILE = {
    "a loop of 10**9": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}xxxx{% endfor %}{% endfor %}",
    "a product": "{{ 'x' * 10**10 }}",
    "a product of what is not constant": "{{ messages[0].content * 10**10 }}",
    "a list of 10**10": "{{ [messages] * 10**10 }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "powers of what is not constant": "{% set n = messages | length + 9 %}{{ n ** (n ** n) }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "a filter's width": "{{ messages[0].content | center(10**10) }}",
    "a format's width": "{{ '%10000000000d' % 1 }}{{ '{:>10000000000}'.format(1) }}",
    "replace": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "indent": "{{ ('x\\n' * 100000) | indent(100000) }}",
    "tojson": "{{ [1] | tojson(indent=10**10) }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "batch": "{{ [1] | batch(10**10, 1) | list }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursion in a loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "the class of a string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the class by a filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__['sys'] }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format's attributes": "{{ '{0.__class__.__mro__}'.format(1).upper().nothing.more }}",
    "a file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os.system('true') }}",
    "changing what it was given": "{{ messages.append(1) }}{{ messages[0].update({}) }}",
    "an output of 20 million": "{{ 'x' * (messages | length * 20000000) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_clean_error(name: str) -> None:
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^the chat template refused these messages: \S") as error:
        ChatTemplate(HOSTILE[name], {}, seconds=1.0, memory_bytes=200 << 20).render(CHAT, True)
    taken, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 4, taken  # 1 s, and what a busy machine adds
    assert peak < 8 << 20, peak  # in this process; the other one has the kernel's limit
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}", "cannot be parsed: RecursionError"),
        ("{% if x %}" * 10000, "cannot be parsed: RecursionError|not valid jinja2"),
        ("x" * (MAX_SOURCE_CHARS + 1), r"has 131073 characters, over the limit of 131072"),
        ("{{ 1" + "0" * 5000 + " }}", "cannot be parsed: ValueError|not valid"),
        ("{{ 'x", "not valid jinja2, line 1"),
        ("\n{% endfor %}", "not valid jinja2, line 2"),
    ],
)
def test_what_cannot_be_parsed(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {})


def test_after_a_limit_the_next_chat_is_answered() -> None:
    source = (
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{% if messages[0].content == 'fill' %}"
        "{{ messages[0].content * 10**10 }}{% endif %}{{ messages[0].content }}"
    )
    template = ChatTemplate(source, {}, seconds=0.5)
    for bad, message in (("loop", "longer than 0.5 seconds"), ("fill", "memory")):
        with pytest.raises(ValueError, match=message):
            template.render([{"role": "user", "content": bad}], True)
        assert template.render(CHAT, True) == "hi"


def test_large_chats_and_unknown_filters() -> None:
    long = [{"role": "user", "content": "é\n" * 500_000}] * 4
    assert ChatTemplate("{{ messages[3].content }}", {}).render(long, True) == long[0]["content"]
    with pytest.raises(ValueError, match=r"it cannot be compiled: No filter named 'nothing'"):
        ChatTemplate("{{ 1 | nothing }}", {}).render(long, True)


def test_many_threads_one_template() -> None:
    template, answers = ChatTemplate("{{ messages[0].content }}", {}), {}

    def ask(index: int) -> None:
        for turn in range(20):
            text = f"{index} {turn}"
            answers[text] = template.render([{"role": "user", "content": text}], True)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 120
    assert all(text == answer for text, answer in answers.items())


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("x", {})
    assert template.render(CHAT, True) == "x"
    process: Any = template._process._popen
    assert process.poll() is None
    del template
    gc.collect()
    assert process.poll() is not None


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_the_process_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    template = ChatTemplate("{{ strftime_now('%%') }}", {})
    assert template.render(CHAT, True) == "%"
    process: Any = template._process._popen
    seen = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"TZ=Asia/Tokyo" in seen
    assert b"secret" not in seen


def test_the_output_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = template_worker.make_environment()
    monkeypatch.setattr(template_worker, "MAX_OUTPUT_CHARS", 10)
    loop = environment.from_string("{% for i in range(5) %}xxx{% endfor %}")
    assert template_worker.render(loop, {}) == {"error": "its text is over the limit of 10 characters"}
    assert template_worker.render(environment.from_string("xxx"), {}) == {"text": "xxx"}
    assert chat_template.SECONDS <= 10
