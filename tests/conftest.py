"""Options of the kernel tests and the choice of simulator or GPU, made before numba is imported anywhere.

--device=cpu (default): kernels run in numba's simulator, at toy sizes. --device=cuda: on a GPU, all sizes.
--rung op=name: which rung of an op is tested on the GPU (may repeat; "plain" by default).
--strict-tools: a missing compiler or assembler fails tests instead of skipping them.
--require-demo-model: a demo model that was not pulled fails tests instead of skipping them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharp")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where kernels run: simulator or GPU"
    )
    group.addoption("--rung", action="append", default=[], metavar="OP=NAME", help="test this rung of an op")
    group.addoption("--strict-tools", action="store_true", help="fail where compiler or ptxas is missing")
    group.addoption("--require-demo-model", action="store_true", help="fail where the demo model is missing")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        os.environ.pop("NUMBA_ENABLE_CUDASIM", None)
    else:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Where numba.cuda cannot be imported (a Mac), kernel tests are skipped, unless --strict-tools."""
    from kernels_numba.compiler import KernelsUnavailable

    try:
        return (yield)
    except KernelsUnavailable as error:
        if item.config.getoption("--strict-tools"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_gpu(request: pytest.FixtureRequest) -> bool:
    """True under --device=cuda; fails at once if there is no GPU then."""
    if request.config.getoption("--device") != "cuda":
        return False
    from kernels_numba import compiler

    if not compiler.AVAILABLE:
        pytest.fail(f"--device=cuda, but numba.cuda cannot be imported: {compiler.REASON}")
    if not compiler.cuda.is_available():
        pytest.fail("--device=cuda, but there is no usable CUDA device")
    return True


@pytest.fixture(scope="session")
def gpu_where(on_gpu: bool) -> Callable[[Callable[[tuple[int, int]], bool], str], Any]:
    """find(holds, needs) -> numba.cuda where the GPU's compute capability holds; elsewhere the test is
    skipped, with what it needs."""

    def find(holds: Callable[[tuple[int, int]], bool], needs: str) -> Any:
        if not on_gpu:
            pytest.skip("runs under --device=cuda only")
        from kernels_numba.compiler import cuda

        if not holds(tuple(cuda.get_current_device().compute_capability)):
            pytest.skip(f"needs compute capability {needs}")
        return cuda

    return find


@pytest.fixture
def rng(record_property: Callable[[str, object], None]) -> Any:
    """Other numbers in each run; the seed is in the output and in the report."""
    import numpy as np

    seed = int(np.random.SeedSequence().generate_state(1)[0])
    record_property("seed", seed)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def forced_rungs(request: pytest.FixtureRequest) -> dict[str, str]:
    """{op: rung} from --rung."""
    pairs = [text.partition("=") for text in request.config.getoption("--rung")]
    for op, equals, name in pairs:
        if not (op and equals and name):
            pytest.fail(f"--rung is {op + equals + name!r}; OP=NAME is required")
    return {op: name for op, _, name in pairs}


@pytest.fixture(scope="session")
def demo_model(request: pytest.FixtureRequest) -> Path:
    """Path of the pulled demo model; skips without it, fails without it under --require-demo-model."""
    from sharp.model_config import ModelFileError
    from sharp.pull import resolve

    try:
        return resolve("smollm2-135m-instruct")
    except ModelFileError as error:
        if request.config.getoption("--require-demo-model"):
            pytest.fail(str(error))
        pytest.skip(str(error))
