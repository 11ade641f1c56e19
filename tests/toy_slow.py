"""For the tests of prebuild: kernels that take their time, and say in files who works on them."""

import os
import time
from pathlib import Path

from kernels_numba.launch import Kernel


def _make(index):
    Path(os.environ["TOY_SLOW"], f"{os.getpid()}").write_text(str(index))
    time.sleep(float(os.environ["TOY_SLOW_SECONDS"]))


def kernels():
    for index in range(4):
        yield Kernel(f"slow_{index}", lambda index=index: _make(index), (index,), "void(int32)", 32)
