"""Compile many kernels at once, before they are needed: a process for each core, a bar that names what is
being compiled, and nothing at all where the cache has everything.

An op's module that has kernels for launch.py offers `kernels() -> Iterator[launch.Kernel]`: every one that
its heuristic can pick, in the same order each time (a worker is told a place in that order, because a Kernel
holds a closure and cannot travel). Knows: which kernels the cache lacks, how to share them out. Refuses to
know: what a kernel is for.

Workers are plain child processes that talk in lines of JSON, not multiprocessing's, which would import the
caller's main module again in each of them: a script that makes an engine without a main guard would start
itself over. `python -m kernels_numba.prebuild ARCH [DIRECTORY]` is such a worker.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels_numba import compiler, cubins
from kernels_numba.launch import Kernel, arch_of


@dataclass(frozen=True)
class Task:
    """The index-th kernel of module.kernels(), and the name it has there."""

    module: str
    index: int
    name: str


@dataclass(frozen=True)
class Built:
    """What prebuild did for a target: kernels that the cache had, names of those compiled, name -> error of
    those that could not be; kept: "" or why nothing was compiled, since nothing would be kept."""

    arch: str
    cached: int
    compiled: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    not_kept: str = ""

    def __str__(self) -> str:
        text = f"{self.arch}: {self.cached} kernels cached, {len(self.compiled)} compiled"
        text += f" in {self.seconds:.1f} s" if self.compiled else ""
        text += f", {len(self.failures)} failed" if self.failures else ""
        return text + (f"; {self.not_kept}" if self.not_kept else "")


def kernel_modules() -> list[str]:
    """Names of the op modules that offer kernels()."""
    import kernels_numba.ops as ops

    names = [found.name for found in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    return [name for name in names if hasattr(importlib.import_module(name), "kernels")]


def _kernels(module: str) -> list[Kernel]:
    offered = getattr(importlib.import_module(module), "kernels", None)
    if offered is None:
        raise ValueError(f"prebuild: {module} has no kernels()")
    return list(offered())


def fitting(modules: Iterable[str | ModuleType], arch: str) -> Iterator[tuple[Task, Kernel]]:
    """Every kernel of the modules that exists for `arch`. ValueError for a module without kernels()."""
    for module in modules:
        name = module if isinstance(module, str) else module.__name__
        for index, kernel in enumerate(_kernels(name)):
            if kernel.fits(arch):
                yield Task(name, index, kernel.name), kernel


def check_arch(arch: str | None) -> str:
    """A target as given, or the current GPU's; ValueError for no target, RuntimeError for no GPU."""
    if not compiler.AVAILABLE or compiler.SIMULATOR:
        reason = compiler.REASON or "numba's simulator is on (NUMBA_ENABLE_CUDASIM)"
        raise compiler.KernelsUnavailable(f"kernels cannot be compiled here: {reason}")
    if arch is None:
        if not compiler.cuda.is_available():
            raise RuntimeError("there is no GPU here to compile for: name a target, like sm_90a")
        return arch_of(tuple(compiler.cuda.get_current_device().compute_capability))
    if not re.fullmatch(r"sm_\d{2,3}a?", arch):
        raise ValueError(f"target is {arch!r}; a name like sm_86 or sm_90a is required")
    return arch


def prebuild(
    modules: Sequence[str | ModuleType] | None = None, arch: str | None = None, *,
    processes: int | None = None, progress: bool = True, directory: Path | None = None,
) -> Built:  # fmt: skip
    """Compile what the cache lacks of the modules' kernels (all of kernel_modules() by default).

    arch: like "sm_90a", the current GPU's by default; processes: as many as cores by default; progress: a bar
    on stderr; directory: another cache. A kernel that cannot be compiled is named in the result's failures
    and costs none of the others; a cache that cannot be written is left as it is, and each kernel will be
    compiled where it is first launched. ValueError for a wrong argument, KernelsUnavailable without a
    compiler. On an interrupt the workers are killed before it goes on.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"prebuild: processes is {processes}; at least 1 is required")
    arch, start = check_arch(arch), time.monotonic()
    missing: dict[Path, Task] = {}  # two modules may share a kernel
    found = set()
    for task, kernel in fitting(kernel_modules() if modules is None else modules, arch):
        path = kernel.path(arch, directory)
        if cubins.read_cubin(path) is None:
            missing[path] = task
        else:
            found.add(path)
    if not missing:
        return Built(arch, len(found))
    place = directory or cubins.cache_directory()
    if not cubins.writable(place):
        return Built(arch, len(found), not_kept=f"{place} cannot be written")
    if cubins.edited():
        why = "source files were edited since they were imported: start again"
        return Built(arch, len(found), not_kept=why)
    workers = Workers([arch, *([str(directory)] if directory else [])])
    count = min(processes or available_cores(), len(missing))
    failures = _share_out(list(missing.values()), workers, count, f"compiling for {arch}", progress)
    compiled = tuple(task.name for task in missing.values() if task.name not in failures)
    return Built(arch, len(found), compiled, failures, time.monotonic() - start)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_out(tasks: list[Task], workers: Workers, count: int, what: str, progress: bool) -> dict[str, str]:
    """{name: error} of the tasks that failed."""
    from tqdm.auto import tqdm

    failures = {}
    bar = tqdm(total=len(tasks), desc=what, unit="kernel", disable=not progress)
    with bar, ThreadPoolExecutor(count) as pool:
        waiting: dict[Future[str | None], Task] = {pool.submit(workers.compile, task): task for task in tasks}
        try:
            bar.set_postfix_str(tasks[0].name, refresh=True)
            for future in as_completed(list(waiting)):
                task, error = waiting.pop(future), future.result()
                if error is not None:
                    failures[task.name] = error
                # They are handed out in order, so the first that is not done is in work.
                bar.set_postfix_str(next((left.name for left in waiting.values()), task.name), refresh=False)
                bar.update()
        finally:
            for future in waiting:
                future.cancel()
            workers.stop()
    return failures


class Workers:
    """Compiling processes, one for each thread that asks; they end together."""

    def __init__(self, arguments: list[str]) -> None:
        self._command = [sys.executable, "-m", "kernels_numba.prebuild", *arguments]
        self._mine, self._lock = threading.local(), threading.Lock()
        self._all: list[subprocess.Popen[str]] = []
        self._stopped = False

    def _process(self) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopped:
                return None
            if getattr(self._mine, "process", None) is None:
                path = os.pathsep.join(part for part in sys.path if part)
                # In a session of its own: Ctrl-C at a terminal is for the caller, who then ends the workers.
                self._mine.process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
                )  # fmt: skip
                self._all.append(self._mine.process)
            process: subprocess.Popen[str] = self._mine.process
            return process

    def compile(self, task: Task) -> str | None:
        """None, or why there is no such kernel now. A worker that dies is replaced for the next task."""
        process = self._process()
        if process is None:
            return "not begun"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([task.module, task.index, task.name]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # its pipes are closed
            answer = ""
        if not answer:
            self._mine.process = None
            return f"its compiling process ended with status {process.wait()}"
        error: str | None = json.loads(answer)
        return error

    def stop(self) -> None:
        """End every worker at once: what it had in work is lost, what it had finished is kept."""
        with self._lock:
            self._stopped = True
        for process in self._all:
            process.kill()
        for process in self._all:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # a task that was being written
                    pipe.close()


def _work(arch: str, directory: Path | None, orders: Any, answers: Any) -> None:
    """Compile what the lines of `orders` name, one answer a line, until they end."""
    for line in orders:
        module, index, name = json.loads(line)
        error = None
        try:
            offered = _kernels(module)
            if index >= len(offered) or offered[index].name != name:
                raise RuntimeError(f"{module}.kernels() gives other kernels, or another order, each time")
            offered[index].cubin(arch, directory)
        except Exception as problem:  # whatever a compiler raises: its words go to the caller
            error = f"{type(problem).__name__}: {problem}"
        try:
            answers.write(json.dumps(error) + "\n")
            answers.flush()
        except BrokenPipeError:  # the caller is gone
            os._exit(1)


def main(arguments: list[str]) -> None:
    """A worker: what kernels print goes to stderr, answers to stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _work(arguments[0], Path(arguments[1]) if arguments[1:] else None, sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
