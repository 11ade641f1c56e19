"""Nobody hangs: an error in any phase reaches every caller within a second; Ctrl-C and close() leave things
in order."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, FakeTokenizer, engine_config, expected

from sharp.engine import Engine
from sharp.llm import LLM
from sharp.request import EngineClosed, EngineDead, RequestOutput, SamplingParams

TOKENIZER = FakeTokenizer()
FOREVER = SamplingParams(max_tokens=2000, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
OF_THE_HOST = ("plan", "commit", "detokenise")
PHASES = (*OF_THE_HOST, "stage", "forward", "sample")


def make_llm(model: FakeModel | None = None, **options: Any) -> LLM:
    options = {"block_size": 4, "max_num_batched_tokens": 32, "max_num_seqs": 4, **options}
    return LLM(model or FakeModel(num_blocks=4096, delay=0.002), tokenizer=FakeTokenizer(), **options)


@pytest.mark.parametrize("model", [None, 5, object()])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match="model must be a path or the name of a model, not "):
        LLM(model)


def test_what_is_no_table_of_rungs_and_no_prompt() -> None:
    rungs: Any = "gemm"
    with pytest.raises(TypeError, match="rungs must map op names to rung names, not 'gemm'"):
        LLM("weights/tiny", rungs=rungs)
    with make_llm() as llm, pytest.raises(TypeError, match="prompts must be text, token ids or a list"):
        llm.generate(np.array(5))  # type: ignore[arg-type]


def break_it(engine: Engine, phase: str, error: BaseException, armed: threading.Event) -> None:
    """From when `armed` is set on, `phase` of the engine's step raises `error`."""
    model: Any = engine.model
    owner, name = {
        "plan": (engine.scheduler, "plan"),
        "stage": (model, "stage"),
        "forward": (model, "forward"),
        "sample": (model, "sample"),
        "commit": (engine.scheduler, "commit"),
        "detokenise": (engine, "_deliver"),
    }[phase]
    if phase == "detokenise":
        from fake_model import FakeDetokenizer

        class Broken(FakeDetokenizer):
            def push(self, token_id: int) -> str:
                if armed.is_set():
                    raise error
                return super().push(token_id)

        engine.tokenizer.detokenizer = lambda: Broken(TOKENIZER.pieces)
        return
    original = getattr(owner, name)

    def broken(*args: Any) -> Any:
        if armed.is_set():
            raise error
        return original(*args)

    setattr(owner, name, broken)


class Callers:
    """Threads that each wait on the engine in their own way, and what each of them got."""

    def __init__(self, llm: LLM) -> None:
        self.got: dict[str, BaseException | None] = {}
        talk = [{"role": "user", "content": "x"}]
        one_more = [[9]] * 5  # over max_num_seqs: the last of them wait in the queue
        ways: dict[str, Callable[[], Any]] = {
            "generate": lambda: llm.generate([[5], [6]], FOREVER, use_tqdm=False),
            "stream": lambda: list(llm.stream([7], FOREVER)),
            "chat": lambda: llm.chat(talk, FOREVER, use_tqdm=False),
            "chat_stream": lambda: list(llm.chat_stream(talk, FOREVER)),
            "queued": lambda: llm.generate(one_more, FOREVER, use_tqdm=False),
        }
        self.threads = [threading.Thread(target=self._run, args=way, daemon=True) for way in ways.items()]
        for thread in self.threads:
            thread.start()
        while len(llm.engine.scheduler.requests()) < 10:
            time.sleep(0.002)
        time.sleep(0.05)

    def _run(self, name: str, way: Callable[[], Any]) -> None:
        try:
            way()
            self.got[name] = None
        except BaseException as error:
            self.got[name] = error

    def join(self, seconds: float = 1.0) -> None:
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self.threads), f"only {sorted(self.got)} came back"


class Odd(BaseException):
    """Not an Exception, as CancelledError is not."""


ERRORS = (ValueError("boom"), MemoryError("no more"), Odd("odd"))
# A MemoryError of the model ends its step alone: see test_failed_steps.py.
FATAL = [(p, e) for p in PHASES for e in ERRORS if p in OF_THE_HOST or not isinstance(e, MemoryError)]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize(("phase", "error"), FATAL, ids=repr)
def test_every_caller_gets_the_error(phase: str, error: BaseException, overlap: bool) -> None:
    with make_llm(overlap=overlap) as llm:
        armed = threading.Event()
        break_it(llm.engine, phase, error, armed)
        callers = Callers(llm)
        armed.set()
        callers.join()
        assert {name: got is error for name, got in callers.got.items()} == dict.fromkeys(callers.got, True)
        for call in (
            lambda: llm.engine.add_request([4], GREEDY),
            lambda: llm.generate([4], use_tqdm=False),
            lambda: llm.stream([4]),
            lambda: llm.engine.step(),
            lambda: llm.engine.start(),
        ):
            with pytest.raises(EngineDead, match=str(error)) as caught:
                call()
            assert caught.value.__cause__ is error
        assert not llm.abort("x")


@pytest.mark.parametrize(
    "error", [StopIteration("x"), GeneratorExit("x"), SystemExit(3), KeyboardInterrupt()]
)
def test_errors_that_end_loops_are_not_swallowed(error: BaseException) -> None:
    """A for loop over stream() would end without a word if it were handed a StopIteration."""
    with make_llm() as llm:
        armed = threading.Event()
        break_it(llm.engine, "forward", error, armed)
        callers = Callers(llm)
        armed.set()
        callers.join()
        for got in callers.got.values():
            assert got is error or (isinstance(got, EngineDead) and got.__cause__ is error)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("phase", PHASES)
def test_by_hand_the_error_is_raised_by_step(phase: str, overlap: bool) -> None:
    engine = Engine(FakeModel(num_blocks=1024), FakeTokenizer(), engine_config(overlap=overlap))
    armed, error = threading.Event(), ValueError("boom")
    break_it(engine, phase, error, armed)
    engine.add_request([4], FOREVER, "a")
    engine.step()
    armed.set()
    with pytest.raises(ValueError) as caught:
        engine.step()
    assert caught.value is error
    for call in (engine.step, lambda: engine.add_request([4])):
        with pytest.raises(EngineDead, match="boom") as dead:
            call()
        assert dead.value.__cause__ is error
    assert not engine.has_unfinished


def test_by_hand_in_several_threads() -> None:
    """Whoever waits for its turn to step when the engine dies gets that very error too."""
    error = ValueError("boom")
    model = FakeModel(num_blocks=1024, delay=0.05, fail_in="forward", fail_at=4, error=error)
    engine = Engine(model, TOKENIZER, engine_config())
    engine.add_request([4], FOREVER)
    got: list[BaseException] = []

    def work() -> None:
        try:
            while engine.has_unfinished:
                engine.step()
        except BaseException as caught:
            got.append(caught)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2)
    assert got == [error] * 3


def test_interruption_inside_commit_is_the_end() -> None:
    """A Ctrl-C cannot come there; whatever else raises there leaves lengths and texts apart."""
    engine = Engine(FakeModel(num_blocks=1024), FakeTokenizer(), engine_config())
    armed = threading.Event()
    armed.set()
    break_it(engine, "detokenise", KeyboardInterrupt(), armed)
    engine.add_request([4], GREEDY)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    with pytest.raises(EngineDead):
        engine.add_request([4])


def test_killed_loop_thread() -> None:
    """The thread is shot from outside, at whatever it is doing."""
    with make_llm() as llm:
        callers = Callers(llm)
        thread = llm.engine._thread
        assert thread is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        callers.join()
        assert all(isinstance(got, (SystemExit, EngineDead)) for got in callers.got.values())
        with pytest.raises(EngineDead):
            llm.generate([4])


def test_thread_that_vanished() -> None:
    """As after a fork: no error was set and nobody was told, but the thread is not there."""
    with make_llm() as llm:
        real = llm.engine._thread
        callers = Callers(llm)
        never_started = threading.Thread()
        llm.engine._thread = never_started
        callers.join()
        assert all(isinstance(got, EngineDead) for got in callers.got.values())
        llm.engine._thread = real


def test_close_while_callers_wait() -> None:
    model = FakeModel(num_blocks=4096, delay=0.002)
    llm = make_llm(model)
    callers = Callers(llm)
    llm.close()
    callers.join()
    assert all(isinstance(got, EngineClosed) for got in callers.got.values())
    assert model.closed
    for call in (lambda: llm.engine.add_request([4]), lambda: llm.generate([4]), llm.engine.step):
        with pytest.raises(EngineClosed):
            call()
    assert llm.engine.scheduler.blocks.num_used == 0
    llm.close()


def test_dropped_llm_ends_its_thread() -> None:
    model = FakeModel()
    llm = make_llm(model)
    llm.generate([5], GREEDY, use_tqdm=False)
    thread = llm.engine._thread
    assert thread is not None
    stream = llm.stream([5], GREEDY)
    del llm
    assert [o.finished for o in stream][-1]  # a stream that is being read keeps it
    assert thread.is_alive()
    del stream
    thread.join(2)
    assert not thread.is_alive()
    assert model.closed


def run_script(body: str, interrupt_after: str) -> str:
    """Run a script; send it SIGINT when it has printed `interrupt_after`; returns all it printed."""
    here = Path(__file__).parent
    prelude = """
        import sys, threading
        from fake_model import *
        from sharp.engine import Engine
        from sharp.llm import LLM
        from sharp.request import SamplingParams
        forever = SamplingParams(max_tokens=2000, ignore_eos=True)
        greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        def say(*words): print(*words, flush=True)
        def make():
            return LLM(FakeModel(num_blocks=4096, delay=0.005), tokenizer=FakeTokenizer(), block_size=4)
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(body)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PYTHONPATH": f"{here}:{here.parent}", "PATH": ""},
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.strip() == interrupt_after:
                time.sleep(0.15)
                process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0, "".join(lines)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    return "".join(lines)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    "call",
    [
        "llm.generate([[5], [6]] * 100, forever, use_tqdm=False)",
        "llm.generate([[5], [6]], forever)",
        "list(llm.stream([[5], [6]], forever))",
        "held = llm.stream([[5], [6]], forever); list(held)",
        "llm.chat([{'role': 'user', 'content': 'x'}], forever, use_tqdm=False)",
    ],
)
def test_ctrl_c_ends_the_callers_requests_only(call: str) -> None:
    output = run_script(
        f"""
        llm = make()
        other = []
        thread = threading.Thread(target=lambda: other.extend(llm.generate([9], use_tqdm=False,
            sampling_params=SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True))))
        thread.start()
        say("go")
        try:
            {call}
        except KeyboardInterrupt:
            say("interrupted")
        thread.join()
        say("other", len(other[0].outputs[0].token_ids), llm.engine.has_unfinished)
        say("again", list(llm.generate([7], greedy, use_tqdm=False)[0].outputs[0].token_ids))
        say("pages", llm.engine.scheduler.blocks.num_used)
        """,
        "go",
    )
    assert "interrupted" in output
    assert "other 120 False" in output
    assert f"again {expected([7], GREEDY)}" in output
    assert "pages 0" in output


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_ctrl_c_in_steps_by_hand(overlap: bool) -> None:
    """A hundred interruptions by a timer, at any point of the loop: nothing lost, answers as without them."""
    output = run_script(
        """
        import signal
        signal.signal(signal.SIGALRM, lambda *args: signal.raise_signal(signal.SIGINT))
        config = engine_config(max_num_batched_tokens=16, overlap=OVERLAP)
        engine = Engine(FakeModel(num_blocks=4096), FakeTokenizer(), config)
        wanted = {}
        long = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
        for n in range(8):
            wanted[engine.add_request([5 + n] * (1 + 4 * n), long)] = expected([5 + n] * (1 + 4 * n), long)
        last, count = {}, 0
        while engine.has_unfinished:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0003 + 0.0011 * (count % 17) / 17)
                outputs = engine.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                count += 1
                if count > 150:
                    signal.signal(signal.SIGALRM, signal.SIG_IGN)
                engine.scheduler.check()
                continue
            for o in outputs:
                if o.finished:
                    last[o.request_id] = list(o.outputs[0].token_ids)
        say("interruptions", count > 20, "equal", last == wanted, engine.scheduler.blocks.num_used)
        """.replace("OVERLAP", str(overlap)),
        "nothing",
    )
    assert "interruptions True equal True 0" in output, output


def test_outputs_of_an_interrupted_step_are_not_lost() -> None:
    """Ctrl-C while step() commits: the step counts, and the next step() returns its outputs."""
    engine = Engine(FakeModel(), TOKENIZER, engine_config())
    engine.add_request([4], SamplingParams(max_tokens=1, temperature=0.0), "a")
    original = engine.scheduler.commit

    def commit(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    engine.scheduler.commit = commit  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.has_unfinished
    (output,) = engine.step()
    assert isinstance(output, RequestOutput)
    assert output.finished
    assert not engine.has_unfinished
