# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention over pages
#
# Where keys and values lie, the way of one query through them, who does what in a batch of prompts, and what
# the heads of a real model look at. Everything here runs without a GPU: the definition and its order of
# operations are numpy, and the Hopper kernel's own text runs on numpy arrays.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import sharp
from kernels_numba import attention_contract as contract
from kernels_numba.ops.prefill_attention.config import PrefillConfig, smem_plan
from kernels_numba.ops.prefill_attention.in_numpy import in_numpy
from kernels_numba.ops.prefill_attention.scores import attention_scores
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.model import Model
from sharp.model_config import ModelFileError
from sharp.pull import resolve
from sharp.request import SamplingParams

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE = 64

# %% [markdown]
# ## The page table
# A cache is `[num_blocks, num_kv_heads, 64, head_dim]`; a sequence owns some of its pages, in any order, and
# `block_table` says which. Here: four sequences in a cache of 48 pages. The number in a page is its place in
# the sequence; what is pale is owned and not yet written.

# %%
rng = np.random.default_rng(0)
context_lens = np.array([900, 130, 1300, 64], np.int32)
query_lens = np.array([50, 1, 100, 64], np.int32)  # two chunks, a decode, a prompt
counts = -(-context_lens // PAGE)
order = rng.permutation(48).astype(np.int32)
block_table = np.full((4, counts.max()), -1, np.int32)
block_table[np.arange(counts.max()) < counts[:, None]] = order[: counts.sum()]

figure, axis = plt.subplots(figsize=(9, 2.6))
colours = ("#2b6cb0", "#dd8b2f", "#2f855a", "#9b2c2c")
for page in range(48):
    axis.add_patch(plt.Rectangle((page % 24, page // 24), 0.92, 0.92, facecolor="#eeeeee"))
for seq, colour in enumerate(colours):
    for place, page in enumerate(block_table[seq, : counts[seq]]):
        at, filled = (page % 24, page // 24), min(1.0, (context_lens[seq] - place * PAGE) / PAGE)
        axis.add_patch(plt.Rectangle(at, 0.92, 0.92, facecolor=colour, alpha=0.25))
        axis.add_patch(plt.Rectangle(at, 0.92 * filled, 0.92, facecolor=colour))
        axis.text(at[0] + 0.46, at[1] + 0.46, place, ha="center", va="center", color="white", fontsize=8)
axis.set(xlim=(0, 24), ylim=(2, 0), xticks=[], yticks=[], title="48 pages, four sequences")
axis.set_aspect("equal")
plt.show()

# %% [markdown]
# ## One query's way
# Keys are taken in tiles of 128, eight of them a split of 1,024, both counted from key 0. A split starts from
# nothing and leaves (m, l, o): its largest score, its sum of weights, their sum over values. What is left is
# folded from left to right. Nothing else decides a row's bits (`kernels_numba/attention_contract.py`), so a
# token has the same bits as part of a prompt, of a chunk, and as a decode.

# %%
heads, group, dim = 1, 2, 64
caches = [rng.standard_normal((48, heads, PAGE, dim)).astype(BF16) for _ in range(2)]
q = (2 * rng.standard_normal((int(query_lens.sum()), heads * group, dim))).astype(BF16)
cu_seqlens_q = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)


def keys_values(seq):
    pages = block_table[seq, : counts[seq]]
    return [cache[pages, 0].reshape(-1, dim)[: context_lens[seq]].astype(np.float32) for cache in caches]


def rounded(x):
    return x.astype(BF16).astype(np.float32)


k, v = keys_values(2)
row = q[cu_seqlens_q[3] - 1].astype(np.float32)  # the last token of the chunk, both of its heads
length, c = len(k), contract.exponent_scale(dim**-0.5)
nothing = contract.State(
    np.full(2, -np.inf, np.float32), np.zeros(2, np.float32), np.zeros((2, dim), np.float32)
)
state = nothing
for split in contract.split_range(length):
    one = contract.attend_split(row, k, v, split, length, 0, c, rounded)
    state = contract.fold(state, one)
    keys = min(length, (split + 1) * contract.SPLIT) - split * contract.SPLIT
    print(f"split {split}: {keys:4} keys, m {one.m[0]:6.2f}, l {one.l[0]:7.2f}; folded l {state.l[0]:7.2f}")
result, lse = contract.finish(state)
scores = row @ k.T * dim**-0.5
weights = np.exp(scores - scores.max(axis=1, keepdims=True))
exact = weights / weights.sum(axis=1, keepdims=True) @ v
print(f"from attention written down plainly: {np.abs(result - exact).max():.1e}")

# %% [markdown]
# ## The kernel, bit by bit
# `in_numpy` executes the text of the Hopper kernel: its warps are threads that go on in a random order (the
# seed), its products are not done before they are waited for. It must give what the contract gives, to the
# last bit, in any order of events.

# %%
config = PrefillConfig(dim)
print(smem_plan(config).picture())
want = np.concatenate(
    [
        np.stack(
            [
                contract.attention(
                    q[t].astype(np.float32),
                    *(x[: context_lens[seq] - (cu_seqlens_q[seq + 1] - 1 - t)] for x in keys_values(seq)),
                    dim**-0.5, rounded,
                )[0]
                for t in range(cu_seqlens_q[seq], cu_seqlens_q[seq + 1])
            ]
        )
        for seq in range(4)
    ]
).astype(BF16)  # fmt: skip
for seed in range(3):
    out = np.zeros(q.shape, BF16)
    arrays = [x.view(np.uint16) for x in (out, q, *caches)]
    in_numpy(
        config, *arrays, cu_seqlens_q, context_lens, block_table, softmax_scale=dim**-0.5, grid=3, seed=seed
    )
    print(f"seed {seed}: {(out.view(np.uint16) != want.view(np.uint16)).sum()} of {out.size} elements differ")

# %% [markdown]
# ## Who does what
# Work is cut into items: 128 rows of a sequence's kv head, a row being (token, head of the group). Items are
# numbered by how many tiles of keys they see, the most first; an SM that is free takes the next number.
# Below: 64 prompts of 16 to 2,048 tokens, 8 kv heads of 4 query heads, 132 SMs, an item costing one for each
# tile and two beside. Counted, not measured.

# %%
lens = np.random.default_rng(0).integers(16, 2049, 64)
items = [
    -(-min((tile + 1) * config.tile_rows // 4, n) // contract.TILE) + 2
    for n in lens.tolist()
    for tile in range(-(-n * 4 // config.tile_rows))
    for _ in range(8)
]


def spread(costs, sms=132):
    """(start, cost, SM) of each item, each taken by the SM that is free first."""
    free, placed = np.zeros(sms), []
    for cost in costs:
        sm = int(free.argmin())
        placed.append((free[sm], cost, sm))
        free[sm] += cost
    return placed, free.max()


figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
for axis, (name, costs) in zip(
    axes, {"as they come": items, "most tiles first": sorted(items, reverse=True)}.items(), strict=True
):
    placed, end = spread(costs)
    for start, cost, sm in placed:
        axis.barh(sm, cost, left=start, color=plt.cm.viridis(cost / max(items)), height=1.0)
    axis.set(ylabel="SM", title=f"{name}: {sum(items) / (132 * end):.1%} busy", yticks=[])
axes[1].set_xlabel("tiles of keys")
plt.show()

# %% [markdown]
# ## What a model looks at
# `attention_scores` makes the probabilities that attention never stores, for a head and the tokens one asks
# for. The demo model is taken if it was pulled, else the tiny random one.

# %%
TINY = Path(sharp.__file__).resolve().parent.parent / "weights" / "tiny"
try:
    path = resolve("smollm2-135m-instruct")
except ModelFileError:
    path = TINY
engine_config = EngineConfig(device="cpu", max_num_batched_tokens=128, max_num_seqs=1, num_blocks=8)
model = Model.load(path, engine_config)
seen = []
attend = model.ops.prefill_attention


def spy(out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, **how):
    attend(out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table, **how)
    seen.append((q.copy(), k_cache, block_table[0].copy(), int(context_lens[0]), how["softmax_scale"]))


model.ops.prefill_attention = spy
engine = Engine(model, model.tokenizer, engine_config)
text = "The cat sat on the mat because it was warm. The dog sat on the"
tokens = model.tokenizer.encode(text)
engine.add_request(tokens, SamplingParams(max_tokens=1, temperature=0.0))
engine.step()
model.ops.prefill_attention = attend
words = [model.tokenizer.decode([token]) for token in tokens]
print(len(seen), "layers,", len(tokens), "tokens")

# %%
layers = sorted({0, len(seen) // 3, 2 * len(seen) // 3, len(seen) - 1})
figure, axes = plt.subplots(1, len(layers), figsize=(3.2 * len(layers), 3.6), squeeze=False)
for axis, layer in zip(axes[0], layers, strict=True):
    queries, k_cache, pages, context, scale = seen[layer]
    p = attention_scores(queries, k_cache, pages, context, 0, range(len(tokens)), softmax_scale=scale)
    axis.imshow(p**0.5, cmap="magma", vmin=0, vmax=1)
    axis.set_title(f"layer {layer}, head 0", fontsize=9)
    axis.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
    axis.set_yticks(range(len(words)), words, fontsize=6)
plt.tight_layout()
plt.show()
print(f"each row sums to 1 within {np.abs(p.sum(axis=1) - 1).max():.1e}")
