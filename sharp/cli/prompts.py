"""Prompts from the command line and from JSONL files, checked at the door. Knows JSON, no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sharp.cli.errors import CommandError

Prompt = str | list[int]
FORMS = '{"prompt": "..."}, {"prompt_token_ids": [...]} or a JSON string'


def check_text(prompt: str, what: str) -> str:
    """`prompt` itself; CommandError when it is no valid Unicode (foreign bytes, a lone surrogate)."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CommandError(f"{what}: not valid UTF-8 (at character {error.start})", 2) from None
    return prompt


def read_prompts(path: Path) -> list[Prompt]:
    """A JSONL file -> its prompts in order, without blank lines. CommandError names file and line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}", 2) from None
    prompts: list[Prompt] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            # A byte order mark is what some editors put before the first line.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise CommandError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)", 2) from None
        if text:
            prompts.append(_prompt(text, where))
    if not prompts:
        raise CommandError(f"{path} holds no prompts; a line is {FORMS}", 2)
    return prompts


def _prompt(text: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{where}: not JSON ({error}); a line is {FORMS}", 2) from None
    if isinstance(value, str):
        return check_text(value, where)
    if not isinstance(value, dict):
        raise CommandError(f"{where}: a JSON {type(value).__name__}; a line is {FORMS}", 2)
    given = [key for key in ("prompt", "prompt_token_ids") if key in value]
    unknown = sorted(set(value) - {"prompt", "prompt_token_ids"})
    if unknown:
        raise CommandError(f"{where}: unknown key {unknown[0]!r}; a line is {FORMS}", 2)
    if len(given) != 1:
        raise CommandError(f"{where}: needs exactly one of prompt and prompt_token_ids", 2)
    prompt = value[given[0]]
    if given[0] == "prompt":
        if not isinstance(prompt, str):
            raise CommandError(f"{where}: prompt is a JSON {type(prompt).__name__}, not a string", 2)
        return check_text(prompt, where)
    whole = isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if not whole:
        raise CommandError(f"{where}: prompt_token_ids must be a list of whole numbers", 2)
    return list(prompt)
