"""A burst: 500 prompts at once, many times what the pages hold. All end, and memory is what was planned."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from engine_checks import TINY

from sharp.budget import CUDA_CONTEXT, plan_memory
from sharp.config import EngineConfig
from sharp.device import open_device
from sharp.engine import Engine
from sharp.model import Model
from sharp.random_model import RandomCheckpoint
from sharp.request import SamplingParams
from sharp.weights import open_checkpoint

REQUESTS = 500
KV_BYTES = 2 << 30


def burst(engine, lengths, new_tokens, seed):
    """Queue everything at once and step to the end. Returns finish reasons, seconds, and the least free
    memory of the device after a step."""
    rng = np.random.default_rng(seed)
    vocab = engine.model.config.vocab_size
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    for number, length in enumerate(rng.integers(*lengths, REQUESTS).tolist()):
        engine.add_request(rng.integers(0, vocab, length).tolist(), params, str(number))
    start, least, ended = time.perf_counter(), engine.model.device.free_bytes(), Counter()
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                ended[output.outputs[0].finish_reason] += 1
        least = min(least, engine.model.device.free_bytes())
    engine.scheduler.check()
    return ended, time.perf_counter() - start, least


@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_a_burst_on_the_reference(admission):
    """A fortieth of the pages that all would need; answers cross a page's end."""
    config = EngineConfig(
        device="cpu", num_blocks=24, max_num_batched_tokens=512, max_num_seqs=32, admission=admission
    )
    model = Model(open_checkpoint(TINY), config, open_device("cpu", "float32"))
    engine = Engine(model, model.tokenizer, config)
    ended, seconds, _ = burst(engine, (40, 64), 12, seed=0)
    assert ended == {"length": REQUESTS}
    assert engine.stats.peak_blocks <= 24
    assert (engine.scheduler.preemptions > 0) == (admission == "optimistic")
    print(f"{engine.stats.steps} steps, {engine.scheduler.preemptions} preemptions, {seconds:.1f} s")


@pytest.mark.gpu
def test_a_burst_fits_its_memory(on_gpu):
    """The demo model's shape in bfloat16, 2 GiB of pages, prompts of 200 to 600 tokens and answers of 64:
    short of what its context allows, because plain attention kernels have to read them within a minute."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")
    device = open_device("cuda", "bfloat16")
    checkpoint = RandomCheckpoint("smollm2-135m")
    options = {"max_num_batched_tokens": 4096, "max_num_seqs": 256, "admission": "optimistic"}
    shape = {"dtype": "bfloat16", "kind": "cuda", "max_model_len": 8192}
    before = device.free_bytes()
    plan = plan_memory(checkpoint.config, EngineConfig(**options, num_blocks=1), free=before, **shape)
    rest = plan.activations + plan.logits + plan.rope_table + plan.reserve
    limit = plan.weights + CUDA_CONTEXT + rest + KV_BYTES
    config = EngineConfig(device="cuda", dtype="bfloat16", memory_limit=limit, **options)
    model = Model(checkpoint, config, device)
    assert KV_BYTES - 2 * model.budget.page_bytes < model.budget.kv_pages <= KV_BYTES
    engine = Engine(model, model.tokenizer, config)
    loaded = device.free_bytes()
    engine.add_request([5] * 200, SamplingParams(max_tokens=3, ignore_eos=True))  # loads every kernel
    while engine.has_unfinished:
        engine.step()
    warm = device.free_bytes()
    ended, seconds, least = burst(engine, (200, 600), 64, seed=0)
    planned, used = model.budget.arena, before - least
    print(
        f"{engine.stats.steps} steps, {engine.stats.tokens} tokens, {engine.scheduler.preemptions} "
        f"preemptions, {seconds:.1f} s; MiB: planned {planned / 2**20:.0f}, most used {used / 2**20:.0f}, "
        f"after start {(loaded - warm) / 2**20:.1f} for kernels, then {(warm - least) / 2**20:.1f}"
    )
    assert ended == {"length": REQUESTS}
    assert engine.scheduler.preemptions > 0
    assert planned <= used <= planned + model.budget.reserve
    assert warm - least <= 0  # no graphs yet, so their term is 0
    assert seconds < 60
    model.close()
