"""Chat templates: a list of messages -> the text a chat model was trained on, in jinja2's sandbox.

Knows the environment that Hugging Face templates expect (trimmed blocks, raise_exception, tojson,
strftime_now, loop controls). Knows nothing of tokens. A template comes with the model file, so it is
untrusted code.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """A compiled template. Raises ValueError when the source is not valid jinja2."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: what the template may name, such as {"bos_token": "<s>", "eos_token": "</s>"}."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid jinja2, line {error.lineno}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The messages as one text; add_generation_prompt: end it where the assistant's answer begins.

        Raises TypeError or ValueError naming the message that is malformed, and ValueError with the
        template's own complaint (for example about the order of roles).
        """
        checked = _check_messages(messages)
        try:
            return self._template.render(
                messages=checked,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refused these messages: {error}") from None


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages must be a list of {{'role', 'content'}} objects, not {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty; a chat needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}] must be an object, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"messages[{index}] has no {key!r}")
            if not isinstance(message[key], str):
                raise TypeError(f"messages[{index}][{key!r}] must be text, not {type(message[key]).__name__}")
        if not message["role"]:
            raise ValueError(f"messages[{index}]['role'] is empty")
    return [dict(message) for message in messages]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
