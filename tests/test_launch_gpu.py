"""Launches on a GPU: arguments, streams, shared memory, clusters, dependent launch, graphs, cost."""

from __future__ import annotations

import time

import numpy as np
import pytest
import toy_kernels
from gpu_capture import captured

from kernels_numba.launch import address, stream_handle

pytestmark = pytest.mark.gpu
LAUNCHES = 2000
LIMIT_US = 12.0  # the aim is 6; a busy host must not fail this test


@pytest.fixture
def cuda(on_gpu):
    if not on_gpu:
        pytest.skip("runs under --device=cuda only")
    from kernels_numba.compiler import cuda

    return cuda


@pytest.fixture
def hopper(cuda):
    if cuda.get_current_device().compute_capability < (9, 0):
        pytest.skip("needs compute capability 9.0")
    return cuda


def test_a_kernel_on_a_stream_of_numba(cuda):
    x = np.arange(1000, dtype=np.int32)
    given, out = cuda.to_device(x), cuda.to_device(np.full(1100, -7, np.int32))
    stream = cuda.stream()
    cuda.synchronize()
    launch = toy_kernels.times_kernel().prepare(8, (address(out), address(given), 1000))
    launch(stream)
    stream.synchronize()
    got = out.copy_to_host()
    assert np.array_equal(got[:1000], 2 * x)
    assert (got[1000:] == -7).all()
    launch.set(2, 5)  # an argument replaced, and the handle given as an integer
    out.copy_to_device(np.zeros(1100, np.int32))
    cuda.synchronize()
    launch(stream_handle(stream))
    launch.set(2, 1000)  # the launch above keeps its 5
    stream.synchronize()
    assert np.array_equal(out.copy_to_host()[:7], [0, 2, 4, 6, 8, 0, 0])


def test_each_type_arrives_as_it_was_given(cuda):
    out = cuda.to_device(np.zeros(4, np.int32))
    toy_kernels.scalars_kernel().prepare(1, (address(out), -5, (3 << 32) | 0x7FFFFFFF, 0.1))()
    cuda.synchronize()
    got = out.copy_to_host()
    assert got[:3].tolist() == [-5, 0x7FFFFFFF, 3]
    assert got[3:].view(np.float32)[0] == np.float32(0.1)


@pytest.mark.parametrize("smem", [512, 48 << 10, 96 << 10])
def test_dynamic_shared_memory_beyond_48_kb(cuda, smem):
    out = cuda.to_device(np.zeros(128, np.int32))
    toy_kernels.reverse_kernel(smem).prepare(1, (address(out),))()
    cuda.synchronize()
    assert np.array_equal(out.copy_to_host(), np.arange(128)[::-1])


def test_more_shared_memory_than_there_is(cuda):
    with pytest.raises(RuntimeError, match=r"reverse: 1,048,576 bytes of .*shared memory"):
        toy_kernels.reverse_kernel(1 << 20).load()
    out = cuda.to_device(np.zeros(128, np.int32))  # and the context still works
    toy_kernels.reverse_kernel(1024).prepare(1, (address(out),))()
    cuda.synchronize()
    assert out.copy_to_host()[0] == 127


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_clusters(hopper, cluster):
    out = hopper.to_device(np.full(16, -1, np.int32))
    toy_kernels.ranks_kernel(cluster).prepare(16, (address(out),))()
    hopper.synchronize()
    assert np.array_equal(out.copy_to_host(), np.arange(16) % cluster)


@pytest.mark.parametrize("pdl", [False, True])
def test_dependent_launches_see_what_came_before(hopper, pdl):
    x = hopper.to_device(np.zeros(4096, np.int32))
    stream = hopper.stream()
    hopper.synchronize()
    one = toy_kernels.increment_kernel(pdl).prepare(32, (address(x), 4096))
    for _ in range(64):
        one(stream)
    stream.synchronize()
    assert (x.copy_to_host() == 64).all()


def test_clusters_and_dependent_launches_in_a_graph(hopper):
    start = np.arange(4096, dtype=np.int32)
    given, x = hopper.to_device(start), hopper.to_device(np.zeros(4096, np.int32))
    ranks = hopper.to_device(np.full(16, -1, np.int32))
    stream = hopper.stream()
    kernels = (
        toy_kernels.times_kernel(),
        toy_kernels.increment_kernel(True),
        toy_kernels.ranks_kernel(4),
        toy_kernels.increment_kernel(False),
    )
    for kernel in kernels:
        kernel.load()  # a module must not be loaded while a stream is captured
    times, dependent, cluster, plain = kernels
    work = [
        times.prepare(32, (address(x), address(given), 4096)),
        *[dependent.prepare(32, (address(x), 4096)) for _ in range(5)],
        cluster.prepare(16, (address(ranks),)),
        plain.prepare(32, (address(x), 4096)),
        dependent.prepare(32, (address(x), 4096)),
    ]
    hopper.synchronize()
    replay = captured(stream, lambda: [launch(stream) for launch in work])
    stream.synchronize()
    assert not x.copy_to_host().any()  # captured, not run
    for launch in work:  # what the graph holds is its own
        launch.set(0, 0)
    for _ in range(3):
        x.copy_to_device(np.zeros(4096, np.int32))
        ranks.copy_to_device(np.full(16, -1, np.int32))
        hopper.synchronize()
        replay()
        replay()  # each replay begins anew from `given`
        stream.synchronize()
        assert np.array_equal(x.copy_to_host(), 2 * start + 7)
        assert np.array_equal(ranks.copy_to_host(), np.arange(16) % 4)


@pytest.mark.parametrize("kind", ["plain", "cluster", "dependent"])
def test_what_a_launch_costs(hopper, kind):
    out = hopper.to_device(np.zeros(16, np.int32))
    kernel, arguments, grid = {
        "plain": (toy_kernels.times_kernel(), (address(out), address(out), 0), 1),
        "cluster": (toy_kernels.ranks_kernel(2), (address(out),), 2),
        "dependent": (toy_kernels.increment_kernel(True), (address(out), 0), 1),
    }[kind]
    launch, stream = kernel.prepare(grid, arguments), hopper.stream()
    handle = stream_handle(stream)
    costs = {}
    for name, given in (("handle", handle), ("stream", stream)):
        launch(given)
        stream.synchronize()
        taken = []
        for i in range(LAUNCHES):
            start = time.perf_counter_ns()
            launch(given)
            taken.append(time.perf_counter_ns() - start)
            if i % 100 == 99:  # a full queue would make the host wait for the device
                stream.synchronize()
        costs[name] = float(np.median(taken)) / 1000
    print(f"{kind}: {costs['handle']:.2f} us a launch by handle, {costs['stream']:.2f} by stream")
    assert max(costs.values()) < LIMIT_US, costs


def test_a_wrong_launch_is_named(cuda):
    launch = toy_kernels.times_kernel().prepare(1 << 31, (0, 0, 0))
    with pytest.raises(RuntimeError, match=r"launching times with .*CUDA_ERROR_INVALID_VALUE"):
        launch()
