"""What must hold of a real model on any device: used in the simulator, on the host and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sharp.config import EngineConfig
from sharp.device import open_device
from sharp.door import Door
from sharp.model import Model
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler
from sharp.weights import Checkpoint

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"


def load(path, device, dtype, **options):
    """A Model and the config that it was loaded with. path: of a model, or a Checkpoint."""
    config = EngineConfig(device=device, dtype=dtype, **options)
    if isinstance(path, Checkpoint):
        return Model(path, config, open_device(device, dtype)), config
    return Model.load(path, config), config


def decode(model, config, prompts, new_tokens, preempt_at=()):
    """Greedy ids and the logits that chose them, prompt by prompt, all prompts through one scheduler.

    preempt_at: lengths of its answer at which each request is preempted, to be read again later.
    Every unused page is NaN before the first step, so that reading one shows in the logits.
    """
    scheduler = Scheduler(config, model.num_blocks, model.max_model_len)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=str(i), prompt=None, prompt_token_ids=list(p), params=params, seed=0)
        for i, p in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    seen = {request.request_id: [] for request in requests}
    while (plan := scheduler.plan()) is not None:
        plan.check(config.block_size)
        sampled = compute(model, plan, seen)
        for request in scheduler.commit(plan, sampled):
            if len(request.output_token_ids) in preempt_at and request in scheduler.running:
                scheduler.preempt(request)
        scheduler.check()
    return [r.output_token_ids for r in requests], [np.stack(seen[r.request_id]) for r in requests]


def compute(model, plan, seen):
    """What a plan's step samples; its logits rows are appended to those `seen` of each request."""
    batch = model.stage(plan)
    logits = model.forward(batch)
    sampled = model.sample(logits, batch)
    host = np.array(model.device.download(logits), copy=True)
    for row, seq in enumerate(plan.logits_seqs):
        seen[plan.request_ids[seq]].append(host[row])
    return sampled


def poison(model):
    """Fill every page with NaN: all bits set are one in each element type."""
    for cache in model.kv:
        for pages in (cache.k, cache.v):
            model.device.fill(pages, 0xFF)
    model.device.synchronize()


def check_same_bits(device, dtype, prompts, new_tokens, cuts, exact, path=TINY):
    """A prompt alone, packed with strangers, and cut anywhere: same ids, and where `exact` the same logits
    bits.
    """
    budget = max(64, sum(map(len, prompts)))
    options = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "num_blocks": 16}
    model, config = load(path, device, dtype, **options)
    poison(model)
    packed_ids, packed_logits = decode(model, config, prompts, new_tokens)
    assert all(np.isfinite(logits).all() for logits in packed_logits)
    for index, prompt in enumerate(prompts):
        shorter = [c for c in cuts if c < len(prompt)]  # a longer cut cuts nothing
        runs = [("alone", config)]
        runs += [(f"cut every {c}", EngineConfig(**options, long_prefill_token_threshold=c)) for c in shorter]
        for name, variant in runs:
            poison(model)
            ids, logits = decode(model, variant, [prompt], new_tokens)
            assert ids[0] == packed_ids[index], f"prompt {index} {name}"
            if exact:
                same = logits[0].view(np.uint32) == packed_logits[index].view(np.uint32)
                assert same.all(), (
                    f"prompt {index} {name}: {(~same).sum()} of {same.size} logits differ in bits"
                )
            else:
                np.testing.assert_allclose(logits[0], packed_logits[index], atol=2e-4, rtol=1e-4)
    model.close()
    return packed_ids, packed_logits


def check_preempted(
    path,
    device,
    dtype,
    prompts,
    new_tokens,
    preempt_at,
    exact,
    admissions=("reserve", "optimistic"),
    **options,
):
    """Preempted after some of the answer and resumed, by hand and for want of pages: same ids, and where
    `exact` the same logits bits."""
    model, config = load(path, device, dtype, **options)
    poison(model)
    wanted, logits = decode(model, config, prompts, new_tokens)
    for admission in admissions:
        poison(model)
        resumed = replace(config, admission=admission, long_prefill_token_threshold=7)
        ids, again = decode(model, resumed, prompts, new_tokens, preempt_at)
        assert ids == wanted, admission
        for ours, theirs in zip(again, logits, strict=True):
            if exact:
                assert (ours.view(np.uint32) == theirs.view(np.uint32)).all(), admission
            else:
                np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=1e-3)
    model.close()


def kv_rows(model, block_ids, length):
    """Keys and values of a sequence's first `length` tokens, as stored: [2 * layers, length, Hkv, D]."""
    arrays = []
    for cache in model.kv:
        for pages in (cache.k, cache.v):
            own = np.asarray(model.device.download(pages))[block_ids]
            rows = own.transpose(0, 2, 1, 3).reshape(-1, own.shape[1], own.shape[3])
            arrays.append(np.array(rows[:length]))
    return np.stack(arrays)


def history(model, config, prompts, new_tokens, rng=None, samples=1):
    """Greedy answers to `prompts`: ids, logits, stored K and V of each sample of each, in a random history.

    rng: of the order and the moments of arrival and of preemptions; None: all at once, in order, undisturbed.
    Returns (results by prompt and sample, the scheduler).
    """
    scheduler = Scheduler(config, model.num_blocks, model.max_model_len)
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, n=samples)
    door = Door(None, model.config.vocab_size, 0)
    firsts = [door.make_request(list(p), params, str(i), 0) for i, p in enumerate(prompts)]
    everyone = [request for first in firsts for request in (first, *first.samples)]
    coming = list(firsts) if rng is None else [firsts[i] for i in rng.permutation(len(firsts))]
    logits = {request.request_id: [] for request in everyone}
    stored = {}
    while coming or scheduler.requests():
        while coming and (rng is None or not scheduler.requests() or rng.random() < 0.3):
            scheduler.add(coming.pop(0))
        calm = 3  # preemptions of a request: one that is preempted at every turn never ends
        running = [request for request in scheduler.running if request.num_preemptions < calm]
        if rng is not None and running and rng.random() < 0.1:
            scheduler.preempt(running[rng.integers(len(running))])
        plan = scheduler.plan()
        plan.check(config.block_size)
        sampled = compute(model, plan, logits)
        pages = {r.request_id: (r.block_ids, r.num_computed_tokens) for r in scheduler.running}
        for request in scheduler.commit(plan, sampled):
            if request.finish_reason:  # its pages are free, but nothing has been written since
                stored[request.request_id] = kv_rows(model, *pages[request.request_id])
        scheduler.check()
    names = [
        [r.request_id for r in everyone if r.request_id.split("#")[0] == str(i)] for i in range(len(firsts))
    ]
    ids = {r.request_id: r.output_token_ids for r in everyone}
    results = [[(ids[name], np.stack(logits[name]), stored[name]) for name in group] for group in names]
    return results, scheduler


def check_histories(path, device, dtype, prompts, new_tokens, rounds, exact, seed=None, **options):
    """Random cuts, neighbours, arrivals, preemptions, samples, with pages found in the prefix cache: the same
    ids as alone without any of it; where `exact` the same bits of logits and of stored keys and values.

    Every page is NaN before each history. seed: printed; None: another one in each run.
    """
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    print(f"seed = {seed}")
    rng = np.random.default_rng(seed)
    model, config = load(path, device, dtype, **options)
    alone = []
    for prompt in prompts:
        poison(model)
        plain = replace(config, prefix_caching=False)
        alone.append(history(model, plain, [prompt], new_tokens)[0][0][0])
    found = forked = preempted = 0
    for number in range(rounds):
        poison(model)
        varied = replace(
            config,
            long_prefill_token_threshold=int(rng.choice([1, 7, 64, 65, 1000])),
            admission=str(rng.choice(["reserve", "optimistic"])),
        )
        samples = (1, 3)[number % 2]
        results, scheduler = history(model, varied, prompts, new_tokens, rng, samples)
        found += scheduler.pages.hit_tokens
        forked += scheduler.pages.forks.forked
        preempted += scheduler.preemptions
        for index, group in enumerate(results):
            assert len(group) == samples
            for ids, logits, stored in group:
                where = f"seed {seed}, prompt {index}, {varied.long_prefill_token_threshold} a chunk"
                wanted, wanted_logits, wanted_stored = alone[index]
                assert ids == wanted, where
                # A token sampled in a step that preempted its request is dropped and sampled again.
                if len(logits) == len(wanted_logits):
                    compare(logits, wanted_logits, exact, f"logits, {where}")
                compare(stored, wanted_stored, exact, f"K and V, {where}")
    print(f"{found} tokens found, {forked} forks, {preempted} preemptions in {rounds} histories")
    model.close()
    return found, forked, preempted


def compare(ours, theirs, exact, where):
    """Equal bits where `exact`, else close; nothing NaN."""
    assert ours.shape == theirs.shape, where
    if exact:
        different = ours.view(np.uint8) != theirs.view(np.uint8)
        assert not different.any(), f"{different.sum()} of {different.size} bytes differ: {where}"
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    if not exact:
        np.testing.assert_allclose(ours, theirs, atol=2e-3, rtol=1e-3, err_msg=where)
