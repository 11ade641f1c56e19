"""`sharp chat`: lines in, streaming answers out. Knows the public LLM and a terminal or pipe."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from sharp.cli.errors import CommandError, say

if TYPE_CHECKING:
    from sharp.llm import LLM
    from sharp.request import SamplingParams

HELP = "/reset forgets the conversation, /exit or end of file ends; Ctrl-C stops an answer"


def chat_loop(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Read messages until the end of input. Answers go to stdout, everything else to stderr.

    Raises CommandError for input that is not UTF-8.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    terminal = sys.stdin.isatty()
    first = [{"role": "system", "content": system}] if system else []
    messages = list(first)
    if terminal:
        say(HELP)
    while True:
        line = read_line(terminal)
        if line is None:
            return
        word = line.strip()
        if not word:
            continue
        if word == "/exit":
            return
        if word == "/reset":
            messages = list(first)
            say("(forgotten)")
        elif word.startswith("/"):
            say(f"unknown command {word.split()[0]}: {HELP}")
        else:
            messages.append({"role": "user", "content": line})
            answer = stream_answer(llm, messages, params)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()  # templates want turns to alternate


def read_line(terminal: bool) -> str | None:
    """The next line without its end; None at the end of input. Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            if terminal:
                return input("> ")
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        except EOFError:
            say("")
            return None
        except UnicodeDecodeError:
            raise CommandError("the input is not UTF-8", 2) from None
        except KeyboardInterrupt:
            if not terminal:
                raise
            say(f"\n({HELP})")


def stream_answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print an answer as it grows and return it: up to where Ctrl-C stopped it; "" if it was refused."""
    text = ""
    try:
        for output in llm.chat_stream(messages, params):
            grown = output.outputs[0].text
            sys.stdout.write(grown[len(text) :])
            sys.stdout.flush()
            text = grown
        sys.stdout.write("\n")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        say("(stopped)")
    except ValueError as error:  # too long, say: the next may be answered be
        say(f"sharp: {error}" + (" (/reset starts anew)" if len(messages) > 1 else ""))
        return ""
    sys.stdout.flush()
    return text
