"""A burst: 500 prompts at once, many times what the pages hold. All end, and memory is what was planned."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from engine_checks import TINY

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


def limit_for(checkpoint, kv_bytes, **options):
    """The memory_limit that leaves kv_bytes for pages: by the budget of the same model with one page, so that
    no term is forgotten."""
    config = EngineConfig(**options, num_blocks=1)
    model = Model(checkpoint, config, open_device(config.device, config.dtype))
    budget = model.budget
    model.close()
    rest = {name: size for name, size in budget.terms().items() if name not in ("free", "kv_pages")}
    context = budget.context if config.device == "cuda" else 0
    return budget.weights + context + sum(rest.values()) + kv_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # cuda: in the simulator
def test_a_limit_for_so_many_bytes_of_pages(device):
    options = {"device": device, "dtype": "float32", "max_num_batched_tokens": 64, "max_num_seqs": 9}
    wanted = 300_000
    limit = limit_for(open_checkpoint(TINY), wanted, **options)
    model = Model(
        open_checkpoint(TINY), EngineConfig(**options, memory_limit=limit), open_device(device, "float32")
    )
    assert wanted - model.budget.page_bytes < model.budget.kv_pages <= wanted
    model.close()


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
    """The demo model's shape in bfloat16, 2 GiB of pages, prompts of 1,000 to 6,000 tokens, answers of 64."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")
    options = {
        "device": "cuda", "dtype": "bfloat16", "max_num_batched_tokens": 4096, "max_num_seqs": 256,
        "admission": "optimistic",
    }  # fmt: skip
    limit = limit_for(RandomCheckpoint("smollm2-135m"), KV_BYTES, **options)
    device = open_device("cuda", "bfloat16")
    before = device.free_bytes()
    config = EngineConfig(**options, memory_limit=limit)
    model = Model(RandomCheckpoint("smollm2-135m"), config, device)
    assert KV_BYTES - model.budget.page_bytes < model.budget.kv_pages <= KV_BYTES
    engine = Engine(model, model.tokenizer, config)
    loaded = device.free_bytes()
    model.capture()  # as LLM does; where rungs compute whole buckets, each graph is made at its first step
    engine.add_request([5] * 200, SamplingParams(max_tokens=3, ignore_eos=True))  # loads every kernel
    while engine.has_unfinished:
        engine.step()
    warm = device.free_bytes()
    ended, seconds, least = burst(engine, (1000, 6000), 64, seed=0)
    planned, used = model.budget.arena, before - least
    graphs, term = model.runtime.graphs, model.budget.graphs
    print(
        f"{engine.stats.steps} steps, {engine.stats.tokens} tokens, {engine.scheduler.preemptions} "
        f"preemptions, {seconds:.1f} s; MiB: planned {planned / 2**20:.0f}, most used {used / 2**20:.0f}, "
        f"after start {(loaded - warm) / 2**20:.1f} for kernels and the first graphs, then "
        f"{(warm - least) / 2**20:.1f}; graphs {graphs.num_bytes / 2**20:.1f} of {term / 2**20:.1f}"
    )
    assert ended == {"length": REQUESTS}
    assert engine.scheduler.preemptions > 0
    assert planned <= used <= planned + term + model.budget.reserve
    assert graphs.num_bytes <= term
    assert warm - least <= term
    assert seconds < 60
    model.close()
