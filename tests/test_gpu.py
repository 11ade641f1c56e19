"""The kernel and engine tests on a real GPU, in groups that cannot hang the run: `python -m pytest -m gpu`.

Each group is a child `pytest ... --device=cuda` with a time limit. A kernel that hangs costs that limit: the
child's whole process group is killed, and the failure names the test that was running. --rung op=name is
passed on. With pytest-xdist (-n 8) children run side by side, but for those that measure time or the memory
of the whole device: they come last, one at a time, and nothing else runs then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import no_simulator
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60
LOCK = Path(tempfile.gettempdir()) / f"sharp-gpu-tests-{os.getuid()}.lock"
# numpy's references multiply small matrices: a pool of threads in each of many children costs far more than
# it gives.
BLAS = {f"{name}_NUM_THREADS": "2" for name in ("OPENBLAS", "OMP", "MKL")}
NODE = re.compile(r"^(\S+\.py::.+?)(?: +(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*)?$", re.MULTILINE)

OPS = ("embedding", "rms_norm", "gemm", "qk_norm", "rope", "store_kv", "silu_mul", "lm_head", "sample")
ATTENTION = ("prefill_attention", "decode_attention", "test_attention", "random_batches", "a_window")
HELPERS = ("philox", "bfloat16_helpers")
NAMED = (*OPS, *ATTENTION, *HELPERS)
NOT_REFERENCE = "not reference_matches_spec"  # numpy alone: the run without a GPU has them
# Of the names, the first that fits takes a test; what none takes is the last group, so nothing is left out.
GROUPS = {
    **{
        name: f"{name} and {NOT_REFERENCE}" + "".join(f" and not {other}" for other in NAMED[:i])
        for i, name in enumerate(NAMED)
    },
    "rest": f"{NOT_REFERENCE} and not ({' or '.join(NAMED)})",
}


@dataclass(frozen=True)
class GroupResult:
    """How a child ended. returncode: None if it was killed at the limit; running: the last test that it
    started."""

    returncode: int | None
    output: str
    running: str | None
    seconds: float


def run_group(arguments, limit_s, cwd=ROOT, environment=None):
    """Run `python -m pytest -v *arguments` in its own process group; kill the group after limit_s seconds."""
    start = time.monotonic()
    env = {**BLAS, **os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    env.pop("NUMBA_ENABLE_CUDASIM", None)
    env.pop("PYTEST_XDIST_WORKER", None)
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate(timeout=limit_s)
        returncode = child.returncode
    except subprocess.TimeoutExpired:
        returncode = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        try:
            output, _ = child.communicate(timeout=10)
        except subprocess.TimeoutExpired as error:  # stuck in the driver: even SIGKILL waits
            raw = error.output or b""
            output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    except BaseException:  # Ctrl-C here must not leave a child on the GPU
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        raise
    started = NODE.findall(output)
    return GroupResult(returncode, output, started[-1] if started else None, time.monotonic() - start)


@contextlib.contextmanager
def turn(alone, lock=LOCK):
    """Wait until no child of any pytest process runs (alone), or until none runs that must be alone."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def check_group(arguments, limit_s=LIMIT_S, alone=False, lock=LOCK, **options):
    """run_group in its turn, failing with the name of a hanging test, or with the end of a failing child's
    output. What it waits for others does not count."""
    with turn(alone, lock):
        result = run_group(arguments, limit_s, **options)
    end = result.output[-6000:]
    if result.returncode is None:
        pytest.fail(
            f"hung: killed after {limit_s} s in {result.running or 'no test (start-up)'}\n{end}",
            pytrace=False,
        )
    if result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.fail(f"no test was selected by {arguments}\n{end}", pytrace=False)
    if result.returncode:
        pytest.fail(f"child pytest ended with {result.returncode}\n{end}", pytrace=False)
    return result


@pytest.fixture
def rung_options(request):
    return [f"--rung={pair}" for pair in request.config.getoption("--rung")]


@pytest.mark.gpu
@pytest.mark.parametrize("group", list(GROUPS))
def test_ops_on_gpu(group, rung_options):
    check_group(["tests/test_ops.py", "--device=cuda", "-k", GROUPS[group], *rung_options])


@dataclass(frozen=True)
class Part:
    """Test files that run in children of their own, one for each word of `only` (pytest's -k; "" is all).

    limit_s: of each child, with no kernel compiled yet; alone: it measures time or the whole device's memory,
    so nothing may run beside it; marks: pytest's -m; rungs: --rung is passed on; show: what tests print is
    kept.
    """

    files: str
    limit_s: int = LIMIT_S
    only: tuple[str, ...] = ("",)
    alone: bool = False
    marks: str = "gpu"
    rungs: bool = False
    show: bool = False

    def arguments(self, word, rung_options):
        """Of the child for one word."""
        return [
            *paths(self.files), "--device=cuda", "-m", self.marks, *(["-k", word] if word else []),
            *(["-s"] if self.show else []), *(rung_options if self.rungs else []),
        ]  # fmt: skip


FLOAT64 = ("float64", "not float64")
BOTH_TYPES = ("against and bfloat16", "against and not bfloat16")
DECODE = (*BOTH_TYPES, "window or 100k", "random_batches or shared", "pauses", "mistakes or says_so")


def rest(words, without=""):
    """The words, and last what has none of them; `without`: words of tests that other parts have."""
    cut = f"not ({without})" if without else ""
    both = [f"({word}) and {cut}" if cut else word for word in words]
    return (*both, " and ".join([f"not ({' or '.join(words)})", *([cut] if cut else [])]))


PREFILL = (*BOTH_TYPES, "window", "chunks", "random_batches or 32k", "pauses or hang")
FEW = ("float64", "many_token", "fused and 64x", "fused and 128x", "pauses or chain or mutants")
MEMORY = "free_memory or comes_back or their_term"
PARTS = {
    "mixed_load": Part(
        "test_mixed_load", 180, ("reserve", "optimistic"), marks="gpu and not slow", show=True
    ),
    "histories": Part("test_preemption_model", 180, ("float32", "bfloat16", "demo"), rungs=True, show=True),
    "gemm_few": Part("test_gemm_few_gpu", 240, rest(FEW)),  # some sixty kernels, up to three seconds each
    "gemm": Part("test_gemm", 180, FLOAT64),  # some fifty kernels, a second or two each
    "gemm_silu_mul": Part("test_gemm_silu_mul", 240),  # some thirty kernels, up to three seconds each
    "gemm_residual": Part("test_gemm_residual", 240),  # some twenty kernels, up to three seconds each
    "gemm_mma": Part("test_gemm_mma_gpu", 240, FLOAT64),
    "gemm_rungs": Part("test_gemm_rungs test_gemv", 180),
    # A hundred kernels by numba's own compiler, a wait that times out.
    "ptx": Part("test_ptx_gpu", 150, ("wgmma", "not wgmma")),
    "decode_attention": Part("test_decode", 180, rest(DECODE)),
    "prefill_attention": Part("test_prefill test_prefill_clocks", 240, rest(PREFILL)),
    "prefill_mma": Part("test_prefill_mma", 240, ("against", "not against")),
    "warp_ops": Part("test_warp_ops", 180, FLOAT64),  # some forty kernels, a second or two each
    "engine": Part("test_engine_gpu", marks="gpu or not gpu", rungs=True),
    "families": Part("test_families_gpu", only=("llama", "mistral", "qwen2", "qwen3")),
    "gemm_ladder": Part("test_ladder", only=FLOAT64),
    "launcher": Part("test_launch test_launch_gpu"),
    "sampling": Part("test_sample_warp", 180, ("definition", "not definition")),
    "graphs": Part("test_graphs_gpu", 240, rest(("bits",), MEMORY), show=True),
    "graphs_memory": Part("test_graphs_gpu", 120, (MEMORY,), alone=True, show=True),
    "memory": Part("test_memory_gpu", 180, alone=True, show=True),
    "burst": Part("test_burst", 150, alone=True, rungs=True, show=True),
    "watch": Part("test_watch_gpu", 120, alone=True, show=True),
    "probe": Part("test_probe", 180, alone=True),
    "notebooks": Part("test_notebooks", 180, alone=True),
    "warm_start": Part("test_warm", 300, alone=True, show=True),
    "bench": Part("test_bench_gpu", 120, ("attention", "not attention"), alone=True),
}
# Who must be alone comes last: then nobody waits behind it.
IN_ORDER = sorted(PARTS, key=lambda name: PARTS[name].alone)
CHILDREN = {f"{name}-{i}": (name, word) for name in IN_ORDER for i, word in enumerate(PARTS[name].only)}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "word"), list(CHILDREN.values()), ids=list(CHILDREN))
def test_part_on_gpu(name, word, rung_options):
    part = PARTS[name]
    check_group(part.arguments(word, rung_options), limit_s=part.limit_s, alone=part.alone)


def test_no_file_of_gpu_tests_is_left_out():
    """Tests of a file that no child runs would be skipped under `-m gpu`, and nothing would say so."""
    taken = {file for part in PARTS.values() for file in part.files.split()} | {"test_ops", "test_gpu"}
    marked = {path.stem for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()}
    assert marked <= taken
    assert all((ROOT / "tests" / f"{file}.py").exists() for file in taken)


# The helper itself, on any machine.

QUICK = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
SLEEPER = """
import os, pathlib, subprocess, sys, time

def test_quick():
    pass

def test_sleeps():
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    pathlib.Path("pids").write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(120)

def test_never_reached():
    pass
"""


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a killed grandchild waits for whoever adopted it


def write(folder, text):
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_child.py").write_text(text)
    return "test_child.py"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the killed processes in /proc")
def test_a_hanging_group_is_killed_and_names_its_test(tmp_path):
    name = write(tmp_path, SLEEPER)
    with pytest.raises(pytest.fail.Exception) as failure:
        check_group([name], limit_s=2, cwd=tmp_path, environment=QUICK)
    assert re.match(r"hung: killed after 2 s in test_child.py::test_sleeps\b", str(failure.value))
    assert "test_quick PASSED" in str(failure.value)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if alive(pid)] == []


def test_a_failing_and_an_empty_group_fail(tmp_path):
    name = write(tmp_path, "def test_wrong():\n    assert 1 == 2\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)child pytest ended with 1.*assert 1 == 2"):
        check_group([name], limit_s=60, cwd=tmp_path, environment=QUICK)
    with pytest.raises(pytest.fail.Exception, match="no test was selected"):
        check_group([name, "-k", "nothing"], limit_s=60, cwd=tmp_path, environment=QUICK)


def test_a_passing_group_passes(tmp_path):
    name = write(tmp_path, "def test_right():\n    pass\n")
    result = check_group([name], limit_s=60, cwd=tmp_path, environment=QUICK)
    assert result.returncode == 0
    assert result.running == "test_child.py::test_right"


def test_who_must_be_alone_waits_for_all_others(tmp_path):
    """Ordinary children run together; one that must be alone begins when the last of them has ended, and the
    time until then is not its own."""
    name, lock, ended = write(tmp_path, "def test_right():\n    pass\n"), tmp_path / "lock", []

    def child():
        options = {"limit_s": 20, "lock": lock, "cwd": tmp_path, "environment": QUICK}
        ended.append((check_group([name], alone=True, **options), time.monotonic()))

    with turn(False, lock), turn(False, lock):
        waiting = threading.Thread(target=child)
        waiting.start()
        waiting.join(3)
        assert waiting.is_alive()
        over = time.monotonic()
    waiting.join(30)
    [(result, end)] = ended
    assert result.returncode == 0
    assert result.seconds < end - over + 0.1
    with turn(True, lock), lock.open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_children_have_few_threads_for_blas(tmp_path, monkeypatch):
    """Unless somebody chose."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    text = "import os\n\ndef test_it():\n    names = 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'\n"
    name = write(tmp_path, text + "    assert [os.environ[name] for name in names] == ['2', '7']\n")
    check_group([name], lock=tmp_path / "lock", cwd=tmp_path, environment=QUICK)


def test_parts_take_every_test_of_their_files_once():
    """The words of all parts that share files divide their GPU tests: none is left out, none runs twice."""
    files = sorted({part.files for part in PARTS.values()})
    children = [(PARTS[name].files, PARTS[name].marks, word) for name, word in CHILDREN.values()]
    whole = [(file, next(marks for f, marks, _ in children if f == file), "") for file in files]
    found = collected([[*paths(f), "-m", m, "-k", w] for f, m, w in [*whole, *children]])
    for file, wanted in zip(files, found, strict=False):
        parts = [nodes for (f, _, _), nodes in zip(children, found[len(files) :], strict=True) if f == file]
        assert wanted, file
        assert all(parts), (file, [len(nodes) for nodes in parts])
        assert sorted(node for nodes in parts for node in nodes) == sorted(wanted), file


def test_groups_take_every_kernel_test_once():
    """Each test of test_ops.py but the reference's own is in exactly one group."""
    wanted, *groups = collected([["tests/test_ops.py", "-k", w] for w in (NOT_REFERENCE, *GROUPS.values())])
    assert wanted
    members = [node for group in groups for node in group]
    assert sorted(members) == sorted(wanted)
    assert all(groups), [name for name, group in zip(GROUPS, groups, strict=True) if not group]


def paths(files):
    return [f"tests/{name}.py" for name in files.split()]


def collected(selections):
    """The set of tests that each list of pytest's arguments takes under --device=cuda."""
    command = [sys.executable, "-c", COLLECT, json.dumps(selections)]
    out = subprocess.run(
        command, cwd=ROOT, env=no_simulator.environment(), capture_output=True, text=True, timeout=240
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return [set(part.splitlines()) - {""} for part in out.stdout.split("---")[1:]]


COLLECT = """
import contextlib, io, json, sys, pytest

class Collector:
    def pytest_collection_finish(self, session):
        self.nodes = [item.nodeid for item in session.items]

for selection in json.loads(sys.argv[1]):
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        options = ["--device=cuda", "--collect-only", "-q", "-p", "no:cacheprovider", *selection]
        pytest.main(options, plugins=[collector])
    print("---")
    print("\\n".join(collector.nodes))
"""
