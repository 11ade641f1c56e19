"""Chat templates: a list of messages -> the text a chat model was trained on.

Knows what messages must look like and how to hold a template to limits. Knows nothing of tokens. A template
comes with the model file, so it is untrusted code: jinja2's sandbox keeps it from reaching out, but not from
running for ever or filling memory (`'x' * 10**10`, a filter's width, a string doubled forty times). It runs
in a process of its own (template_worker.py), where the kernel bounds memory and a clock here bounds time
(macOS does not hold to the memory limit: there the clock is the bound). The process starts with the first
chat (50 ms) and is kept (40 us for a later one).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sharp.template_worker import MAX_OUTPUT_CHARS, make_environment

MAX_SOURCE_CHARS = 1 << 17  # the longest published ones have some 20,000
# Of the environment, what Python and the clock need; tokens and keys stay here.
_PASSED_ON = ("PATH", "TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
MEMORY_BYTES = 512 << 20  # address space of the process, Python's own included
SECONDS = 5.0
_MAX_ANSWER_BYTES = 12 * MAX_OUTPUT_CHARS + 100  # JSON writes a character as up to two times \uXXXX


class ChatTemplate:
    """A template, checked for syntax. Raises ValueError when the source is too long or not valid jinja2."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        seconds: float = SECONDS,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """special_tokens: what the template may name, such as {"bos_token": "<s>", "eos_token": "</s>"}.

        seconds, memory_bytes: limits of one rendering.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise ValueError(
                f"the chat template has {len(source)} characters, over the limit of {MAX_SOURCE_CHARS}"
            )
        try:
            make_environment().parse(source)  # no more than that here: compiling already evaluates constants
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid jinja2, line {error.lineno}: {error}") from None
        except (RecursionError, MemoryError, ValueError, OverflowError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the chat template cannot be parsed: {what:.200}") from None
        self._special_tokens = dict(special_tokens)
        self._process = _Process(source, seconds, memory_bytes)
        weakref.finalize(self, self._process.close)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The messages as one text; add_generation_prompt: end it where the assistant's answer begins.

        Raises TypeError or ValueError naming the message that is malformed, and ValueError with the
        template's own complaint (for example about the order of roles), or when it is over a limit.
        """
        context = {
            "messages": _check_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        answer = self._process.ask(context)
        if "text" not in answer:
            raise ValueError(f"the chat template refused these messages: {answer['error']}")
        return answer["text"]


class _Process:
    """The process of one template: started by the first question, replaced after a limit was hit."""

    def __init__(self, source: str, seconds: float, memory_bytes: int) -> None:
        self._source, self._seconds, self._memory_bytes = source, seconds, memory_bytes
        self._popen: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, context: dict[str, Any]) -> dict[str, str]:
        """{"text": ...} or {"error": ...}, within the limits of time and memory."""
        with self._lock:
            deadline = time.monotonic() + self._seconds
            try:
                process = self._popen or self._start(deadline)
                self._send(process, context)
                answer: dict[str, str] = json.loads(self._receive(process, deadline))
                return answer
            except TimeoutError:
                self.close()
                return {"error": f"it takes longer than {self._seconds:g} seconds"}
            except (EOFError, BrokenPipeError, ValueError):  # killed by a limit
                self.close()
                return {"error": "it takes too much time or memory"}
            except BaseException:  # Ctrl-C: a late answer must not be taken for the next question's
                self.close()
                raise

    def _start(self, deadline: float) -> subprocess.Popen[bytes]:
        # -S -E: no site start-up (some installations import much there); the path is handed over instead.
        worker = Path(__file__).with_name("template_worker.py")
        path = [os.path.abspath(entry or ".") for entry in sys.path]
        command = [sys.executable, "-S", "-E", "-P", str(worker), json.dumps(path), str(self._memory_bytes)]
        self._popen = process = subprocess.Popen(
            command,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        self._send(process, {"source": self._source})
        self._receive(process, deadline)  # compiled: from here on it reads whenever it has answered
        return process

    def _send(self, process: subprocess.Popen[bytes], value: dict[str, Any]) -> None:
        assert process.stdin is not None
        data = json.dumps(value).encode()
        process.stdin.write(struct.pack("<I", len(data)) + data)
        process.stdin.flush()

    def _receive(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        assert process.stdout is not None
        handle, data, wanted = process.stdout.fileno(), bytearray(), 4
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while len(data) < wanted:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(handle, min(wanted - len(data), 1 << 20))
                if not chunk:
                    raise EOFError
                data += chunk
                if len(data) == wanted == 4:
                    wanted = 4 + struct.unpack("<I", data)[0]
                    if wanted > _MAX_ANSWER_BYTES:
                        raise EOFError
        return bytes(data[4:])

    def close(self) -> None:
        """End the process; the next question starts a new one."""
        process, self._popen = self._popen, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


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
