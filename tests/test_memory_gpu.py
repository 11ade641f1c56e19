"""Memory, streams and copies on a GPU; run by test_gpu.py in a child with a time limit and with the GPU to
itself (`python -m pytest -m gpu`)."""

from __future__ import annotations

import gc
import time

import ml_dtypes
import no_simulator
import numpy as np
import pytest
import toy_kernels
from engine_checks import TINY
from model_files import change_tensors, copy_tiny

from sharp import driver
from sharp.bench_startup import write_weights
from sharp.config import EngineConfig
from sharp.cuda_device import CudaDevice
from sharp.engine import Engine
from sharp.layout import ALIGNMENT
from sharp.memory import Arena, PinnedPool, device_array, download_async, upload_async
from sharp.model import Model
from sharp.random_model import RandomCheckpoint
from sharp.request import SamplingParams
from sharp.weight_stream import stream_weights
from sharp.weights import load_weights, open_checkpoint

pytestmark = pytest.mark.gpu

SPIN_ROUNDS = 10_000_000  # of spin_kernel: tens of milliseconds
SLACK_BYTES = 4 << 20  # the driver gives memory in pieces of 2 MiB, and tensor maps stay cached


@pytest.fixture(autouse=True)
def only_in_the_child(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")


@pytest.fixture
def device():
    device = CudaDevice("float32")
    yield device
    device.close()


def spin(stream, out, rounds=SPIN_ROUNDS):
    """Keep a stream busy for a while."""
    toy_kernels.spin_kernel().prepare(1, (out.address, rounds))(stream)


def test_an_arena_is_filled_where_it_was_taken(device):
    with device.arena(64 << 20) as arena:
        sizes = ((1000, np.float32), (7, np.uint16), (0, np.int32), (5, np.uint64))
        arrays = [device.empty((n, 3), kind, term=f"{n}") for n, kind in sizes]
    assert all(array.address % ALIGNMENT == 0 for array in arrays)
    for array in arrays:
        device.fill(array, 0xFF)
    device.fill(arrays[1], 0)
    assert np.isnan(device.download(arrays[0])).all()
    assert (device.download(arrays[1]) == 0).all()
    assert (device.download(arrays[3]) == np.uint64(2**64 - 1)).all()
    before = device.free_bytes()
    arena.close()
    assert device.free_bytes() >= before + (64 << 20)


def test_numbas_kernels_take_device_arrays(device):
    """Contiguous, cut on the outer and on an inner axis, and an empty one beside them."""
    from kernels_numba.compiler import cuda

    @cuda.jit
    def double(out, x, none):
        i, j = cuda.grid(2)
        if i < x.shape[0] and j < x.shape[1]:
            out[i, j] = 2 * x[i, j] + none.shape[0]

    values = np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32)
    x, out = device.upload(values), device.upload(np.zeros_like(values))
    none = device.empty((0,), np.int32)
    for cut in (np.s_[:, :], np.s_[3:40], np.s_[5:, 7:33]):
        host = np.zeros_like(values)
        device.fill(out, 0)
        double[(8, 8), (8, 8), device.stream](out[cut], x[cut], none)
        host[cut] = 2 * values[cut]
        assert (device.download(out) == host).all()


def test_launches_take_their_addresses(device):
    x, out = device.upload(np.arange(1000, dtype=np.int32)), device.upload(np.full(1100, -7, np.int32))
    toy_kernels.times_kernel().prepare(8, (out.address, x[10:].address, 900))(device.stream)
    got = device.download(out)
    assert (got[:900] == 2 * np.arange(10, 910)).all()
    assert (got[900:] == -7).all()


def test_what_goes_up_comes_down(device):
    for size in (1, 4097, (8 << 20) + 5, (40 << 20) + 3):
        values = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
        assert (device.download(device.upload(values)) == values).all()


def test_a_pinned_buffer_comes_back_after_its_copy(device):
    pool, target = PinnedPool(), device_array((1 << 20,), np.uint8, "target")
    out = device.empty((1,), np.int32)
    spin(device.stream, out)
    first = pool.take(1 << 20)
    first.array[:] = 3
    upload_async(target, first, device.compute_stream)
    first.release()
    assert not first.event.done
    others = [pool.take(1 << 20) for _ in range(3)]
    assert first not in others
    first.event.synchronize()
    assert pool.take(1 << 20) is first
    back = others[0]
    download_async(back, target, device.compute_stream)
    back.event.synchronize()
    assert (back.array == 3).all()
    pool.close()


def test_staging_waits_for_nothing_and_mixes_nothing_up(device):
    """Each step's indices are copied on the device, behind a kernel that keeps the stream busy."""
    device.reserve_staging(1 << 16)
    out = device.empty((1,), np.int32)
    device.stage({"a": np.zeros(9000, np.int32)})
    spin(device.stream, out, 10)
    device.synchronize()
    kept = [device.empty((9000,), np.int32) for _ in range(6)]
    for buffer in [device.pool.take(1 << 16) for _ in kept]:  # all that can be in flight: none is made below
        buffer.release()
    slowest = 0.0
    for step, copy in enumerate(kept):
        start = time.perf_counter()
        staged = device.stage({"pad": np.zeros(step, np.int32), "a": np.full(9000, step, np.int32)})["a"]
        slowest = max(slowest, time.perf_counter() - start)
        spin(device.stream, out)
        driver.copy_on_device(copy.address, staged.address, copy.nbytes, device.compute_stream)
    start = time.perf_counter()
    device.synchronize()
    busy = time.perf_counter() - start
    print(f"staging at most {slowest * 1e6:.0f} us, the device busy for {busy * 1e3:.0f} ms after it")
    assert slowest < 0.2 * busy
    for step, copy in enumerate(kept):
        assert (device.download(copy) == step).all()


def test_copies_run_beside_kernels(device):
    """Intervals from events: both streams start behind one event, and the shorter one lies in the longer."""
    out, target = device.empty((1,), np.int32), device.empty((64 << 20,), np.uint8)
    spin(device.stream, out, 10)
    with device.pool.take(64 << 20) as buffer:
        buffer.array[:] = 1
        upload_async(target, buffer, device.copy_stream)
        device.synchronize()
        go, ends = driver.Event(timing=True), [driver.Event(timing=True) for _ in range(4)]
        device.compute_stream.record(go)
        device.copy_stream.wait(go)
        device.compute_stream.record(ends[0])
        spin(device.stream, out)
        device.compute_stream.record(ends[1])
        device.copy_stream.record(ends[2])
        for _ in range(4):
            upload_async(target, buffer, device.copy_stream)
        device.copy_stream.record(ends[3])
        device.synchronize()
    times = [go.elapsed_ms(event) for event in ends]
    print("kernel {:.2f} to {:.2f} ms, copies {:.2f} to {:.2f} ms".format(*times))
    both = min(times[1], times[3]) - max(times[0], times[2])
    assert both > 0.5 * min(times[1] - times[0], times[3] - times[2])


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_weights_have_the_hosts_bits(tmp_path, stored, dtype):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(stored)

    checkpoint = open_checkpoint(change_tensors(copy_tiny(tmp_path / "m"), change))
    config = EngineConfig(device="cuda", dtype=dtype, num_blocks=8)
    model = Model(checkpoint, config, CudaDevice(dtype))
    assert model.arena.left == 0
    assert model.arena.terms["weights"] == model.budget.weights
    expected = load_weights(
        checkpoint, lambda a: a if dtype == "float32" else a.astype(ml_dtypes.bfloat16), progress=False
    )

    def same(there, here):
        return model.device.download(there).tobytes() == here.tobytes()

    assert same(model.weights.embed, expected.embed)
    assert same(model.weights.lm_head, expected.lm_head)
    for layer, wanted in zip(model.weights.layers, expected.layers, strict=True):
        for field, array in vars(wanted).items():
            assert array is None or same(getattr(layer, field), array), field
    model.close()


def test_weights_stream_at_four_fifths_of_the_bus(tmp_path):
    """From files that the operating system holds in memory into an engine's one allocation, beside what one
    copy after another from pinned memory takes; both the quickest of three."""
    write_weights(RandomCheckpoint("llama-3.2-1b"), tmp_path)
    checkpoint, device = open_checkpoint(tmp_path), CudaDevice("bfloat16")
    total, pieces = 2 * checkpoint.config.num_parameters, 16
    room, streamed, copied = total + (1 << 20), [], []  # each array starts on a multiple of 256 bytes
    for _ in range(3):
        with device.arena(room) as arena:
            start = time.perf_counter()
            stream_weights(checkpoint, device, progress=False)
            streamed.append(total / (time.perf_counter() - start))
        assert total <= arena.terms["weights"] <= room
        arena.close()
    target = device.empty((64 << 20,), np.uint8)
    with device.pool.take(64 << 20) as buffer:
        buffer.array[:] = 1
        for _ in range(3):
            device.synchronize()
            start = time.perf_counter()
            for _ in range(pieces):
                upload_async(target, buffer, device.copy_stream)
            device.synchronize()
            copied.append(pieces * buffer.array.nbytes / (time.perf_counter() - start))
    device.close()
    print(f"weights {max(streamed) / 1e9:.1f} GB/s, the bus {max(copied) / 1e9:.1f} GB/s")
    assert max(streamed) >= 0.8 * max(copied)


def test_fifty_engines_leave_nothing():
    """Closed or only forgotten, after a step: free memory is back where it was, and does not creep."""
    config = EngineConfig(device="cuda", num_blocks=64)
    free, probe = [], CudaDevice("bfloat16")
    for number in range(52):
        model = Model(open_checkpoint(TINY), config, CudaDevice("bfloat16"))
        engine = Engine(model, model.tokenizer, config)
        engine.add_request([5, 9, 17], SamplingParams(max_tokens=3, ignore_eos=True))
        while engine.has_unfinished:
            engine.step()
        if number % 2:
            engine.close()
        del model, engine
        gc.collect()
        free.append(probe.free_bytes())
    print(f"free after the second {free[1]:,}, least after {min(free[2:]):,}")
    assert min(free[2:]) >= free[1] - SLACK_BYTES  # the first ones load kernels
    probe.close()


STICKY = """
import gc, sys
sys.path.insert(0, "tests")
import toy_kernels
from engine_checks import TINY
from sharp import driver
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.hf_dir import HFDirectory
from sharp.model import Model
from sharp.random_model import RandomCheckpoint
from sharp.request import EngineDead, SamplingParams
from queue import SimpleQueue

config = EngineConfig(device="cuda", num_blocks=16)
models = [Model.load(TINY, config) for _ in range(2)]
engines = [Engine(model, model.tokenizer, config) for model in models]
params = SamplingParams(max_tokens=3, ignore_eos=True)
waiting = SimpleQueue()
for engine in engines:
    engine.add_request([5, 9, 17], params)
    engine.step()
    engine.submit(engine.make_request([1, 2, 3], params), waiting)
toy_kernels.times_kernel().prepare(1, (16, 16, 1))(models[0].device.stream)  # no memory is there
try:
    while engines[0].has_unfinished:
        engines[0].step()
except driver.CudaError as error:
    print("step:", error, flush=True)
for engine in engines:
    try:
        engine.add_request([7], params)
    except EngineDead as error:
        print("dead:", error, flush=True)
while not waiting.empty():
    print("told:", type(waiting.get()).__name__, flush=True)
print("poisoned:", driver.poisoned(), flush=True)
for engine in engines:
    engine.close()
del engines, models
gc.collect()
print("closed", flush=True)
"""


def test_a_bad_address_ends_every_engine():
    """In a process of its own, which CUDA is lost to."""
    done = no_simulator.run(STICKY, timeout=100)
    print(done.stdout, done.stderr[-3000:])
    lines = done.stdout.splitlines()
    assert lines[0].startswith("step: ")
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in lines[0]
    assert "during step " in lines[0]
    assert "restart the kernel" in lines[0]
    assert [line.split(":")[0] for line in lines].count("dead") == 2
    assert lines.count("told: CudaError") == 2
    assert lines[-1] == "closed"


FORKED = """
import os, sys
sys.path.insert(0, "tests")
from engine_checks import TINY
from sharp import driver
from sharp.config import EngineConfig
from sharp.model import Model
from sharp.random_model import RandomCheckpoint

config = EngineConfig(device="cuda", num_blocks=16)
model = Model.load(TINY, config)
sys.stdout.flush()
child = os.fork()
if child == 0:
    for use in (model.device.synchronize, lambda: Model.load(TINY, config)):
        try:
            use()
            print("worked", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
model.device.synchronize()
print("the parent goes on", flush=True)
"""


def test_a_forked_child_is_told():
    done = no_simulator.run(FORKED, timeout=100)
    lines = done.stdout.splitlines()
    print(done.stdout, done.stderr[-3000:])
    assert lines[0].startswith("ForkedError CUDA had started before")
    assert "spawn" in lines[0]
    assert "worked" not in lines
    assert lines[-1] == "the parent goes on"


def test_what_is_not_there_is_refused_by_name():
    words = r"the arena: 1,125,899,906,842,624 bytes of device memory, [\d,]+ free"
    with pytest.raises(driver.CudaOutOfMemory, match=words):
        Arena(1 << 50)
    assert driver.poisoned() is None
