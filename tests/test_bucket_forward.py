"""The forward over a bucket's fixed buffers, larger than the step: the same answers as over the step's own
arrays, whatever lies in the rows that are too many. On the host and in numba's simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from engine_checks import TINY, decode, load, poison

from kernels_numba.ops import OPS, resolve
from kernels_numba.ops import apply_step as op
from kernels_numba.ops.apply_step import StepLayout
from kernels_numba.ops.warp.door import OPS as SMALL_OPS
from sharp.buckets import Buckets
from sharp.counted import counted, takes_count, uncounted
from sharp.model import forward
from sharp.sampling import draw, sample_output
from sharp.step_buffers import StepBuffers, StepPacker


class Bucketed:
    """A model's stage, forward and sample through fixed buffers, and a workspace full of NaN."""

    def __init__(self, model, config):
        self.model, self.device = model, model.device
        self.num_blocks, self.max_model_len = model.num_blocks, model.max_model_len
        seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        pages = -(-model.max_model_len // config.block_size)
        self.layout = StepLayout(config.max_num_batched_tokens, seqs, pages)
        self.buckets = Buckets(self.layout.max_tokens, seqs)
        self.packer, self.buffers = StepPacker(self.layout), StepBuffers(self.device, self.layout)
        self.ops = counted(model.ops, self.buffers.num_tokens, self.buffers.num_rows)
        self.apply = op.rungs["reference" if self.device.kind == "cpu" else "plain"]
        self.padded = 0

    def stage(self, plan):
        self.last = {}
        work = self.model.work
        for array in (work.residual, work.x, work.qkv, work.attention, work.gate_up, work.act):
            nan = np.full(array.shape, np.nan, np.float32)
            if self.device.kind == "cpu":
                array[...] = nan
            else:
                array.copy_to_device(self.device.upload_float(nan))
        bucket = self.buckets.of(plan)
        self.padded += bucket.tokens - plan.num_tokens
        out = np.empty(self.layout.packed_words, np.int32)
        used = self.packer.pack(plan, bucket, out)
        self.apply(self.buffers.state, self.device.upload(out[:used]), work.sampled, self.layout)
        return SimpleNamespace(plan=plan, arrays=self.buffers.arrays(bucket))

    def forward(self, batch):
        model = self.model
        logits = forward(
            model.config, model.weights, batch.arrays, self.ops, model.kv, model.cos_sin, model.work,
            self.device.stream,
        )  # fmt: skip
        draw(model.work.sampled[: batch.arrays.num_rows], logits, batch.arrays, self.ops, self.device.stream)
        self.packer.launched()
        return logits[: len(batch.plan.logits_rows)] if len(batch.plan.logits_rows) else logits

    def sample(self, logits, batch):
        rows = len(batch.plan.logits_rows)
        ids = np.array(self.device.download(self.model.work.sampled))[:rows]
        return sample_output(batch.plan, ids, {})


def both_ways(device, dtype, lengths, new_tokens, **options):
    model, config = load(TINY, device, dtype, **options)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, model.config.vocab_size, n).tolist() for n in lengths]
    poison(model)
    wanted = decode(model, config, prompts, new_tokens)
    poison(model)
    bucketed = Bucketed(model, config)
    found = decode(bucketed, config, prompts, new_tokens)
    model.close()
    return wanted, found, bucketed


def test_the_references_ids_over_larger_buckets():
    """Decodes and prompt chunks of several sequences, alone and mixed."""
    options = {"max_num_batched_tokens": 40, "max_num_seqs": 6, "num_blocks": 24, "block_size": 16}
    lengths = (5, 37, 1, 18, 2)
    (ids, logits), (found, seen), bucketed = both_ways("cpu", "float32", lengths, 6, **options)
    assert found == ids
    for mine, theirs in zip(seen, logits, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)
    assert bucketed.padded > 5


def test_plain_kernels_keep_their_bits_over_larger_buckets():
    """In numba's simulator: a prompt of three tokens with a decode beside it, then two decodes."""
    options = {"max_num_batched_tokens": 5, "max_num_seqs": 2, "num_blocks": 4, "block_size": 4}
    options |= {"max_model_len": 8, "prefix_caching": False}
    (ids, logits), (found, seen), bucketed = both_ways("cuda", "bfloat16", (1, 3), 2, **options)
    assert found == ids
    for mine, theirs in zip(seen, logits, strict=True):
        assert (mine.view(np.uint32) == theirs.view(np.uint32)).all()
    assert bucketed.padded > 0


def test_ops_are_told_the_real_counts():
    told = {}

    def takes(name):
        return lambda *args, num_rows=None: told.update({name: num_rows})

    def takes_not(*args):
        told["rope_store_kv"] = "nothing"

    names = ("embedding", "gemm", "lm_head", "sample", "decode_attention")
    ops = SimpleNamespace(**{name: takes(name) for name in names}, rope_store_kv=takes_not)
    for fn in vars(counted(ops, "tokens", "rows")).values():
        fn()
    assert told == {
        "embedding": "tokens", "gemm": "tokens", "lm_head": "rows", "sample": "rows",
        "decode_attention": None, "rope_store_kv": "nothing",
    }  # fmt: skip
    assert uncounted(ops) == ("rope_store_kv",)
    assert takes_count(ops.gemm)


def test_what_an_engine_takes_on_hopper_is_all_told():
    """Also beside ops that the forward never launches by themselves: only so is all captured at the start."""
    small = (*SMALL_OPS, "sample")
    ops = resolve("plain", {"gemm": "hopper", **dict.fromkeys(small, "warp")})
    assert {"rope", "store_kv"} <= set(vars(ops))
    assert uncounted(counted(ops, "tokens", "rows")) == ()
    ops = resolve(
        "plain", {"gemm": "hopper", **dict.fromkeys(set(small) - {"rms_norm", "rope_store_kv"}, "warp")}
    )
    assert set(uncounted(ops)) == {"rms_norm", "rope_store_kv"}


def test_the_fast_gemm_takes_the_count():
    assert takes_count(OPS["gemm"].rungs["hopper"])
    assert not takes_count(OPS["gemm"].rungs["plain"])
