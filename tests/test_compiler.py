"""compiler.py where there is no compiler: everything imports, the reference works, and a kernel says what is
missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import no_simulator
import numpy as np
import pytest

from kernels_numba import compiler

ROOT = Path(__file__).resolve().parent.parent

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED_NAMES or name.startswith(tuple(n + "." for n in BLOCKED_NAMES)):
            raise ImportError(f"{name} is blocked")

BLOCKED_NAMES = {names!r}
sys.meta_path.insert(0, Blocker())
import numpy as np
from kernels_numba import compiler
from kernels_numba.ops import OPS, resolve
assert not compiler.AVAILABLE and not compiler.SIMULATOR and "blocked" in compiler.REASON, compiler.REASON
ops = resolve("reference")
resolve("plain")
x, weight, out = np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), np.empty((2, 4), np.float32)
ops.gemm(out, x, weight)
assert (out == 3).all()

class DeviceArray(np.ndarray):
    __cuda_ndarray__ = True

for make in (lambda: compiler.jit()(print), lambda: compiler.cuda.to_device(x), lambda:
compiler.element("float32"),
             lambda: OPS["gemm"].gemm(*(a.view(DeviceArray) for a in (out, x, weight)))):
    try:
        make()
    except compiler.KernelsUnavailable as error:
        assert "numba.cuda cannot be imported here" in str(error) and "blocked" in str(error), error
    else:
        raise AssertionError("no error")
print("fine")
"""


@pytest.mark.parametrize(
    "names", [["numba"], ["numba.cuda"], ["cuda"], ["numba_cuda", "numba", "cuda", "llvmlite"]]
)
def test_everything_imports_where_numba_cuda_cannot(names):
    code = BLOCKED.replace("{names!r}", repr(names))
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=no_simulator.environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout == "fine\n", result.stderr


def test_element_and_names():
    assert compiler.element("bfloat16").storage == np.uint16
    assert compiler.element("float32") is compiler.element("float32")
    with pytest.raises(ValueError, match=r"dtype is 'int8'; kernels know float32, bfloat16"):
        compiler.element("int8")
    assert compiler.element_name(np.zeros(1, np.uint16)) == "bfloat16"
    with pytest.raises(ValueError, match="device array has dtype float64"):
        compiler.element_name(np.zeros(1))


def test_kernels_import_nothing_of_the_engine():
    """The layers' arrow: kernels_numba never imports sharp."""
    code = "import sys; from kernels_numba.ops import resolve; resolve('plain'); assert not [m for m in sys.modules if m.split('.')[0] == 'sharp']"  # noqa: E501
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
