"""The kernel and engine tests on a real GPU, in groups that cannot hang the run: `python -m pytest -m gpu`.

Each group is a child `pytest ... --device=cuda` with a time limit. A kernel that hangs costs that limit: the
child's whole process group is killed, and the failure names the test that was running. --rung op=name is
passed on.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import no_simulator
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 60
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
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
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


def check_group(arguments, limit_s=LIMIT_S, **options):
    """run_group, failing with the name of a hanging test, or with the end of a failing child's output."""
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

    limit_s: of each child, with no kernel compiled yet; marks: pytest's -m; rungs: --rung is passed on; show:
    what tests print is kept.
    """

    files: str
    limit_s: int = LIMIT_S
    only: tuple[str, ...] = ("",)
    marks: str = "gpu"
    rungs: bool = False
    show: bool = False

    def arguments(self, word, rung_options):
        """Of the child for one word."""
        paths = [f"tests/{name}.py" for name in self.files.split()]
        return [
            *paths, "--device=cuda", "-m", self.marks, *(["-k", word] if word else []),
            *(["-s"] if self.show else []), *(rung_options if self.rungs else []),
        ]  # fmt: skip


FLOAT64 = ("float64", "not float64")
DECODE = ("against", "window or 100k", "random_batches or shared", "pauses")
PARTS = {
    "probe": Part("test_probe", 180),
    "histories": Part("test_preemption_model", 180, rungs=True, show=True),
    "burst": Part("test_burst", 150, rungs=True, show=True),
    "mixed_load": Part("test_mixed_load", 300, marks="gpu and not slow", show=True),
    "watch": Part("test_watch_gpu", 120, show=True),
    "engine": Part("test_engine_gpu", marks="gpu or not gpu", rungs=True),
    "memory": Part("test_memory_gpu", 180, show=True),
    "families": Part("test_families_gpu", only=("llama", "mistral", "qwen2", "qwen3")),
    "gemm": Part("test_gemm", 180, FLOAT64),  # some fifty kernels, a second or two each
    "gemm_ladder": Part("test_ladder", only=FLOAT64),
    "gemm_few": Part("test_gemm_few_gpu", 240, FLOAT64),  # some sixty kernels, up to three seconds each
    "gemm_mma": Part("test_gemm_mma_gpu", 240, FLOAT64),
    "ptx": Part("test_ptx_gpu", 150),  # a hundred kernels by numba's own compiler, a wait that times out
    "launcher": Part("test_launch test_launch_gpu"),
    "decode_attention": Part("test_decode", 180, (*DECODE, f"not ({' or '.join(DECODE)})")),
    "prefill_attention": Part("test_prefill", 240, ("against", "not against")),
    "prefill_mma": Part("test_prefill_mma", 240, ("against", "not against")),
    "warp_ops": Part("test_warp_ops", 180, FLOAT64),  # some forty kernels, a second or two each
    "sampling": Part("test_sample_warp", 180, ("definition", "not definition")),
    "graphs": Part("test_graphs_gpu", 240, ("bits", "not bits"), show=True),
    "warm_start": Part("test_warm", 300, show=True),
    "bench": Part("test_bench_gpu", 120, ("attention", "not attention")),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "word"), [(name, word) for name in PARTS for word in PARTS[name].only])
def test_part_on_gpu(name, word, rung_options):
    check_group(PARTS[name].arguments(word, rung_options), limit_s=PARTS[name].limit_s)


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


def test_groups_take_every_kernel_test_once():
    """Each test of test_ops.py but the reference's own is in exactly one group."""
    arguments = ["tests/test_ops.py", "--device=cuda", "--collect-only", "-q", "-p", "no:cacheprovider"]

    def collected(*selection):
        env = no_simulator.environment()
        command = [sys.executable, "-c", COLLECT, *arguments, *selection]
        out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert out.returncode == 0, out.stdout + out.stderr
        return out.stdout.split("---")[1:]

    wanted, *groups = (set(part.splitlines()) - {""} for part in collected(*GROUPS.values()))
    assert wanted
    members = [node for group in groups for node in group]
    assert sorted(members) == sorted(wanted)
    assert all(groups), [name for name, group in zip(GROUPS, groups, strict=True) if not group]


COLLECT = f"""
import contextlib, io, sys, pytest

class Collector:
    def pytest_collection_finish(self, session):
        self.nodes = [item.nodeid for item in session.items]

split = sys.argv.index("no:cacheprovider") + 1
for selection in [{NOT_REFERENCE!r}, *sys.argv[split:]]:
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*sys.argv[1:split], "-k", selection], plugins=[collector])
    print("---")
    print("\\n".join(collector.nodes))
"""
