"""What must hold of a real model on any device: used in the simulator, on the host and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from sharp.config import EngineConfig
from sharp.model import Model
from sharp.request import Request, SamplingParams
from sharp.scheduler import Scheduler

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"


def load(path, device, dtype, **options):
    """A Model and the config that it was loaded with."""
    config = EngineConfig(device=device, dtype=dtype, **options)
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
        batch = model.stage(plan)
        logits = model.forward(batch)
        sampled = model.sample(logits, batch)
        host = np.array(model.device.download(logits), copy=True)
        for row, seq in enumerate(plan.logits_seqs):
            seen[plan.request_ids[seq]].append(host[row])
        for request in scheduler.commit(plan, sampled):
            if len(request.output_token_ids) in preempt_at and request in scheduler.running:
                scheduler.preempt(request)
        scheduler.check()
    return [r.output_token_ids for r in requests], [np.stack(seen[r.request_id]) for r in requests]


def poison(model):
    """Fill every page with NaN."""
    element = np.full(model.kv[0].k.shape, np.nan, np.float32)
    for cache in model.kv:
        for pages in (cache.k, cache.v):
            if model.device.kind == "cpu":
                pages[...] = np.nan
            else:
                pages.copy_to_device(model.device.upload_float(element), stream=model.device.stream)
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


def check_preempted(path, device, dtype, prompts, new_tokens, preempt_at, exact, **options):
    """Preempted after some of the answer and resumed, by hand and for want of pages: same ids, and where
    `exact` the same logits bits."""
    model, config = load(path, device, dtype, **options)
    poison(model)
    wanted, logits = decode(model, config, prompts, new_tokens)
    for admission in ("reserve", "optimistic"):
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
