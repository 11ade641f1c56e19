"""Graphs, fixed buffers and ids that only the device knows, on a real GPU; run by test_gpu.py in children
with a time limit (`python -m pytest -m gpu`); those of free memory with the GPU to themselves."""

from __future__ import annotations

import functools
import gc
import threading
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from kernels_numba.ops import apply_step as op
from sharp import driver
from sharp.config import EngineConfig
from sharp.device import open_device
from sharp.model import Model
from sharp.plan import BatchPlan
from sharp.random_model import RandomCheckpoint

pytestmark = pytest.mark.gpu

OPTIONS = {"max_num_batched_tokens": 192, "max_num_seqs": 48, "num_blocks": 256, "max_model_len": 1024}
PLAIN = {"decode_attention": "plain", "prefill_attention": "plain"}
LEFT = 4 << 20  # bytes by which free memory may differ: what the driver takes by itself


@pytest.fixture(autouse=True)
def only_in_the_child(on_gpu):
    """The parent of the groups selects these tests too, but in the simulator: they have no GPU there."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")


def open_random(**options):
    config = EngineConfig(device="cuda", dtype="bfloat16", **{**OPTIONS, **options})
    return Model(RandomCheckpoint("smollm2-135m"), config, open_device("cuda", "bfloat16"))


@pytest.fixture(scope="module", params=["default", "plain", "decodes apart"])
def model(request, on_gpu):
    if not on_gpu:
        pytest.skip("no GPU")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "decodes apart":  # from the chunks of a step, however few their keys
            patch.setattr("sharp.model.where_decodes", lambda *where: "apart")
        model = open_random(rungs=PLAIN if request.param == "plain" else {})
    assert bool(model.runtime.buckets.apart) == (request.param == "decodes apart")
    capture_all(model)
    yield model
    model.close()


def capture_all(model):
    model.capture()
    assert len(model.runtime.graphs) == len(model.runtime.buckets.all())


@functools.cache
def random_pages(shape):
    device = open_device("cuda", "bfloat16")
    values = device.upload_float(np.random.default_rng(0).standard_normal(shape, np.float32))
    device.synchronize()
    return device, values


def fill_pages(model):
    """Every page full of the same random keys and values, before each way of computing; each layer's begin
    at another page of the same numbers."""
    _, values = random_pages(model.kv[0].k.shape)
    page, stream = values[0].nbytes, model.device.compute_stream
    for number, cache in enumerate(model.kv):
        for turn, pages in enumerate((cache.k, cache.v)):
            cut = (2 * number + turn) % len(values) * page
            rest = pages.nbytes - cut
            driver.copy_on_device(pages.address, values.address + cut, rest, stream)
            if cut:
                driver.copy_on_device(pages.address + rest, values.address, cut, stream)
    model.device.synchronize()


def random_step(rng, model, decodes, lengths, step):
    """A step over random pages, none of them two sequences'; half of the sequences want logits, in all
    ways of sampling."""
    size = model.block_size
    counts = np.array([1] * decodes + list(lengths), np.int32)
    seqs = len(counts)
    context = (counts + rng.integers(0, 200, seqs)).astype(np.int32)
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    pages = -(-int(context.max()) // size)
    table = rng.permutation(model.num_blocks)[: seqs * pages].astype(np.int32).reshape(seqs, pages)
    owner = np.repeat(np.arange(seqs), counts)
    positions = (np.arange(cu[-1]) + (context - counts - cu[:-1])[owner]).astype(np.int32)
    slots = table[owner, positions // size] * size + positions % size
    ends = np.sort(rng.choice(seqs, (seqs + 1) // 2, replace=False))
    rows = len(ends)
    return BatchPlan(
        step=step,
        request_ids=tuple(f"r{i}" for i in range(seqs)),
        num_decodes=decodes,
        token_ids=rng.integers(0, model.config.vocab_size, cu[-1], dtype=np.int32),
        positions=positions,
        cu_seqlens_q=cu,
        context_lens=context,
        block_table=table,
        slot_mapping=slots.astype(np.int32),
        logits_rows=(cu[1:][ends] - 1).astype(np.int32),
        temperatures=rng.choice([0.0, 0.7, 1.0], rows).astype(np.float32),
        top_ks=rng.choice([0, 5, 50], rows).astype(np.int32),
        top_ps=rng.choice([1.0, 0.9], rows).astype(np.float32),
        seeds=rng.integers(0, 2**63, rows, dtype=np.uint64),
        output_indices=rng.integers(0, 99, rows, dtype=np.int32),
        num_logprobs=np.full(rows, -1, np.int32),
    )


def a_step_for(rng, model, bucket, step):
    """A random step whose bucket this is, rarely as large as it."""
    kind = bucket.mixed, bucket.apart
    of_kind = [b.tokens for b in model.runtime.buckets.all() if (b.mixed, b.apart) == kind]
    least = max((size for size in of_kind if size < bucket.tokens), default=0) + 1
    if not bucket.mixed:
        return random_step(rng, model, int(rng.integers(least, bucket.tokens + 1)), (), step)
    tokens = int(rng.integers(max(least, 3), bucket.tokens + 1))
    if bucket.apart:
        alone = int(rng.integers(1, min(tokens - 1, 20)))
        chunk = tokens - alone
        lengths = (chunk // 2, chunk - chunk // 2) if chunk >= 4 else (chunk,)
        return random_step(rng, model, alone, lengths, step)
    if model.runtime.buckets.apart:
        return random_step(rng, model, 0, (tokens,), step)
    lengths, room = [], min(bucket.seqs, 40)
    while tokens >= 2 and len(lengths) < min(4, room):
        lengths.append(int(rng.integers(2, min(tokens, 120) + 1)))
        tokens -= lengths[-1]
    decodes = min(tokens, room - len(lengths))
    if tokens > decodes:
        lengths[-1] += tokens - decodes
    return random_step(rng, model, decodes, sorted(lengths), step)


def bits(model, rows):
    return model.device.download(model.work.logits[:rows]).view(np.uint32)


def by_launch(model, plan, graphs):
    """(ids, logits' bits) of a step through the runtime, with its graphs or without."""
    runtime, kept = model.runtime, model.runtime.graphs
    runtime.graphs = kept if graphs else None
    try:
        sampled = model.land(model.launch(plan))
    finally:
        runtime.graphs = kept
    return sampled.token_ids, bits(model, len(plan.logits_rows))


def by_hand(model, plan):
    """The same through stage, forward and sample: launches as large as the step."""
    batch = model.stage(plan)
    sampled = model.sample(model.forward(batch), batch)
    return sampled.token_ids, bits(model, len(plan.logits_rows))


def check_fused_steps(rng, part, **taken):
    """The same bits from graphs whose ops are fused, and by launches after part(ops) has taken them apart;
    taken: rungs that the model must have, or nothing is fused."""
    model = open_random()
    try:
        assert taken.items() <= model.rungs.items()
        capture_all(model)
        plans = [random_step(rng, model, *sizes, 0) for sizes in ((1, ()), (40, ()), (3, (50, 100)))]
        fill_pages(model)
        fused = [by_launch(model, plan, graphs=True) for plan in plans]
        part(model.ops)
        fill_pages(model)
        for plan, (ids, logits) in zip(plans, fused, strict=True):
            ids_apart, logits_apart = by_hand(model, plan)
            assert np.array_equal(ids, ids_apart), plan.num_tokens
            assert np.array_equal(logits, logits_apart), plan.num_tokens
    finally:
        model.close()


def test_every_bucket_gives_the_same_bits_three_ways(model):
    """Replayed, launched one by one for the bucket, launched one by one for the step's own size."""
    rng = np.random.default_rng(1)
    buckets = [bucket for bucket in model.runtime.buckets.all() for _ in range(3)]
    rng.shuffle(buckets)
    plans = [a_step_for(rng, model, bucket, step) for step, bucket in enumerate(buckets)]
    assert {model.runtime.buckets.of(plan) for plan in plans} == set(buckets)
    ways = []
    for way in (
        lambda p: by_launch(model, p, True),
        lambda p: by_launch(model, p, False),
        lambda p: by_hand(model, p),
    ):
        fill_pages(model)
        ways.append([way(plan) for plan in plans])
        ways[-1].append((None, np.stack([model.device.download(c.k).view(np.uint16) for c in model.kv[:2]])))
    for other, name in ((ways[1], "launched for the bucket"), (ways[2], "launched for the step")):
        for plan, (ids, logits), (ids2, logits2) in zip([*plans, None], ways[0], other, strict=True):
            what = f"{name}: {'pages' if plan is None else model.runtime.buckets.of(plan)}"
            assert plan is None or (ids == ids2).all(), what
            assert (logits == logits2).all(), f"{what}: {(logits != logits2).sum()} of {logits.size} differ"


def test_launches_that_may_overlap_see_what_came_before(model):
    """Fifty forwards queued at once, between which everything is poisoned, against one whose ops are waited
    for one by one: dependent launches begin early, and must not read or write early."""
    rng, ops, work = np.random.default_rng(6), model.ops, model.work
    plan = random_step(rng, model, 20, (40, 60), 0)

    def poisoned(way):
        for field in fields(work):
            model.device.fill(getattr(work, field.name), 0xFF)
        model.device.synchronize()
        return way(model, plan)

    def alone(op):
        def call(*args, **kwargs):
            op(*args, **kwargs)
            model.device.synchronize()

        return call

    fill_pages(model)
    model.ops = SimpleNamespace(**{name: alone(op) for name, op in vars(ops).items()})
    try:
        ids, logits = poisoned(by_hand)
    finally:
        model.ops = ops
    for number in range(50):
        way = by_hand if number % 2 else functools.partial(by_launch, graphs=number % 4 == 0)
        got_ids, got = poisoned(way)
        assert (got_ids == ids).all(), number
        assert (got == logits).all(), f"{number}: {(got != logits).sum()} of {got.size} differ"


def test_ids_fed_on_the_device_are_those_fed_from_the_host(model):
    """Forty decodes of a batch, launched two deep."""
    rng = np.random.default_rng(2)
    first = random_step(rng, model, 7, (), 0)
    everyone = np.arange(7, dtype=np.int32)
    first = replace(
        first, logits_rows=everyone, temperatures=np.full(7, 0.8, np.float32),
        top_ks=np.zeros(7, np.int32), top_ps=np.ones(7, np.float32), seeds=np.arange(7, dtype=np.uint64),
        output_indices=np.zeros(7, np.int32), num_logprobs=np.full(7, -1, np.int32),
        block_table=np.concatenate(
            [first.block_table, np.setdiff1d(np.arange(256), first.block_table)[:7].reshape(7, 1)], 1
        ).astype(np.int32),
    )  # fmt: skip

    def following(plan, ids):
        position = plan.positions + 1
        page = plan.block_table[everyone, position // model.block_size]
        return replace(
            plan, step=plan.step + 1, token_ids=ids, positions=position, context_lens=position + 1,
            slot_mapping=page * model.block_size + position % model.block_size,
            output_indices=plan.output_indices + 1,
        )  # fmt: skip

    fill_pages(model)
    plan, from_host = first, []
    for _ in range(40):
        from_host.append(model.land(model.launch(plan)).token_ids)
        plan = following(plan, from_host[-1])
    fill_pages(model)
    plan, flying, on_device = first, [], []
    for _ in range(40):
        flying.append(model.launch(plan))
        if len(flying) == 2:
            on_device.append(model.land(flying.pop(0)).token_ids)
        plan = following(plan, ~everyone)
    on_device.append(model.land(flying.pop(0)).token_ids)
    assert (np.stack(on_device) == np.stack(from_host)).all()


def test_captures_stay_within_their_term(model):
    graphs, term = model.runtime.graphs, model.budget.graphs
    assert len(graphs) == len(model.runtime.buckets.all())
    print(f"{len(graphs)} graphs, {graphs.num_nodes} launches: {graphs.num_bytes:,} bytes of {term:,}")
    assert graphs.num_bytes <= term


def test_free_memory_stays_over_two_thousand_steps(model):
    rng = np.random.default_rng(3)
    plans = [a_step_for(rng, model, bucket, 0) for bucket in model.runtime.buckets.all()]
    for plan in plans:
        model.land(model.launch(plan))
    model.device.synchronize()
    before, pinned, flying = model.device.free_bytes(), model.device.pool.num_bytes, []
    for number in range(2000):
        flying.append(model.launch(plans[number % len(plans)]))
        if len(flying) == 2:
            model.land(flying.pop(0))
    model.land(flying.pop(0))
    model.device.synchronize()
    assert before - model.device.free_bytes() < LEFT
    assert model.device.pool.num_bytes <= pinned + (1 << 20)


def test_the_device_says_how_long_a_step_took(model):
    plan = random_step(np.random.default_rng(4), model, 16, (), 0)
    model.land(model.launch(plan))
    start = time.perf_counter()
    launched = model.launch(plan)
    model.land(launched)
    assert 0 < launched.gpu_s < time.perf_counter() - start


def test_a_capture_while_other_threads_use_the_device(on_gpu):
    """Uploads on the default stream and allocations by another thread end no capture, and lose nothing."""
    from kernels_numba.compiler import cuda

    over, errors = threading.Event(), []

    def bother():
        try:
            values = np.arange(10_000, dtype=np.int32)
            while not over.is_set():
                assert (cuda.to_device(values).copy_to_host() == values).all()
        except BaseException as error:
            errors.append(error)

    model = open_random(max_num_batched_tokens=24, max_num_seqs=4)
    thread = threading.Thread(target=bother)
    thread.start()
    try:
        capture_all(model)
    finally:
        over.set()
        thread.join()
    assert not errors
    plan = random_step(np.random.default_rng(5), model, 3, (9,), 0)
    fill_pages(model)
    replayed = by_launch(model, plan, True)
    fill_pages(model)
    launched = by_launch(model, plan, False)
    assert (replayed[0] == launched[0]).all()
    assert (replayed[1] == launched[1]).all()
    model.close()


def test_what_graphs_took_comes_back(on_gpu):
    """Engines captured and closed, and captured and dropped."""
    open_random(max_num_batched_tokens=24, max_num_seqs=4).close()
    device, free = open_device("cuda", "bfloat16"), []
    for number in range(4):
        model = open_random(max_num_batched_tokens=24, max_num_seqs=4)
        capture_all(model)
        if number % 2:
            model.close()
        del model
        gc.collect()
        device.synchronize()
        free.append(device.free_bytes())
    assert max(free) - min(free[1:]) < LEFT, free


@pytest.mark.parametrize("seed", range(4))
def test_apply_step_by_address_is_its_definition(on_gpu, seed):
    """Also twice in a row from the same place, and in a bucket that is full."""
    rng = np.random.default_rng(seed)
    layout, device = op.StepLayout(700, 90, 33), open_device("cuda", "bfloat16")
    tokens, seqs = (700, 90) if seed == 0 else (int(rng.integers(1, 700)), int(rng.integers(1, 90)))
    rows, decodes = int(rng.integers(0, seqs + 1)), int(rng.integers(0, seqs + 1))
    changes = int(rng.integers(0, 90 * 33))
    packed = rng.integers(-90, 1 << 30, op.packed_words(tokens, seqs, rows, changes)).astype(np.int32)
    packed[:8] = tokens, rows, decodes, seqs, rng.integers(tokens, 701), rng.integers(seqs, 91), changes, 0
    packed[len(packed) - 2 * changes : len(packed) - changes] = rng.permutation(90 * 33)[:changes]
    state, sampled = (
        rng.integers(-9, 9, layout.words).astype(np.int32),
        rng.integers(0, 9, 90).astype(np.int32),
    )
    wanted = op.apply_step_spec(state, packed, sampled, layout)
    arrays = [device.upload(array) for array in (state, packed, sampled)]
    launch = op.prepare_apply_step(*arrays, layout)
    for _ in range(2):
        launch(device.stream)
        assert (device.download(arrays[0]) == wanted).all()
    device.close()
