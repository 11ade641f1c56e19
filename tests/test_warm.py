"""A process that begins with a full cache: from its start to every kernel in hand, without compiling one."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import no_simulator
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1.5  # seconds from the process's start, the interpreter's and numba's own loading included

FILL = """
import sys
from pathlib import Path
import toy_many
from kernels_numba import cubins
for kernel in toy_many.kernels():
    code = bytes(range(256)) * 240  # 60 KB, as a GEMM's cubin
    cubins.write_cubin(kernel.path("sm_90a", Path(sys.argv[1])), kernel.name, code)
"""
# Processor time, which counts from the process's start and does not depend on what else the machine does.
READ = """
import json, sys, time
from pathlib import Path
marks = [0.0, time.process_time()]
from kernels_numba import launch
marks.append(time.process_time())
import toy_many
kernels = list(toy_many.kernels())
found = [kernel.cubin("sm_90a", Path(sys.argv[1])) for kernel in kernels]
marks.append(time.process_time())
assert [entry for entry, _ in found] == [kernel.name for kernel in kernels]
print(json.dumps([launch.compiles, len(found), marks]))
"""
# The clock begins with the caller's, because a process cannot see when it was started.
LOAD = """
import json, sys, time
marks = [float(sys.argv[1]), time.time()]
from kernels_numba import launch
from kernels_numba.compiler import cuda
import toy_gemm
marks.append(time.time())
cuda.current_context()
marks.append(time.time())
kernels = list(toy_gemm.kernels())
for kernel in kernels:
    kernel.load()
marks.append(time.time())
print(json.dumps([launch.compiles, len(kernels), marks]))
"""


def run(code, *words, timeout=60):
    paths = [no_simulator.WITH_TESTS, os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return no_simulator.outcome(code, *words, timeout=timeout, PYTHONPATH=path).stdout


def best_of(count, code, *words):
    """(kernels compiled, kernels, seconds of each part) of the quickest of `count` fresh processes."""
    runs = []
    for _ in range(count):
        compiles, kernels, marks = json.loads(run(code, *words, str(time.time())))
        parts = [later - earlier for earlier, later in itertools.pairwise(marks)]
        runs.append((sum(parts), compiles, kernels, parts))
    return min(runs)


def test_reading_250_kernels_compiles_none(tmp_path):
    run(FILL, str(tmp_path))
    seconds, compiles, kernels, (start, imports, read) = best_of(3, READ, str(tmp_path))
    print(f"interpreter {start:.2f} s, imports {imports:.2f} s, reading {kernels} cubins {read:.2f} s")
    assert (compiles, kernels) == (0, 250)
    assert seconds < LIMIT


@pytest.mark.gpu
def test_every_gemm_kernel_is_loaded_warm(on_gpu, record_property):
    """On the user's own cache, which it fills first: from then on no kernel here needs a compiler."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    from kernels_numba.compiler import cuda

    if cuda.get_current_device().compute_capability[0] != 9:
        pytest.skip("needs compute capability 9.0")
    fill = "import toy_gemm\nfrom kernels_numba.prebuild import prebuild\nprint(prebuild([toy_gemm]))"
    print("cold:", run(fill, timeout=400).strip())
    seconds, compiles, kernels, (start, imports, context, load) = best_of(3, LOAD)
    print(
        f"warm: {seconds:.2f} s from the process's start: interpreter {start:.2f}, imports {imports:.2f}, "
        f"CUDA context {context:.2f}, reading and loading {kernels} kernels {load:.2f}"
    )
    record_property("warm_seconds", seconds)
    assert compiles == 0
    assert kernels > 50
    assert context + load < LIMIT
    assert seconds < 2 * LIMIT  # imports take their time on a machine that does other things, too
