"""Many kernels compiled at once: what the cache lacks, by name, in processes that never outlive their caller.

Compiling happens in children: here, in the tests' own process, the simulator takes the compiler's place.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import no_simulator
import pytest

from kernels_numba import launch, prebuild
from kernels_numba.compiler import KernelsUnavailable

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def environment(**more):
    return no_simulator.environment(PYTHONPATH=no_simulator.WITH_TESTS, **more)


def child(code, timeout=120, **more):
    """Run code without the simulator: (what it printed as JSON in its last line, stderr)."""
    done = no_simulator.outcome(code, timeout=timeout, PYTHONPATH=no_simulator.WITH_TESTS, **more)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


CALL = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from kernels_numba import launch
from kernels_numba.prebuild import prebuild
results = []
for modules in {modules!r}:
    results.append(asdict(prebuild(modules, {arch!r}, processes={processes}, directory=Path({folder!r}))))
print(json.dumps([results, launch.compiles]))
"""


def call(folder, *modules, arch="sm_90a", processes=2):
    """prebuild of each list of modules in turn: (results, kernels compiled in that process, stderr)."""
    (results, compiles), shown = child(
        CALL.format(modules=list(modules), arch=arch, processes=processes, folder=str(folder))
    )
    return results, compiles, shown


def test_what_is_missing_is_compiled_and_only_that(tmp_path):
    [first], compiles, shown = call(tmp_path, ["toy_prebuild"])
    assert compiles == 0  # in other processes
    assert "compiling for sm_90a: 100%" in shown
    assert re.search(r"\d/4 .*, (times|times_3|reverse|hopper_only)\]", shown), shown
    assert first["cached"] == 0
    assert first["compiled"] == ["times", "times_3", "reverse", "hopper_only"]
    assert first["failures"] == {}
    assert first["seconds"] > 0
    [again], _, shown = call(tmp_path, ["toy_prebuild"])
    assert again == {**first, "cached": 4, "compiled": [], "seconds": 0}
    assert shown == ""  # no bar where there is nothing to do
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4

    torn, gone = (next(tmp_path.glob(f"{name}-sm_90a-*")) for name in ("reverse", "times_3"))
    torn.write_bytes(torn.read_bytes()[:-1])
    gone.unlink()
    [third], _, _ = call(tmp_path, ["toy_prebuild"])
    assert (third["cached"], third["compiled"]) == (2, ["times_3", "reverse"])
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_kernels_of_other_targets_are_left_out(tmp_path):
    [result], _, _ = call(tmp_path, ["toy_prebuild"], arch="sm_80")
    assert result["compiled"] == ["times", "times_3", "reverse"]


def test_a_failure_is_named_and_costs_no_other_kernel(tmp_path):
    [result, again], _, _ = call(tmp_path, ["toy_bad", "toy_prebuild"], ["toy_bad"], processes=1)
    assert result["compiled"] == ["first", "last", "times", "times_3", "reverse", "hopper_only"]
    assert set(result["failures"]) == {"refused", "deadly"}
    assert "TypingError" in result["failures"]["refused"]
    assert result["failures"]["deadly"] == "its compiling process ended with status 9"
    assert again["cached"] == 2


def test_two_processes_at_once_leave_whole_files(tmp_path):
    pytest.importorskip("numba")
    code = CALL.format(modules=[["toy_prebuild"]], arch="sm_90a", processes=1, folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment()) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    [result], _, _ = call(tmp_path, ["toy_prebuild"])
    assert (result["cached"], result["compiled"]) == (4, [])
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    [result], _, _ = call(blocked, ["toy_prebuild"])
    assert result["not_kept"] == f"{blocked} cannot be written"
    assert (result["compiled"], result["failures"]) == ([], {})


NO_GUARD = """
import sys
from pathlib import Path
from kernels_numba.prebuild import prebuild
print("begun")
built = prebuild(["toy_prebuild"], "sm_90a", directory=Path(sys.argv[1]), progress=False)
assert len(built.compiled) == 4, built
print(built)
"""


def test_a_script_without_a_main_guard_is_run_once(tmp_path):
    pytest.importorskip("numba")
    script = tmp_path / "script.py"
    script.write_text(NO_GUARD)
    command = [sys.executable, str(script), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begun") == 1
    assert "sm_90a: 0 kernels cached, 4 compiled in " in done.stdout
    assert done.stderr == ""


def ended(pid):
    """Gone, or a zombie that nobody has asked after yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif("not sys.platform.startswith('linux')", reason="looks into /proc")
@pytest.mark.parametrize(("kind", "seconds"), [(signal.SIGINT, 60), (signal.SIGKILL, 2)])
def test_no_worker_outlives_its_caller(tmp_path, kind, seconds):
    """After Ctrl-C none is left; after a kill of the caller alone they end with what they have in work."""
    pytest.importorskip("numba")
    seen = tmp_path / "seen"
    seen.mkdir()
    code = CALL.format(modules=[["toy_slow"]], arch="sm_90a", processes=2, folder=str(tmp_path / "cache"))
    settings = environment(TOY_SLOW=str(seen), TOY_SLOW_SECONDS=str(seconds))
    with (tmp_path / "shown").open("w+") as shown:
        caller = subprocess.Popen([sys.executable, "-c", code], env=settings, stderr=shown)
        try:
            wait_until(lambda: len(list(seen.iterdir())) == 2)
            workers = [int(path.name) for path in seen.iterdir()]
            caller.send_signal(kind)
            caller.wait(20)
        finally:
            caller.kill()
            caller.wait()
        if kind == signal.SIGKILL:
            wait_until(lambda: all(map(ended, workers)))
        assert all(map(ended, workers))
        shown.seek(0)
        words = shown.read()
    assert ("KeyboardInterrupt" in words) == (kind == signal.SIGINT)
    assert "BrokenPipe" not in words
    assert not list((tmp_path / "cache").glob("*.cubin"))


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


EDITED = """
import json, os
from pathlib import Path
import toy_prebuild
from kernels_numba import cubins, launch
from kernels_numba.prebuild import prebuild
kernel, folder = next(toy_prebuild.kernels()), Path({folder!r})
kernel.cubin("sm_90a", folder)
assert (launch.compiles, len(list(folder.iterdir()))) == (1, 1)
cubins.STAMPS[0] = ("as if this file had been edited since", 0, 0)
assert kernel.cubin("sm_90a", folder) and launch.compiles == 2
assert next(toy_prebuild.kernels()).cubin("sm_90a", folder) and launch.compiles == 3
print(json.dumps(str(prebuild(["toy_prebuild"], "sm_90a", directory=folder))))
"""


def test_after_an_edit_the_cache_is_neither_read_nor_written(tmp_path):
    shown, _ = child(EDITED.format(folder=str(tmp_path)))
    assert shown.endswith("source files were edited since they were imported: start again")
    assert len(list(tmp_path.iterdir())) == 1


def test_what_prebuild_refuses(monkeypatch):
    if launch.compiler.SIMULATOR:
        with pytest.raises(KernelsUnavailable, match="kernels cannot be compiled here: numba's simulator"):
            prebuild.prebuild(["toy_prebuild"], "sm_90a")
    monkeypatch.setattr(launch.compiler, "SIMULATOR", False)
    with pytest.raises(ValueError, match="processes is 0; at least 1"):
        prebuild.prebuild(["toy_prebuild"], "sm_90a", processes=0)
    with pytest.raises(ValueError, match="target is 'hopper'; a name like sm_86 or sm_90a is required"):
        prebuild.prebuild(["toy_prebuild"], "hopper")
    with pytest.raises(ValueError, match=r"toy_kernels has no kernels\(\)"):
        prebuild.prebuild(["toy_kernels"], "sm_90a")


def test_modules_with_kernels_are_found(monkeypatch):
    from kernels_numba.ops import silu_mul

    assert silu_mul.__name__ not in prebuild.kernel_modules()
    monkeypatch.setattr(silu_mul, "kernels", lambda: iter(()), raising=False)
    assert silu_mul.__name__ in prebuild.kernel_modules()
