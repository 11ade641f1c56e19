"""CudaDevice over a model of the driver (host_driver.py): copies hand over by events, whatever the order in
which streams get on. What it costs, and whether the driver is as its model, is in test_memory_gpu.py."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import host_driver
import numpy as np
import pytest
from engine_checks import TINY, decode, load, poison

from kernels_numba.ops import resolve
from kernels_numba.ops.decode_attention import door as decode_door
from sharp import driver
from sharp.config import EngineConfig
from sharp.cuda_device import CudaDevice
from sharp.device import open_device
from sharp.engine import Engine
from sharp.memory import Arena
from sharp.model import Model
from sharp.request import SamplingParams
from sharp.weights import load_weights, open_checkpoint
from sharp.workspaces import AttentionNeeds, SampleNeeds

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)
SEEDS = range(12)
PROMPTS = [[5, 9, 17, 3, 250, 44, 81], [7], [11, 12, 13], list(range(20, 150))]


@pytest.fixture
def host(request, monkeypatch):
    seed = getattr(request, "param", 0)
    yield host_driver.install(monkeypatch, seed)
    gc.collect()  # what finalizers give back, they give back to this driver


seeds = pytest.mark.parametrize("host", SEEDS, indirect=True)


@pytest.mark.parametrize("name", host_driver.calls())
def test_the_model_has_the_parameters_of_the_driver(name):
    code = getattr(host_driver.HostDriver, name).__code__
    assert list(code.co_varnames[1 : code.co_argcount]) == host_driver.as_documented(name)


@seeds
def test_what_goes_up_comes_down(host, monkeypatch):
    monkeypatch.setattr("sharp.cuda_device.CHUNK_BYTES", 1000)
    device = CudaDevice("float32")
    for shape, dtype in (
        ((3, 500), np.float32),
        ((7,), np.uint64),
        ((0, 4), np.int32),
        ((2, 3, 5), np.uint16),
    ):
        array = np.random.default_rng(0).integers(0, 1 << 15, shape).astype(dtype)
        there = device.upload(array)
        assert there.shape == shape
        assert (device.download(there) == array).all()
        assert (device.download(there[1:]) == array[1:]).all()
    device.close()


@seeds
def test_steps_find_their_own_indices(host):
    """Ten steps are staged and queued without a wait; each must read what was staged for it, though only two
    slots exist, and pinned buffers are written again."""
    device = CudaDevice("float32")
    device.reserve_staging(4096)
    waits, seen = host.waits, []
    for step in range(10):
        arrays = {"a": np.full(100 + step, step, np.int32), "none": np.empty((0, 3), np.int32)}
        arrays["b"] = np.full((3, 5), step, np.uint64)
        staged = device.stage(arrays)
        assert staged["none"].shape == (0, 3)
        for name in ("a", "b"):
            assert staged[name].address % 16 == 0
            assert staged[name].shape == arrays[name].shape

        def reads(staged=staged):
            seen.append([host.view(staged[name]).copy() for name in ("a", "b")])

        host.queue(device.stream, reads)
    assert host.waits == waits
    assert len(seen) < 10  # else nothing was shown
    device.synchronize()
    for step, (a, b) in enumerate(seen):
        assert (a == step).all()
        assert (b == step).all()
    device.close()


FORGOTTEN = {
    "the kernels wait for the copy": lambda device: setattr(device.compute_stream, "wait", print),
    "the copy waits for the kernels before": lambda device: setattr(device.copy_stream, "wait", print),
    "a buffer waits for its copy": lambda device: None,
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_missing_hand_over_is_seen(monkeypatch, what):
    """The same without one of the three events: some seed must show wrong indices."""
    assert any(goes_wrong(monkeypatch, seed, what) for seed in range(40))


def goes_wrong(monkeypatch, seed, what):
    with monkeypatch.context() as patch:
        host = host_driver.install(patch, seed)
        device, seen = CudaDevice("float32"), []
        device.reserve_staging(4096)
        FORGOTTEN[what](device)
        if what == "a buffer waits for its copy":
            patch.setattr(driver.Event, "done", True)
        for step in range(10):
            there = device.stage({"a": np.full(50, step, np.int32)})["a"]
            host.queue(device.stream, lambda there=there: seen.append(host.view(there).copy()))
        device.synchronize()
        device.close()
        del device, there
        gc.collect()
    return any((a != step).any() for step, a in enumerate(seen))


@seeds
def test_fills_and_page_copies_are_queued(host):
    device = CudaDevice("float32")
    values = np.random.default_rng(0).standard_normal((5, 2, 4, 3)).astype(np.float32)
    pages = device.upload(values)
    device.copy_rows(pages, np.array([[0, 3], [0, 1], [4, 2]], np.int32))
    device.fill(pages[4], 0xFF)
    after = device.download(pages)
    assert (after[:4] == values[[0, 0, 4, 0]]).all()
    assert np.isnan(after[4]).all()
    device.close()


def test_an_arena_that_cannot_be_had_or_filled(host):
    device = CudaDevice("float32")
    words = r"the arena: 2,147,483,648 bytes of device memory, 1,073,741,824 free"
    with pytest.raises(driver.CudaOutOfMemory, match=words), device.arena(2 << 30):
        pass
    failing = fail_inside(device)
    with pytest.raises(ZeroDivisionError):
        next(failing)
    assert host.used() == 0
    outside = device.empty((5, 5))
    assert host.used() == 256
    del outside
    assert host.used() == 0
    device.close()


def fail_inside(device):
    with device.arena(1 << 20) as arena:
        device.empty((5, 5), term="a")
        assert arena.terms == {"a": 256}
        yield 1 // 0


# A whole model -------------------------------------------------------------------------------------


def open_model(host, path=TINY, **options):
    config = EngineConfig(device="cuda", dtype="float32", **options)
    ops = host_driver.deferred(host, resolve("reference", {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharp.model.resolve", lambda default, forced: ops)
        model = Model(open_checkpoint(path), config, CudaDevice("float32"))
    return model, config


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch):
    monkeypatch.setattr("sharp.budget.CUDA_RESERVE", 1 << 20)
    monkeypatch.setattr("sharp.weight_stream.PIECE_BYTES", 1000)


@seeds
def test_a_model_answers_as_the_reference(host):
    options = {"num_blocks": 16, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    model, config = open_model(host, **options)
    assert model.arena.left == 0
    expected = load_weights(open_checkpoint(TINY), lambda array: array, progress=False)
    for field, array in vars(expected.layers[1]).items():
        if array is not None:
            assert (model.device.download(getattr(model.weights.layers[1], field)) == array).all(), field
    assert (model.device.download(model.weights.embed) == expected.embed).all()
    poison(model)
    usual, _ = load(TINY, "cpu", "float32", **options)
    assert decode(model, config, PROMPTS, 6)[0] == decode(usual, config, PROMPTS, 6)[0]
    model.close()
    assert host.used() == 0


def test_fifty_engines_leave_nothing(host):
    """Closed, or only forgotten; a step under way or not."""
    device = open_device("cpu", "float32")
    for number in range(50):
        model, config = open_model(host, num_blocks=4, max_num_batched_tokens=16, max_num_seqs=2)
        engine = Engine(model, model.tokenizer, config)
        engine.add_request([5, 9, 17], SamplingParams(max_tokens=2, ignore_eos=True))
        engine.step()
        if number % 2:
            engine.close()
        del model, engine
        gc.collect()
        assert host.used() == 0, number
        assert not host.pinned, number
    device.close()


def test_attention_gets_its_workspaces_from_the_arena(host):
    """As much as was planned, with counters at 0 and no partial result, large enough for the doors; and
    kernels that remember a workspace for ever do not keep the memory of a model that is gone."""
    model = open_checkpoint(TINY).config
    rungs = {"decode_attention": "mma_sync", "prefill_attention": "hopper"}
    needs = AttentionNeeds.of(model, rungs, 3, 5000)
    device, ops = CudaDevice("bfloat16"), SimpleNamespace(decode_attention=print, prefill_attention=print)
    with device.arena(needs.num_bytes) as arena:
        needs.give(ops, device)
    assert arena.left == 0
    assert list(arena.terms) == ["workspaces"]
    decode = ops.decode_attention.keywords["workspace"]
    heads = model.num_q_heads, model.num_kv_heads, model.head_dim
    assert decode.capacity == 3 * 5
    usual = decode_door.Workspace.bytes_of(3, 3 * 5, *heads)
    arrays = decode.partial, decode.partial_ml, decode.counters
    assert sum(array.nbytes for array in arrays) == usual <= needs.num_bytes
    counters = decode.counters, ops.prefill_attention.keywords["workspace"].counters
    assert [device.download(array).tolist() for array in counters] == [[0] * (2 + 3 * heads[1]), [0, 0]]
    assert all((device.download(x).view(np.int32) == -1).all() for x in (decode.partial, decode.partial_ml))
    del arena
    gc.collect()
    assert host.used() == 0
    with pytest.raises(ValueError, match="lower max_num_seqs"):
        AttentionNeeds.of(model, rungs, 1 << 20, 1 << 20)
    assert AttentionNeeds.of(model, {}, 1 << 20, 1 << 20).num_bytes == 0
    device.close()


def test_sampling_gets_its_workspace_from_the_arena(host):
    """All 0, as large as was planned, and nothing for another rung."""
    needs = SampleNeeds.of({"sample": "warp"}, 3, 5000)
    device, ops = CudaDevice("bfloat16"), SimpleNamespace(sample=print)
    with device.arena(needs.num_bytes) as arena:
        needs.give(ops, device)
    assert (arena.left, list(arena.terms)) == (0, ["workspaces"])
    space = ops.sample.keywords["workspace"]
    assert (space.num_rows, space.vocab_size) == (3, 5000)
    assert space.words.size == space.num_words(3, 5000)
    assert not device.download(space.words).any()
    none = SampleNeeds.of({}, 3, 5000)
    none.give(ops, device)
    assert none.num_bytes == 0
    with pytest.raises(ValueError, match="1 to 4,096 rows"):
        SampleNeeds.of({"sample": "warp"}, 5000, 8)
    del arena, space
    device.close()


def test_a_dropped_arena_waits_for_its_arrays(host):
    arena = Arena(1000)
    array = arena.take("a", (4,), np.float32)[1:]
    del arena
    gc.collect()
    assert host.used() == 1024
    del array
    gc.collect()
    assert host.used() == 0


def test_the_mma_rung_of_prefill_keeps_its_state_in_the_arena(host):
    model = open_checkpoint(TINY).config
    model = replace(model, head_dim=64)
    rungs = {"decode_attention": "mma_sync", "prefill_attention": "mma_sync"}
    needs = AttentionNeeds.of(model, rungs, 3, 5000)
    device, ops = CudaDevice("bfloat16"), SimpleNamespace(decode_attention=print, prefill_attention=print)
    with device.arena(needs.num_bytes) as arena:
        needs.give(ops, device)
    assert arena.left == 0
    space = ops.prefill_attention.keywords["workspace"]
    assert tuple(space.state.shape) == (192, 256 * (64 // 2 + 4))
    assert device.download(space.counters).tolist() == [0, 0]
    del arena
    gc.collect()
    device.close()
