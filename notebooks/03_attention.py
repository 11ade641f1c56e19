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
# Where keys and values lie, the way of one query through them, who does what in a batch of prompts, how fast
# that can be, and what the heads of a real model look at. Everything here runs without a GPU: the definition
# and its order of operations are numpy, and the Hopper kernel's own text runs on numpy arrays. With a Hopper
# GPU the schedule is read off its clocks and the speeds are its own; elsewhere the one is counted, and the
# other was recorded.

# %%
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

import sharp
from kernels_numba import attention_contract as contract
from kernels_numba import compiler
from kernels_numba.bench.peers import datasheet
from kernels_numba.compiler import cuda
from kernels_numba.ops.decode_attention import decode_attention_cost, decode_attention_hopper
from kernels_numba.ops.prefill_attention import prefill_attention_cost, prefill_attention_hopper
from kernels_numba.ops.prefill_attention.clocks import attend_clocked
from kernels_numba.ops.prefill_attention.config import PrefillConfig, smem_plan
from kernels_numba.ops.prefill_attention.in_numpy import in_numpy
from kernels_numba.ops.prefill_attention.scores import attention_scores
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.model import Model
from sharp.model_config import ModelFileError
from sharp.pull import resolve
from sharp.request import SamplingParams
from sharp.results import read_rows

GPU = compiler.AVAILABLE and not compiler.SIMULATOR and cuda.is_available()
HOPPER = GPU and tuple(cuda.get_current_device().compute_capability) == (9, 0)
print(
    "schedule and speeds: " + ("those of this GPU" if HOPPER else "counted, and recorded; no Hopper GPU here")
)

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
# Work is cut into items: 192 rows of a sequence's kv head (128 where head_dim is 128), a row being (token,
# head of the group). Items are numbered by how many tiles of keys they see, the most first; an SM that is
# free takes the next number. A decode beside prompts is an item too, of as many rows as its group has heads:
# so a mixed step can be one launch. Below: 64 prompts of 16 to 2,048 tokens, 8 kv heads of 4 query heads, 132
# SMs, an item costing one for each tile and one beside (an H100's clocks say 1.6 and 1.7 us): counted here.

# %%
ROWS, GROUP, KV_HEADS = config.tile_rows, 4, 8
lens = np.random.default_rng(0).integers(16, 2049, 64)


def tiles_seen(length, first_row):
    """Tiles of keys that an item from this row of a prompt on sees."""
    return -(-min(-(-(first_row + ROWS) // GROUP), length) // contract.TILE)


costs = [tiles_seen(n, row) + 1 for n in lens.tolist() for row in range(0, n * GROUP, ROWS) for _ in range(8)]


def spread(costs, sms=132):
    """(start, end, SM, tiles) of each item, each taken by the SM that is free first."""
    free, placed = np.zeros(sms), []
    for cost in costs:
        sm = int(free.argmin())
        placed.append((free[sm], free[sm] + cost, sm, cost - 1))
        free[sm] += cost
    return placed


def draw(axis, placed, title, sms=132):
    """A bar an item, its colour by the tiles that it sees."""
    start, end, sm, tiles = np.array(placed, float).T
    colours = plt.cm.viridis(tiles / tiles.max())
    axis.barh(sm, end - start, left=start, color=colours, height=1.0)
    busy = (end - start).sum() / (sms * end.max())
    axis.set(ylabel="SM", title=f"{title}: {busy:.1%} busy", yticks=[])


figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
draw(axes[0], spread(costs), "as they come")
draw(axes[1], spread(sorted(costs, reverse=True)), "most tiles first")
axes[1].set_xlabel("tiles of keys")
plt.show()

# %% [markdown]
# On a Hopper GPU, the same batch by the kernel's debug build: `Build(clock=True)` lets the warp that hands
# items out read the clock (`kernels_numba/ops/prefill_attention/clocks.py`). What it costs beside the kernel
# as it is shows in the two times.

# %%
pool = rng.standard_normal(4_000_037).astype(BF16).view(np.uint16)  # a prime: no two pages are equal


def on_device(query_lens, context_lens, heads, kv_heads, head_dim):
    """(out, q, k_cache, v_cache, cu_seqlens_q, context_lens, block_table) of random numbers on the GPU."""
    counts = -(-np.asarray(context_lens) // PAGE)
    table = np.full((len(counts), counts.max()), -1, np.int32)
    pages = np.random.default_rng(1).permutation(counts.sum()).astype(np.int32)
    table[np.arange(counts.max()) < counts[:, None]] = pages
    shape = (int(sum(query_lens)), heads, head_dim)
    caches = [np.resize(pool[at:], (len(pages), kv_heads, PAGE, head_dim)) for at in (0, 7)]
    cu = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    arrays = (np.zeros(shape, np.uint16), np.resize(pool, shape), *caches, cu, np.int32(context_lens), table)
    return [cuda.to_device(array) for array in arrays]


def microseconds(call, calls=20):
    """The best of five bursts."""
    call()
    best, start, end = float("inf"), cuda.event(), cuda.event()
    for _ in range(5):
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / calls)
    return best


if HOPPER:
    arrays, scale = on_device(lens, lens, GROUP * KV_HEADS, KV_HEADS, dim), dim**-0.5
    attend_clocked(*arrays, softmax_scale=scale)  # compiled, and warm
    items = attend_clocked(*arrays, softmax_scale=scale)
    usual = microseconds(partial(prefill_attention_hopper, *arrays, softmax_scale=scale))
    seen_tiles = [tiles_seen(int(lens[item["seq"]]), int(item["first_row"])) for item in items]
    placed = list(zip(items["start_us"], items["end_us"], items["sm"], seen_tiles, strict=True))
    figure, axis = plt.subplots(figsize=(9, 3))
    sms = cuda.get_current_device().MULTIPROCESSOR_COUNT
    draw(axis, placed, f"{len(items)} items on this GPU", sms)
    axis.set_xlabel("microseconds")
    plt.show()
    took = items["end_us"].max()
    print(f"{took:.0f} us from the first start to the last end; a whole launch without clocks {usual:.0f} us")
    slope, base = np.polyfit(seen_tiles, items["end_us"] - items["start_us"], 1)
    print(f"an item takes {base:.1f} us and {slope:.2f} more for each tile")
else:
    print("no Hopper GPU here: nothing to read clocks on")

# %% [markdown]
# ## How fast
# A prompt's queries share its keys, so it is short of arithmetic; a decode reads every key for a few products
# and is short of bandwidth. Work over traffic says which: left of the edge the roof is memory, right of it
# the tensor cores. Each number read or written is counted once.

# %%
HEADS = (32, 8, 128)
BATCHES = {
    "8 prompts of 2,048": ([2048] * 8, [2048] * 8),
    "64 prompts of 16 to 2,048": (lens.tolist(), lens.tolist()),
    "chunk of 512 behind 8,192": ([512], [8704]),
    "64 decodes of 4,096, as chunks": ([1] * 64, [4096] * 64),
    "64 decodes of 4,096": None,
}
KINDS = {"prefill_attention": "o", "decode_attention": "s"}


def measured_points():
    """(op, name, flops a byte, TFLOP/s) on this GPU."""
    for name, lengths in BATCHES.items():
        queries, contexts = lengths or ([1] * 64, [4096] * 64)
        out, q, k, v, cu, context_lens, table = on_device(queries, contexts, *HEADS)
        how = {"softmax_scale": HEADS[2] ** -0.5}
        if lengths is None:
            op, cost = "decode_attention", decode_attention_cost(contexts, *HEADS)
            call = partial(decode_attention_hopper, out, q, k, v, context_lens, table, **how)
        else:
            op, cost = "prefill_attention", prefill_attention_cost(queries, contexts, *HEADS)
            call = partial(prefill_attention_hopper, out, q, k, v, cu, context_lens, table, **how)
        yield op, name, cost.intensity, cost.flops / microseconds(call) / 1e6


def recorded_points():
    """The same of the rows in notebooks/results."""
    for row in read_rows():
        if row["op"] in KINDS and row["rung"] == "hopper" and row["tflops"] and row["gbs"]:
            yield row["op"], row["case"], 1e3 * row["tflops"] / row["gbs"], row["tflops"]


points = list(measured_points() if HOPPER else recorded_points())
where = str(cuda.get_current_device().name) if HOPPER else "NVIDIA H100 80GB HBM3"
peaks = datasheet(where)
figure, axis = plt.subplots(figsize=(9, 4))
if peaks:
    x = np.geomspace(1, 1e4, 200)
    axis.loglog(x, np.minimum(x * peaks.bytes_per_s, peaks.flops_per_s) / 1e12, color="#888888")
for op, marker in KINDS.items():
    mine = np.array([point[2:] for point in points if point[0] == op]).reshape(-1, 2)
    axis.loglog(*mine.T, marker, label=op.replace("_", " "))
axis.set(xlabel="flops a byte", ylabel="TFLOP/s", title=where + (", measured" if HOPPER else ", recorded"))
axis.legend()
plt.show()
for op, name, intensity, tflops in sorted(points, key=lambda point: point[2]):
    roof = min(intensity * peaks.bytes_per_s, peaks.flops_per_s) / 1e12 if peaks else None
    share = f", {tflops / roof:.1%} of its roof" if roof else ""
    print(f"{op:17} {name:32} {intensity:7.1f} flops a byte, {tflops:6.1f} TFLOP/s{share}")

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
