"""The whole forward: numpy reference and plain kernels (in the simulator), alone, packed and cut."""

from __future__ import annotations

from dataclasses import replace

import family_checks
import numpy as np
import pytest
from engine_checks import TINY, check_same_bits, decode, load
from model_files import MemorySource

from kernels_numba import compiler
from sharp.config import EngineConfig
from sharp.device import HostDevice, open_device
from sharp.plan import BatchPlan
from sharp.rope import RopeScaling, rope_table
from sharp.staging import stage, staging_bytes
from sharp.weights import Checkpoint, open_checkpoint

PROMPTS = [[5, 9, 17, 3, 250, 44, 81], [7], [11, 12, 13], list(range(20, 150))]
TOY = [[5, 9, 17], [7]]  # for the simulator, which runs some thousands of threads a second


def test_reference_alone_packed_and_cut():
    check_same_bits("cpu", "float32", PROMPTS, 6, (1, 2, 5, 63, 64, 65), exact=False)


@pytest.mark.parametrize("name", ["qwen2_window", "qwen3_window", "mistral_window", "qwen3_yarn"])
def test_reference_alone_packed_and_cut_with_switches(tmp_path, name):
    """Prompts longer than the windows, through the scheduler."""
    path = family_checks.write_directory(tmp_path / name, name)
    prompts = [list(range(5, 45)), [7], list(range(60, 40, -1))]
    check_same_bits("cpu", "float32", prompts, 6, (1, 5, 9, 13), exact=False, path=path)


@pytest.mark.parametrize("cut", range(1, 30))
def test_reference_cut_at_any_token(cut):
    model, config = load(TINY, "cpu", "float32", num_blocks=8)
    prompt = list(range(40, 70))
    whole, _ = decode(model, config, [prompt], 4)
    chunked = EngineConfig(num_blocks=8, long_prefill_token_threshold=cut)
    assert decode(model, chunked, [prompt], 4)[0] == whole


def test_plain_kernels_give_the_references_ids_and_keep_their_bits():
    assert compiler.cuda.is_available()  # the simulator; raises KernelsUnavailable without numba.cuda
    ids, logits = check_same_bits("cuda", "float32", TOY, 2, (2,), exact=True)
    model, config = load(TINY, "cpu", "float32", num_blocks=8)
    expected_ids, expected = decode(model, config, TOY, 2)
    assert ids == expected_ids
    for ours, theirs in zip(logits, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4, rtol=1e-4)


def test_plain_kernels_in_bfloat16_follow_the_rounded_reference():
    assert compiler.cuda.is_available()
    runs = {}
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "bfloat16"), ("cpu", "float32")):
        model, config = load(TINY, device, dtype, num_blocks=8, max_num_batched_tokens=64, max_num_seqs=8)
        runs[device, dtype] = decode(model, config, TOY, 1)[1]
    for ours, theirs, truth in zip(*runs.values(), strict=True):
        # The same rounding points: as far from float32 as the rounded reference is, within a factor of 2.
        assert np.abs(ours - truth).max() <= 2 * np.abs(theirs - truth).max()


class Everything(Checkpoint):
    """A model of all switches at once, too small for a tokenizer: the simulator runs it in seconds."""

    def __init__(self):
        rope = RopeScaling("yarn", factor=2.0, original_positions=16, attention_factor=1.2)
        sizes = {
            "vocab_size": 20,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_q_heads": 2,
            "num_kv_heads": 1,
        }
        config = replace(
            open_checkpoint(TINY).config, **sizes, head_dim=4, qkv_bias=True, qk_norm=True, rope=rope,
            sliding_window=2, full_layers=(1,), max_position_embeddings=32,
        )  # fmt: skip
        super().__init__(MemorySource(config))

    def tokenizer(self):
        return None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_kernels_keep_their_bits_with_every_switch(dtype):
    assert compiler.cuda.is_available()
    ids, stranger = [3, 7, 19, 0, 5], [4, 4]
    model = family_checks.load_model(Everything(), "cuda", dtype)
    ways = {"cut": [3], "decoded": [3, 4]}
    logits = family_checks.check_same_bits(model, ids, ways, stranger)
    if dtype == "float32":
        reference = family_checks.load_model(Everything())
        expected = family_checks.in_pieces(reference, ids, [])
        assert expected.std() > 0.3
        np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_wrong_position_shows():
    """The check above can fail: rotate by the wrong angle, and ids change."""
    model, config = load(TINY, "cpu", "float32", num_blocks=8)
    right, _ = decode(model, config, PROMPTS, 6)
    model.cos_sin[:] = np.roll(model.cos_sin, 1, axis=0)
    model.cos_sin[0] = model.cos_sin[5]
    assert decode(model, config, PROMPTS, 6)[0] != right


def test_rope_table_is_the_formula():
    model, _ = load(TINY, "cpu", "float32", num_blocks=2)
    table = rope_table(model.config.rope, model.config.rope_theta, model.config.head_dim, 50)
    half = model.config.head_dim // 2
    for position in (0, 1, 7, 49):
        for pair in range(half):
            angle = position * model.config.rope_theta ** (-2 * pair / model.config.head_dim)
            assert table[position, pair] == pytest.approx(np.cos(angle), abs=2e-6)
            assert table[position, half + pair] == pytest.approx(np.sin(angle), abs=2e-6)


def test_a_step_over_the_workspace_is_refused():
    model, _ = load(TINY, "cpu", "float32", num_blocks=8, max_num_batched_tokens=8, max_num_seqs=4)
    larger = EngineConfig(num_blocks=8)
    with pytest.raises(ValueError, match=r"30 tokens .* over the workspace of 8 tokens"):
        decode(model, larger, [list(range(30))], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1 << 20}, "max_model_len 1048576 is over the model's"),
        ({"rungs": {"gemm": "plain"}}, "rung 'plain' of gemm does not run on device 'cpu'"),
        ({"rungs": {"gemm": "hopper"}}, "'hopper' of gemm .* capability 9.0, here is no GPU"),
        ({"rungs": {"prefill_attention": "hopper"}}, "'hopper' of prefill_attention .* here is no GPU"),
        ({"rungs": {"gemm": "nonsense"}}, "no rung 'nonsense'"),
        ({"rungs": {"nonsense": "plain"}}, "no op 'nonsense'"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_the_door(options, message):
    with pytest.raises(ValueError, match=message):
        load(TINY, "cpu", "float32", **options)


def test_pages_that_do_not_fit_are_refused_with_the_figures():
    with pytest.raises(MemoryError, match=r"KV pages need .* bytes, but .* remain"):
        load(TINY, "cpu", "float32", num_blocks=1 << 30)


def test_the_budgets_terms_add_up():
    model, config = load(TINY, "cpu", "float32")
    budget = model.budget
    work = model.work
    measured = sum(a.nbytes for a in (work.residual, work.x, work.qkv, work.attention))
    measured += work.gate_up.nbytes + work.act.nbytes + work.x_rows.nbytes
    assert budget.activations == measured
    c = model.config
    columns = 2 * c.hidden_size + (2 * c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    elements = config.max_num_batched_tokens * (columns + 3 * c.intermediate_size) + work.x_rows.size
    assert budget.activations == elements * 4
    assert work.x_rows.shape == (config.max_num_seqs, c.hidden_size)
    assert budget.logits == work.logits.nbytes
    assert budget.staging == work.sampled.nbytes
    assert budget.workspaces == budget.arena == 0
    assert budget.rope_table == model.cos_sin.nbytes
    assert budget.kv_pages == sum(cache.k.nbytes + cache.v.nbytes for cache in model.kv)
    assert sum(v for k, v in budget.terms().items() if k != "free") <= budget.free


def test_the_largest_step_fits_the_staging_buffers():
    """As many sequences, pages and tokens as can be: no array of the plan crosses that was not counted."""
    seqs, pages, tokens = 3, 4, 24
    counts = np.full(seqs, tokens // seqs, np.int32)
    plan = BatchPlan(
        step=1,
        request_ids=("a", "b", "c"),
        num_decodes=0,
        token_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_lens=counts,
        block_table=np.zeros((seqs, pages), np.int32),
        slot_mapping=np.zeros(tokens, np.int32),
        logits_rows=np.cumsum(counts).astype(np.int32) - 1,
        temperatures=np.zeros(seqs, np.float32),
        top_ks=np.zeros(seqs, np.int32),
        top_ps=np.ones(seqs, np.float32),
        seeds=np.zeros(seqs, np.uint64),
        output_indices=np.zeros(seqs, np.int32),
        num_logprobs=np.zeros(seqs, np.int32),
    )
    sizes = []

    class Measured(HostDevice):
        def stage(self, arrays):
            sizes.extend(-(-max(array.nbytes, 1) // 16) * 16 for array in arrays.values())  # as CudaDevice
            return super().stage(arrays)

    stage(plan, Measured("float32"))
    most = staging_bytes(tokens, seqs, pages)
    assert sum(sizes) <= most <= sum(sizes) + 16 * len(sizes) + 64


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", id="plain")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_are_copied_where_they_are(device, dtype):
    """ "cuda" is numba's simulator here; a GPU copies pages in test_preemption_model.py."""
    target = open_device(device, dtype)
    values = np.random.default_rng(0).standard_normal((5, 2, 4, 3)).astype(np.float32)
    pages = target.upload_float(values)
    before = np.array(target.download(pages))
    target.copy_rows(pages, np.array([[0, 3], [0, 1], [4, 2]], np.int32))
    after = np.array(target.download(pages))
    assert (after == before[[0, 0, 4, 0, 4]]).all()
    target.copy_rows(pages, np.empty((0, 2), np.int32))
    assert (np.array(target.download(pages)) == after).all()
    target.close()
