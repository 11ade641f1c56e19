"""The command line: `sharp` or `python -m sharp`. Imports the engine only when a command needs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sharp.cli.errors import INTERRUPTED, CommandError, bad_input, explain, say
from sharp.cli.tracing import TraceOut, check_trace_out, traced
from sharp.demo import DEMO_MODEL, PROMPT_CHUNK

if TYPE_CHECKING:
    from sharp.config import EngineConfig
    from sharp.llm import LLM
    from sharp.request import SamplingParams

STARTED = time.monotonic()

app = typer.Typer(
    name="sharp",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Option(metavar="MODEL", help="A GGUF file, an HF directory, or what `sharp pull` fetched."),
]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens to generate for a request.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 takes the likeliest token, else samples.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0: from all.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Sample from the likeliest tokens that reach this probability.")
]
NoPrefixCaching = Annotated[
    bool, typer.Option("--no-prefix-caching", help="Compute beginnings that prompts share each time.")
]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Of the random numbers; one for all requests.")]
Device = Annotated[str, typer.Option(metavar="auto|cuda|cpu")]
Dtype = Annotated[str, typer.Option(metavar="auto|float32|bfloat16")]
Rung = Annotated[list[str] | None, typer.Option(metavar="OP=NAME", help="Force a kernel; may repeat.")]


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """A transformer inference engine whose every performance path is a Python file."""


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="As it is, no chat template; may repeat.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='JSONL: {"prompt": ""}, {"prompt_token_ids": []} or a string a line.'
        ),
    ] = None,
    max_tokens: MaxTokens = 16,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    n: Annotated[int, typer.Option("--n", metavar="N", help="Answers to each prompt.")] = 1,
    seed: Seed = None,
    no_prefix_caching: NoPrefixCaching = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    rung: Rung = None,
    trace_out: TraceOut = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a request on stdout.")] = False,
) -> None:
    """Continue prompts. Answers go to stdout, everything else to stderr."""
    from sharp.cli.answers import answers_json, answers_text
    from sharp.cli.prompts import check_text, read_prompts

    if bool(prompt) == (prompts_file is not None):
        raise CommandError("give --prompt (it may repeat) or --prompts-file, one of the two", 2)
    prompts: list[str | list[int]]
    if prompts_file is not None:
        prompts = read_prompts(prompts_file)
    else:
        prompts = [check_text(text, f"prompt {i}") for i, text in enumerate(prompt or [])]
    params = sampling(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, n=n, seed=seed
    )
    check_trace_out(trace_out)
    options = {"prefix_caching": not no_prefix_caching}
    # bad_input: what the engine refuses at its door: an empty prompt, one too long, no token id of this model
    with load(model, device, dtype, rung, **options) as llm, bad_input(), traced(llm, trace_out):
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
    if json:
        for found in answers_json(outputs):
            write_json(found)
    else:
        print("\n".join(answers_text(outputs)))


@app.command()
def chat(
    model: Model = DEMO_MODEL,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    no_prefix_caching: NoPrefixCaching = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    rung: Rung = None,
    trace_out: TraceOut = None,
) -> None:
    """Talk with a chat model. /reset forgets, /exit ends, Ctrl-C stops an answer."""
    from sharp.cli.chat import chat_loop

    params = sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    check_trace_out(trace_out)
    options = {"prefix_caching": not no_prefix_caching}
    with load(model, device, dtype, rung, **options) as llm, traced(llm, trace_out):
        chat_loop(llm, params, system)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Describe this instead of the machine.")] = None,
) -> None:
    """Describe this machine (for a bug report) or a model."""
    from sharp.info import machine_report, model_report, print_report

    print_report(machine_report() if model is None else model_report(model))


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="As --model elsewhere.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    target_itl_ms: Annotated[
        float | None, typer.Option(metavar="X", help="Milliseconds that no step may exceed.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure even if a kept probe is true.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure a model's memory and step times on this device, and propose options."""
    from sharp.cli.probe import probe_command

    if target_itl_ms is not None and not 0 < target_itl_ms < float("inf"):
        raise CommandError(f"--target-itl-ms is {target_itl_ms}; it must be over 0", 2)
    found = probe_command(model, checked_config(device, dtype), target_itl_ms, fresh, json)
    if found is not None:
        write_json(found)


@app.command()
def simulate(
    workload: Annotated[
        Path,
        typer.Option(metavar="FILE", help='JSONL: {"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 9}.'),
    ],
    probe: Annotated[Path, typer.Option(metavar="FILE", help="What `sharp probe MODEL --json` printed.")],
    policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A scheduling policy; may repeat. [fcfs]")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="An engine option; may repeat.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run a workload through the scheduler in virtual time, on a probe's step times."""
    from sharp.cli.simulate import simulate_command

    found = simulate_command(workload, probe, policy or ["fcfs"], set_ or [], json)
    if found is not None:
        write_json(found)


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="ORG/NAME on the Hugging Face Hub, or of weights/MANIFEST.toml.")
    ],
    revision: Annotated[str | None, typer.Option(metavar="R", help="A branch, tag or commit.")] = None,
    token: Annotated[str | None, typer.Option(metavar="T", help="For private and gated models.")] = None,
    file: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="These files alone, for example '*Q4_K_M.gguf'.")
    ] = None,
) -> None:
    """Fetch a model, verify it, and print where it is."""
    progress = sys.stderr.isatty()
    if "/" in name:
        from sharp.hub import pull_from_hub

        print(pull_from_hub(name, revision=revision, token=token, pattern=file, progress=progress))
        return
    from sharp.pull import pull as fetch

    if revision or token or file:
        raise CommandError(f"--revision, --token and --file go with ORG/NAME, not with {name!r}", 2)
    print(fetch(name, progress=progress))


@app.command()
def kernels(
    build: Annotated[bool, typer.Option("--build", help="Compile what the cache lacks.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete what it holds (first).")] = False,
    arch: Annotated[
        str | None, typer.Option(metavar="sm_90a", help="Build for this target, not the GPU here.")
    ] = None,
) -> None:
    """Show, fill or empty the cache of compiled kernels."""
    from sharp.cli.kernels import kernels_command

    if arch is not None and not build:
        raise CommandError("--arch says what to --build for; give both", 2)
    kernels_command(build, clear, arch)


@app.command()
def demo(
    model: Model = DEMO_MODEL,
    max_tokens: MaxTokens = 48,
    device: Device = "auto",
    dtype: Dtype = "auto",
    rung: Rung = None,
    trace_out: TraceOut = None,
) -> None:
    """Run eight chats side by side through one engine."""
    from rich.console import Console

    from sharp.demo import run_demo
    from sharp.pull import pull as fetch
    from sharp.pull import read_manifest

    check_trace_out(trace_out)
    if model in read_manifest():
        fetch(model, progress=sys.stderr.isatty())
    sampling(max_tokens=max_tokens)
    options = {"long_prefill_token_threshold": PROMPT_CHUNK}
    with load(model, device, dtype, rung, **options) as llm, bad_input(), traced(llm, trace_out):
        run_demo(llm, STARTED, max_tokens, Console())


def sampling(**options: Any) -> SamplingParams:
    """The sampling options, checked before a model is loaded for them."""
    from sharp.request import SamplingParams

    with bad_input():
        return SamplingParams(**options)


def load(model: str, device: str, dtype: str, rung: list[str] | None, **options: Any) -> LLM:
    """The model on its device; says on stderr which one that is."""
    from sharp.llm import LLM

    checked_config(device, dtype)
    rungs = parse_rungs(rung or [])
    llm = LLM(model, device=device, dtype=dtype, rungs=rungs, progress=sys.stderr.isatty(), **options)
    say(f"sharp: on {llm.device_name}")
    return llm


def checked_config(device: str, dtype: str) -> EngineConfig:
    """These options, refused by the names that the command line gives them."""
    from sharp.config import DEVICES, DTYPES, EngineConfig

    for name, value, known in (("--device", device, DEVICES), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise CommandError(f"{name} is {value!r}; it must be one of {', '.join(known)}", 2)
    return EngineConfig(device=device, dtype=dtype)


def parse_rungs(pairs: list[str]) -> dict[str, str]:
    """["gemm=plain", ...] -> {"gemm": "plain", ...}, checked against what exists."""
    from kernels_numba.ops import resolve

    rungs = {}
    for pair in pairs:
        op, equals, name = pair.partition("=")
        if not (op and equals and name):
            raise CommandError(f"--rung is {pair!r}; it must be OP=NAME", 2)
        rungs[op] = name
    with bad_input():
        resolve("reference", rungs)
    return rungs


def write_json(value: dict[str, Any]) -> None:
    """One line of JSON on stdout, in UTF-8 whatever the locale says."""
    import json

    sys.stdout.flush()
    sys.stdout.buffer.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors end in one line on stderr."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--version"]:
        from sharp import __version__

        print(f"sharp {__version__}")
        return 0
    try:
        code = app(words or ["--help"], prog_name="sharp", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        say("sharp: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 1
    except Exception as error:
        if "--traceback" in words[:1]:
            raise
        if hasattr(error, "format_message"):  # the option parser's own errors
            say(f"sharp: {error.format_message()} (see sharp --help)")
            return int(getattr(error, "exit_code", 2))
        if type(error).__name__ == "Abort":  # Ctrl-C, as the option parser reports it
            say("sharp: interrupted")
            return INTERRUPTED
        shown = explain(error)
        say(f"sharp: {shown}")
        return shown.code


if __name__ == "__main__":
    sys.exit(main())
