"""Device arrays, arena and pinned pool where there is no GPU: strides against numpy's, the order of reuse,
and what becomes of errors. Addresses are those of numpy arrays, or made up; what a GPU does with them is in
test_memory_gpu.py."""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from queue import SimpleQueue

import numpy as np
import pytest
from engine_checks import TINY
from hypothesis import given
from hypothesis import strategies as st

from sharp import driver
from sharp.config import EngineConfig
from sharp.device import open_device
from sharp.engine import Engine
from sharp.layout import ALIGNMENT, aligned
from sharp.memory import Arena, ArenaFull, DeviceArray, PinnedPool, download_async, upload_async
from sharp.model import Model
from sharp.request import EngineDead, SamplingParams
from sharp.weights import open_checkpoint

DTYPES = [np.uint8, np.uint16, np.float32, np.uint64]


def twin(host):
    """A DeviceArray over a numpy array's bytes: whatever is done to both must stay the same bytes."""
    return DeviceArray(host.ctypes.data, host.shape, host.dtype, host.strides, host)


def assert_same(array, host):
    assert (array.shape, array.dtype, array.size, array.nbytes, array.ndim) == (
        host.shape, host.dtype, host.size, host.nbytes, host.ndim,
    )  # fmt: skip
    assert array.contiguous == host.flags.c_contiguous
    if host.size:  # numpy gives empty arrays any strides and addresses
        assert array.address == host.ctypes.data
        used = [axis for axis, length in enumerate(host.shape) if length > 1]
        assert [array.strides[axis] for axis in used] == [host.strides[axis] for axis in used]


@st.composite
def cuts(draw, shape):
    """An index of integers and slices for the first axes of `shape`."""
    index = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        if length and draw(st.booleans()):
            index.append(draw(st.integers(-length, length - 1)))
        else:
            ends = st.one_of(st.none(), st.integers(-length - 2, length + 2))
            index.append(slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1]))))
    return tuple(index)


@given(st.data())
def test_indexing_is_numpys(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4)))
    host = np.zeros(shape, data.draw(st.sampled_from(DTYPES)))
    array, owner = twin(host), host
    assert_same(array, host)
    for _ in range(3):
        index = data.draw(cuts(host.shape))
        host, array = host[(*index, ...)], array[index]  # the dots make numpy give a view of one element too
        assert_same(array, host)
        assert array.owner is owner
        if host.ndim:
            assert len(array) == len(host)


@given(st.data())
def test_reshape_and_view_are_numpys(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    host = np.zeros(shape, data.draw(st.sampled_from(DTYPES)))
    index = data.draw(cuts(host.shape))
    host, array = host[(*index, ...)], twin(host)[index]
    flat = data.draw(st.sampled_from([(-1,), (host.size,), (1, host.size), (2, -1), (host.size + 1,)]))
    kind = data.draw(st.sampled_from(DTYPES))
    for change in (lambda a: a.reshape(flat), lambda a: a.reshape(*flat), lambda a: a.view(kind)):
        try:
            expected = change(host)
            shares = np.shares_memory(expected, host) or not host.size
        except (ValueError, TypeError):
            shares = False
        if shares and host.flags.c_contiguous:
            if host.size:
                assert_same(change(array), expected)
        else:
            with pytest.raises(ValueError):
                change(array)


def test_what_indexing_refuses():
    array = DeviceArray(4096, (4, 6), np.float32)
    for index, error in (
        (4, IndexError), (-5, IndexError), ((0, 0, 0), IndexError), (slice(0, 4, 2), ValueError),
        (slice(None, None, -1), ValueError), (1.0, TypeError), (None, TypeError), (..., TypeError),
        ([1, 2], TypeError), (np.zeros(2, bool), TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            array[index]
    with pytest.raises(TypeError, match="device memory"):
        np.asarray(array)
    with pytest.raises(ValueError, match="negative"):
        DeviceArray(0, (-1, 2), np.float32)
    with pytest.raises(ValueError, match="strides"):
        DeviceArray(0, (3, 2), np.float32, (4,))
    with pytest.raises(TypeError):
        len(DeviceArray(0, (), np.float32))


def test_an_empty_view_at_the_end_stays_inside():
    array = DeviceArray(4096, (4, 6), np.float32)
    assert array[4:].address == array[:, 6:].address == 4096


def test_it_is_a_device_array_to_the_checks():
    from kernels_numba import checks, launch

    qkv = DeviceArray(1 << 20, (5, 12, 64), np.uint16)
    q = qkv[:, 4:8]
    checks.check("op", "q", q, checks.Device.elements("op", "q", q), (5, 4, 64), rows=1)
    checks.check_aligned("op", "q", q)
    assert launch.address(q) == (1 << 20) + 4 * 64 * 2
    with pytest.raises(ValueError, match="strides"):
        checks.check("op", "q", q, (np.dtype(np.uint16),), (5, 4, 64))
    with pytest.raises(ValueError, match="address"):
        checks.check_aligned("op", "q", DeviceArray(4097, (3,), np.uint8))


# The arena -----------------------------------------------------------------------------------------


class Block:
    def __init__(self, num_bytes):
        self.num_bytes, self.address, self.freed = num_bytes, 7 * ALIGNMENT, 0

    def free(self):
        self.freed += 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=3)), max_size=12))
def test_an_arena_hands_out_every_byte_once(takes):
    blocks = []
    arena = Arena(20_000, lambda n: blocks.append(Block(n)) or blocks[-1])
    taken = []
    for term, shape in takes:
        array = arena.take(term, shape, np.float32)
        taken.append((array.address, max(array.nbytes, 1)))
        assert array.address % ALIGNMENT == 0
        assert array.owner is blocks[0]
        assert sum(arena.terms.values()) + arena.left == arena.num_bytes == blocks[0].num_bytes
    for (at, size), (following, _) in itertools.pairwise(taken):
        assert at + size <= following
    end = blocks[0].address + blocks[0].num_bytes
    assert all(blocks[0].address <= at and at + size <= end for at, size in taken)


def test_an_arena_takes_what_was_planned_and_nothing_more():
    arena = Arena(aligned(4 * 100) + aligned(0), Block)
    arena.take("weights", (10, 10), np.float32)
    with pytest.raises(ArenaFull, match=r"logits: 512 bytes for float32\[65\], but 256 of the arena's 768"):
        arena.take("logits", (65,), np.float32)
    arena.take("logits", (0,), np.float32)
    assert arena.left == 0
    assert arena.terms == {"weights": 512, "logits": 256}
    block = arena._block
    arena.close()
    arena.close()
    assert block.freed == 1
    with pytest.raises(ValueError, match="closed"):
        arena.take("more", (1,), np.uint8)
    with pytest.raises(ValueError, match="-3 bytes"):
        Arena(-3, Block)


def test_views_keep_their_block():
    arena = Arena(1024, Block)
    view = arena.take("a", (8, 8), np.uint16)[2:, 1:]
    block = weakref.ref(arena._block)
    del arena
    gc.collect()
    assert block() is not None
    assert view.owner is block()
    del view
    gc.collect()
    assert block() is None


# Pinned memory -------------------------------------------------------------------------------------


class FakeEvent:
    """An event whose work happens when the test says so."""

    def __init__(self):
        self.done = True


class FakeStream:
    def record(self, event):
        event.done = False


def make_pool():
    return PinnedPool(lambda n, event: np.zeros(n, np.uint8), FakeEvent)


def test_a_buffer_comes_back_only_after_its_event():
    pool = make_pool()
    first = pool.take(5000)
    assert first.array.nbytes == 5000
    assert first.capacity == 8192
    assert pool.num_bytes == 2 * 8192
    FakeStream().record(first.event)
    first.release()
    second, third = pool.take(6000), pool.take(8192)
    assert (
        len({id(first), id(second), id(third)}) == 3
    )  # the first one's copy still runs, so there is a third
    second.release()
    assert pool.take(4097) is second
    first.event.done = True
    assert pool.take(8000) is first
    assert first.array.nbytes == 8000
    assert pool.num_bytes == 3 * 8192


def test_the_one_given_back_longest_ago_goes_first():
    pool = make_pool()
    a, b = pool.take(10), pool.take(10)
    b.release()
    a.release()
    assert pool.take(10) is b
    assert pool.take(10) is a


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "done"]), st.integers(0, 5)), max_size=60))
def test_nothing_in_use_is_handed_out(moves):
    pool, taken, flying = make_pool(), [], []
    for move, pick in moves:
        if move == "take":
            buffer = pool.take(1 << (11 + pick % 3))
            assert buffer.event.done
            assert buffer not in taken
            assert buffer not in flying
            taken.append(buffer)
        elif move == "release" and taken:
            buffer = taken.pop(pick % len(taken))
            FakeStream().record(buffer.event)
            flying.append(buffer)
            buffer.release()
        elif move == "done" and flying:
            flying.pop(pick % len(flying)).event.done = True


def test_reserving_makes_two_and_closing_drops_all():
    pool = make_pool()
    pool.reserve(70_000)
    assert pool.num_bytes == 2 * 131072
    with pool.take(70_000) as buffer:
        memory = weakref.ref(buffer._memory)
    with pytest.raises(ValueError, match="nobody has taken"):
        buffer.release()
    del buffer
    pool.close()
    gc.collect()
    assert memory() is None
    assert pool.num_bytes == 0
    with pytest.raises(ValueError, match="closed"):
        pool.take(1)
    with pytest.raises(ValueError, match="0 bytes"):
        make_pool().take(0)


def test_pageable_memory_and_wrong_sizes_are_refused():
    array, pool = DeviceArray(4096, (16,), np.float32), make_pool()
    buffer = pool.take(60)
    with pytest.raises(TypeError, match="source is a ndarray"):
        upload_async(array, np.zeros(16, np.float32), FakeStream())
    with pytest.raises(TypeError, match="target is a bytearray"):
        download_async(bytearray(64), array, FakeStream())
    with pytest.raises(ValueError, match=r"64 bytes at offset 0 .* of 60"):
        upload_async(array, buffer, FakeStream())
    with pytest.raises(ValueError, match="68 bytes of a DeviceArray of 64"):
        upload_async(array, buffer, FakeStream(), num_bytes=68)
    with pytest.raises(ValueError, match="-4 bytes of a DeviceArray of 64"):
        download_async(buffer, array, FakeStream(), num_bytes=-4)
    with pytest.raises(ValueError, match="offset -4"):
        download_async(buffer, array[:8], FakeStream(), offset=-4)
    with pytest.raises(ValueError, match="strides"):
        upload_async(DeviceArray(4096, (2, 2), np.uint8, (8, 1)), buffer, FakeStream())
    buffer.release()
    with pytest.raises(ValueError, match="released"):
        upload_async(array[:4], buffer, FakeStream())


# Errors --------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch):
    """A process whose CUDA is well before and after, whatever a test says of it."""
    for name in ("_poison", "_started", "_forked"):
        monkeypatch.setattr(driver, name, getattr(driver, name))


def results():
    pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
    from cuda.bindings.driver import CUresult

    return CUresult


def test_check_gives_values_and_names_errors(healthy):
    codes = results()
    assert driver.check((codes.CUDA_SUCCESS,), "x") is None
    assert driver.check((codes.CUDA_SUCCESS, 7), "x") == 7
    assert driver.check((codes.CUDA_SUCCESS, 7, 8), "x") == (7, 8)
    with pytest.raises(
        driver.CudaError, match="recording: the driver says CUDA_ERROR_INVALID_HANDLE"
    ) as found:
        driver.check((codes.CUDA_ERROR_INVALID_HANDLE,), "recording")
    assert not found.value.sticky
    assert driver.poisoned() is None
    with pytest.raises(MemoryError, match="5 bytes"):
        driver.check((codes.CUDA_ERROR_OUT_OF_MEMORY, 0), "5 bytes")


def test_every_sticky_name_exists(healthy):
    assert {code.name for code in results()} >= driver.STICKY


def test_a_sticky_error_is_remembered_once(healthy):
    codes = results()
    with pytest.raises(driver.CudaError, match="restart the kernel"):
        driver.check((codes.CUDA_ERROR_ILLEGAL_ADDRESS,), "first")
    with pytest.raises(driver.CudaError):
        driver.check((codes.CUDA_ERROR_LAUNCH_FAILED,), "second")
    assert driver.poisoned() == (
        "first: the driver says CUDA_ERROR_ILLEGAL_ADDRESS. CUDA is unusable in this process from here on: "
        "restart the kernel (or the process)"
    )


def test_during_says_what_ran(healthy):
    """The words are those of kernels_numba/launch.py and of numba; neither is ours to change."""
    with (
        pytest.raises(
            driver.CudaError, match=r"gemm with 4 blocks, during step 7: .*_ILLEGAL_ADDRESS"
        ) as found,
        driver.during("step 7"),
    ):
        raise RuntimeError("launching gemm with 4 blocks: the driver says CUDA_ERROR_ILLEGAL_ADDRESS")
    assert found.value.sticky
    assert "during step 7" in str(driver.poisoned())
    driver._poison = None
    with pytest.raises(driver.CudaError), driver.during("step 7b"):
        driver.check((results().CUDA_ERROR_ASSERT,), "waiting")  # remembered by check, then with its step
    with pytest.raises(driver.CudaError, match=r"waiting, during step 7b: the driver says CUDA_ERROR_ASSERT"):
        driver.refuse_if_lost()
    with pytest.raises(driver.CudaError, match="during step 8") as found, driver.during("step 8"):
        raise driver.CudaError("a copy", "CUDA_ERROR_INVALID_VALUE")
    assert not found.value.sticky
    with pytest.raises(driver.CudaOutOfMemory), driver.during("step 9"):
        raise OSError("[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(ZeroDivisionError), driver.during("step 10"):
        raise ZeroDivisionError


def test_the_default_stream_is_refused():
    class Numbas:
        handle = 12

    assert driver.handle_of(Numbas()) == driver.handle_of(12) == 12
    for stream in (0, None):
        with pytest.raises(ValueError, match="default stream"):
            driver.handle_of(stream)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("started", [False, True])
def test_a_forked_child_gets_a_clear_error(healthy, monkeypatch, started):
    monkeypatch.setattr(driver, "_started", started)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            words = b"forked" if driver._forked else b"fresh"
            if driver._forked:
                driver.bind()
        except driver.ForkedError as error:
            words = str(error).encode()
        finally:
            os.write(write, words)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        words = answer.read().decode()
    os.waitpid(child, 0)
    assert ("spawn" in words) if started else (words == "fresh")
    assert not driver._forked


def test_a_lost_cuda_ends_every_engine_that_uses_it(healthy):
    """Through whichever engine it was lost; those of the host go on."""
    config = EngineConfig(device="cpu", num_blocks=8)
    models = [Model(open_checkpoint(TINY), config, open_device("cpu", "float32")) for _ in range(3)]
    engines = [Engine(model, model.tokenizer, config) for model in models]
    for model in models[:2]:
        model.device.kind = "cuda"
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for engine in engines:
        engine.add_request([5, 9, 17], params)
    heard = SimpleQueue()
    engines[1].submit(engines[1].make_request([7], params), heard)
    with pytest.raises(driver.CudaError), driver.during("step 3"):
        raise RuntimeError("launching gemm with 4 blocks: the driver says CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(EngineDead, match=r"gemm with 4 blocks, during step 3: .* restart the kernel"):
        engines[0].step()
    with pytest.raises(EngineDead, match="restart the kernel"):
        engines[1].add_request([1, 2])
    assert isinstance(heard.get(timeout=1), driver.CudaError)
    assert heard.empty()
    assert not engines[0].alive
    while engines[2].has_unfinished:
        engines[2].step()
    for engine in engines:
        engine.close()


def test_errors_of_a_step_say_which(healthy):
    config = EngineConfig(device="cpu", num_blocks=8)
    model = Model(open_checkpoint(TINY), config, open_device("cpu", "float32"))
    engine = Engine(model, model.tokenizer, config)

    def launch(*args, **options):
        raise RuntimeError("launching silu with 3 blocks: the driver says CUDA_ERROR_INVALID_VALUE")

    model.ops.gemm_silu_mul = launch
    engine.add_request([5, 9, 17], SamplingParams(max_tokens=2))
    batch = model.stage(engine.scheduler.plan())
    words = r"silu with 3 blocks, during step 1 \(3 tokens of 1 requests\)"
    with pytest.raises(driver.CudaError, match=words):
        model.forward(batch)
    assert driver.poisoned() is None
