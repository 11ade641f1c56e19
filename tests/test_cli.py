"""The command line on the tiny random model: what it prints where, how it ends, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sharp.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "weights" / "tiny")
GREEDY = ["--model", TINY, "--device", "cpu", "--temperature", "0"]


def run(
    *words: str | bytes, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """`python -m sharp` in a process of its own."""
    command = [sys.executable, "-m", "sharp", *words]
    settings = {**os.environ, **(env or {})}
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=settings, timeout=120)


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """Run in this process, expect this exit code and one line on stderr; return it."""
    assert main(list(words)) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if not line.startswith("sharp: on ")]
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("sharp: ")
    return lines[0]


@pytest.fixture(scope="module")
def llm() -> Any:
    from sharp import LLM

    with LLM(TINY, device="cpu", progress=False) as llm:
        yield llm


def greedy_ids(llm: Any, prompt: str | list[int], max_tokens: int) -> list[int]:
    from sharp import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return list(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids)


def test_generate_json(llm: Any) -> None:
    """Two prompts, two objects in their order, the text as it was given, nothing else on stdout."""
    words = ["--prompt", "  Hello, w\u00f6rld", "--prompt", "x", "--max-tokens", "6", "--json"]
    # A locale that cannot write the answer must not matter.
    done = run("generate", *GREEDY, *words, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    objects = [json.loads(line) for line in done.stdout.decode("utf-8").splitlines()]
    assert [list(found) for found in objects] == [
        ["prompt", "prompt_token_ids", "token_ids", "text", "finish_reason"]
    ] * 2
    for found, prompt in zip(objects, ("  Hello, w\u00f6rld", "x"), strict=True):
        assert found["prompt"] == prompt
        assert found["prompt_token_ids"] == llm.tokenizer.encode(prompt)
        assert found["token_ids"] == greedy_ids(llm, prompt, 6)
        assert found["finish_reason"] in ("length", "stop")
    assert b"sharp: on cpu" in done.stderr
    assert b"float32" in done.stderr


def test_generate_from_a_file(llm: Any, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "a\\nb"}', "", '{"prompt_token_ids": [5, 6, 7]}', '"plain"']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert main(["generate", *GREEDY, "--prompts-file", str(file), "--max-tokens", "3", "--json"]) == 0
    objects = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [found["prompt"] for found in objects] == ["a\nb", None, "plain"]
    assert objects[1]["prompt_token_ids"] == [5, 6, 7]
    assert objects[1]["token_ids"] == greedy_ids(llm, [5, 6, 7], 3)


def test_generate_several_answers(llm: Any, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Each answer an object of its own; the options reach the engine by their names."""
    from sharp import SamplingParams

    words = ["generate", "--model", TINY, "--device", "cpu", "--prompt", "ab", "--prompt", "c", "--seed", "8"]
    words += ["--max-tokens", "5", "--n", "3", "--top-k", "7", "--top-p", "0.8", "--no-prefix-caching"]
    assert main([*words, "--json"]) == 0
    objects = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    params = SamplingParams(max_tokens=5, n=3, top_k=7, top_p=0.8, seed=8)
    wanted = [answer for o in llm.generate(["ab", "c"], params, use_tqdm=False) for answer in o.outputs]
    assert [found["index"] for found in objects] == [0, 1, 2] * 2
    assert [tuple(found["token_ids"]) for found in objects] == [answer.token_ids for answer in wanted]
    assert len({tuple(found["token_ids"]) for found in objects}) > 2
    assert main(words) == 0
    text = capfdbinary.readouterr().out.decode()
    assert [number for number in ("[1.1] ", "[1.3] ", "[2.2] ") if number not in text] == []


def test_prefix_caching_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("sharp.llm.EngineConfig", lambda **options: seen.append(options) or 1 / 0)
    for words, wanted in (([], True), (["--no-prefix-caching"], False)):
        assert main(["generate", *GREEDY, "--prompt", "a", *words]) == 1
        assert seen.pop()["prefix_caching"] is wanted


def test_generate_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *GREEDY, "--prompt", "a", "--prompt", "b", "--max-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("[1] ")
    assert "\n[2] " in shown


def test_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(*words: str) -> list[int]:
        hot = ["--model", TINY, "--device", "cpu", "--temperature", "1.5", "--max-tokens", "24", "--json"]
        assert main(["generate", *hot, "--prompt", "hi", *words]) == 0
        return list(json.loads(capsys.readouterr().out)["token_ids"])

    assert sampled("--seed", "7") == sampled("--seed", "7")
    assert sampled("--seed", "7") != sampled("--seed", "8")


def test_bfloat16_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a", "--max-tokens", "1", "--dtype", "bfloat16"]
    assert main(["generate", *GREEDY, *words]) == 0
    assert "bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a JSON list"),
        ("{}", "exactly one of"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "exactly one of"),
        ('{"prompt": 3}', "prompt is a JSON int"),
        ('{"prompt": "a", "temperature": 1}', "unknown key 'temperature'"),
        ('{"prompt_token_ids": "abc"}', "whole numbers"),
        ('{"prompt_token_ids": [1, true]}', "whole numbers"),
        ('{"prompt_token_ids": [1.5]}', "whole numbers"),
        ('"\\ud800"', "not valid UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n{line}\n', encoding="utf-8")
    shown = refused(capsys, 2, "generate", *GREEDY, "--prompts-file", str(file))
    assert f"{file}:2: " in shown
    assert said in shown


def test_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'"good"\n"caf\xe9"\n')
    assert f"{file}:2: not UTF-8 (byte 5" in refused(
        capsys, 2, "generate", *GREEDY, "--prompts-file", str(file)
    )
    done = run("generate", *GREEDY, "--prompt", b"caf\xe9")
    assert done.returncode == 2
    assert b"prompt 0: not valid UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["generate", "--prompt", "a"], 2, "--model"),
        (["generate", "--prompt", "a", "--model", ""], 1, "the name of the model is empty"),
        (["info", ""], 1, "the name of the model is empty"),
        (["probe", ""], 1, "the name of the model is empty"),
        (
            ["generate", *GREEDY, "--prompt", "a", "--rung", "gemm=plain"],
            2,
            "sharp: rung 'plain' of gemm does not run on device 'cpu'",
        ),
        (["generate", *GREEDY], 2, "--prompts-file"),
        (["generate", *GREEDY, "--prompt", "a", "--prompts-file", "x"], 2, "one of the two"),
        (["generate", *GREEDY, "--prompts-file", "/nowhere/x.jsonl"], 2, "/nowhere/x.jsonl"),
        (["generate", *GREEDY, "--prompts-file", os.devnull], 2, "no prompts"),
        (["generate", *GREEDY, "--prompt", ""], 2, "empty"),
        (["generate", *GREEDY, "--prompt", "a", "--prompt", ""], 2, "prompt 1"),
        (["generate", *GREEDY, "--prompt", "ab" * 3000], 2, "2048"),
        (["generate", *GREEDY, "--prompt", "a", "--max-tokens", "0"], 2, "max_tokens"),
        (["generate", *GREEDY, "--prompt", "a", "--max-tokens", "-3"], 2, "-3"),
        (["generate", *GREEDY, "--prompt", "a", "--max-tokens", "many"], 2, "--max-tokens"),
        (["generate", "--model", TINY, "--prompt", "a", "--temperature", "-1"], 2, "temperature"),
        (["generate", "--model", TINY, "--prompt", "a", "--temperature", "nan"], 2, "temperature"),
        (["generate", *GREEDY, "--prompt", "a", "--seed", "-1"], 2, "seed"),
        (["generate", *GREEDY, "--prompt", "a", "--top-k", "-1"], 2, "top_k"),
        (["generate", *GREEDY, "--prompt", "a", "--top-p", "0"], 2, "top_p"),
        (["generate", *GREEDY, "--prompt", "a", "--top-p", "1.5"], 2, "1.5"),
        (["generate", *GREEDY, "--prompt", "a", "--n", "0"], 2, "n must be"),
        (["chat", "--model", TINY, "--top-p", "nan"], 2, "top_p"),
        (["generate", "--model", TINY, "--prompt", "a", "--device", "tpu"], 2, "auto, cuda, cpu"),
        (["generate", *GREEDY, "--prompt", "a", "--dtype", "int4"], 2, "float32, bfloat16"),
        (["generate", *GREEDY, "--prompt", "a", "--rung", "gemm"], 2, "OP=NAME"),
        (["generate", *GREEDY, "--prompt", "a", "--rung", "gemm=magic"], 2, "reference"),
        (["generate", *GREEDY, "--prompt", "a", "--rung", "gemmm=plain"], 2, "gemmm"),
        (["generate", "--model", "no-such-model", "--prompt", "a"], 1, "no-such-model"),
        (["info", "no-such-model"], 1, "no-such-model"),
        (["chat", "--model", "no-such-model"], 1, "no-such-model"),
        (["demo", "--model", "no-such-model"], 1, "no-such-model"),
        (["demo", "--model", TINY, "--max-tokens", "2048"], 2, "2048"),
        (["pull", "no-such-model"], 1, "smollm2-135m-instruct"),
        (["frobnicate"], 2, "frobnicate"),
        (["generate", "--frobnicate"], 2, "--frobnicate"),
    ],
)
def test_what_is_refused(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, code, *words)


def test_traceback_on_demand() -> None:
    asked = run("--traceback", "info", "no-such-model")
    assert asked.returncode == 1
    assert b"Traceback" in asked.stderr
    assert b"Traceback" not in run("info", "no-such-model").stderr


def test_no_gpu_is_said() -> None:
    # In a process of its own: the tests' own may have the simulator in the driver's place.
    plain = {"NUMBA_ENABLE_CUDASIM": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = run("generate", "--model", TINY, "--prompt", "a", "--device", "cuda", env=plain)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert "cpu" in lines[0]


def test_help_is_light() -> None:
    """--help must not wait for numpy or a compiler."""
    heavy = "{'numpy', 'numba', 'tokenizers', 'gguf', 'jinja2'}"
    code = f"import sys; from sharp.__main__ import main; main(['--help']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    for command in ("generate", "chat", "info", "pull", "demo"):
        assert f"  {command} " in done.stdout


def test_no_words_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "Usage: sharp" in capsys.readouterr().out
    from sharp import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sharp {__version__}\n"


def test_chat_through_a_pipe(llm: Any) -> None:
    """The first answer again after /reset; commands answered on stderr; the end of input ends it."""
    text = "hello\nmore\n/what\n\n/reset\nhello\n"
    done = run("chat", *GREEDY, "--max-tokens", "8", stdin=text.encode())
    assert done.returncode == 0, done.stderr
    talk = [{"role": "user", "content": "hello"}]
    ids = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(talk), add_special_tokens=False)
    answer = llm.tokenizer.decode(greedy_ids(llm, ids, 8))
    shown = done.stdout.decode("utf-8")
    assert answer
    assert shown.startswith(answer + "\n")
    assert shown.endswith("\n" + answer + "\n")
    assert len(shown) > 2 * len(answer) + 2, "the second message had an answer of its own"
    assert b"unknown command /what" in done.stderr
    assert b"(forgotten)" in done.stderr


def test_chat_ends_at_exit_and_refuses_other_bytes() -> None:
    assert run("chat", *GREEDY, "--max-tokens", "2", stdin=b"/exit\nhello\n").stdout == b""
    bad = run("chat", *GREEDY, "--max-tokens", "2", stdin=b"caf\xe9\n")
    assert bad.returncode == 2
    assert b"not UTF-8" in bad.stderr


def test_a_message_too_long_leaves_the_chat_usable() -> None:
    done = run("chat", *GREEDY, "--max-tokens", "4", stdin=b"ab" * 3000 + b"\nhello\n")
    assert done.returncode == 0
    assert b"2048" in done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    controller, terminal = os.openpty()
    words = ["chat", "--model", TINY, "--device", "cpu", "--temperature", "0", "--max-tokens", "1500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sharp", *words],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(terminal)
    seen = b""

    def read() -> bytes:
        """What the program writes next; a program that writes nothing must not hold up the suite."""
        assert select.select([controller], [], [], 60)[0], seen
        return os.read(controller, 4096)

    def wait_for(wanted: bytes, after: int) -> None:
        nonlocal seen
        deadline = time.monotonic() + 90
        while wanted not in seen[after:]:
            assert time.monotonic() < deadline, seen
            seen += read()

    try:
        wait_for(b"> ", 0)
        os.write(controller, b"hi\n")  # 942 tokens: most others end before a busy machine gets to the Ctrl-C
        start = len(seen)
        while len(seen) < start + 40:  # the echo of the line, then the answer
            seen += read()
        process.send_signal(signal.SIGINT)
        wait_for(b"(stopped)", start)
        wait_for(b"> ", seen.index(b"(stopped)"))
        assert process.poll() is None
        os.write(controller, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)


def test_info_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    from kernels_numba.ops import OPS

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for op in OPS:
        assert f"  {op} " in shown
    import numpy as np

    assert f" {np.__version__}\n" in shown
    for word in ("driver", "usable", "models", "user cache", "BLAS", "Python"):
        assert word in shown


def test_info_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    from sharp.weights import open_checkpoint

    config = open_checkpoint(TINY).config
    assert main(["info", TINY]) == 0
    shown = capsys.readouterr().out
    assert f"{config.num_parameters:,}" in shown
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        by_hand = 2 * config.num_layers * config.num_kv_heads * config.head_dim * width
        assert f"KV per token, {dtype}" in shown
        assert f"  {by_hand:,} bytes" in shown
    assert f"[{config.vocab_size}, {config.hidden_size}]" in shown


def number_after(shown: str, name: str) -> int:
    """The first number in the demo's table row of that name."""
    row = next(line for line in shown.splitlines() if name in line)
    return int(row.partition(name)[2].replace("\u2502", "").split()[0].replace(",", ""))


def test_demo_counts_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", TINY, "--device", "cpu", "--max-tokens", "5"]) == 0
    shown = capsys.readouterr().out
    lengths = [int(line.split()[1]) for line in shown.splitlines() if " tokens: " in line]
    generated = [int(line.split("(")[1].split()[0]) for line in shown.splitlines() if "ended by" in line]
    assert len(lengths) == len(generated) == 8
    assert max(lengths) > 1000
    assert number_after(shown, "prompt tokens") == sum(lengths)
    assert number_after(shown, "generated tokens ") == sum(generated)
    # An answer's last token is never fed back: what is computed is the prompts and all but the last of each.
    assert number_after(shown, "computed tokens") == sum(lengths) + sum(generated) - 8
    assert number_after(shown, "padding of rectangles") > 0
    assert number_after(shown, "KV pages, peak / total") > max(lengths) // 64
    assert "first words after" in shown


def test_demo_on_a_terminal(llm: Any) -> None:
    from rich.console import Console

    from sharp.demo import run_demo

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=40, color_system=None)
    run_demo(llm, time.monotonic(), 4, console)
    shown = screen.getvalue()
    assert "What is the capital of France?" in shown
    assert "generating" in shown
    assert "first words after" in shown


@pytest.mark.network
def test_pull_prints_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "smollm2-135m-instruct"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
