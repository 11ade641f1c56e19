"""The process that compiles and renders one chat template, under limits that the kernel enforces.

Knows jinja2 and the environment that Hugging Face templates expect: trimmed blocks, loop controls, tojson,
raise_exception, strftime_now, `generation` blocks (as transformers.utils.chat_template_utils has it). Imports
nothing of sharp: chat_template.py starts it with [sys.path as JSON, bytes of memory].

Messages are a u32 length and JSON, both ways. The first one in is {"source": ...}, answered when it is
compiled; each further one is a context, answered by {"text": ...} or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import struct
import sys
from typing import Any, NoReturn

MAX_OUTPUT_CHARS = 1 << 24  # of a rendered chat; the longest contexts have a few million tokens


def make_environment() -> Any:
    """jinja2's sandbox, in which nothing can be changed, with what templates may call."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %}...{% endgeneration %} marks words for training; here it is its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def to_json(
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


def limit(memory_bytes: int) -> None:
    """Memory, no new files, and an hour of processor time in case the parent dies without a word."""
    import resource

    wanted = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: 3600, resource.RLIMIT_NOFILE: 3}
    for which, value in {**wanted, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some; the parent's clock holds anyway
            resource.setrlimit(which, (value, value))


def render(template: Any, context: dict[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": ...}, whatever the template does."""
    try:
        pieces, length = [], 0
        for piece in template.generate(**context):
            length += len(piece)
            if length > MAX_OUTPUT_CHARS:
                return {"error": f"its text is over the limit of {MAX_OUTPUT_CHARS} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except Exception as error:
        return {"error": _words(error)}


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:500]


def read() -> Any:
    """The next message; None when the parent has gone."""
    head = sys.stdin.buffer.read(4)
    return json.loads(sys.stdin.buffer.read(*struct.unpack("<I", head))) if len(head) == 4 else None


def write(value: dict[str, str]) -> None:
    data = json.dumps(value).encode()
    sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    path, memory_bytes = sys.argv[1:]
    sys.path[:] = json.loads(path)
    environment = make_environment()
    import jinja2.debug  # noqa: F401  (imported on the first error otherwise, when no file can be opened)

    render(environment.from_string("{{ x | tojson }}{{ strftime_now('%Y') }}{{ 1 // 0 }}"), {"x": [1]})
    limit(int(memory_bytes))
    template: Any = None
    broken: dict[str, str] | None = None
    source = read()
    if source is None:
        return
    try:
        template = environment.from_string(source["source"])
    except (Exception, MemoryError, RecursionError) as error:
        broken = {"error": f"it cannot be compiled: {_words(error)}"}
    write({})
    while (context := read()) is not None:
        write(broken or render(template, context))


if __name__ == "__main__":
    main()
