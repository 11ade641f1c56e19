# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The budget: what memory goes to, and how long a step takes
#
# An engine that promises answers must know two things before the first request: how many tokens of keys
# and values fit, and how many tokens a step may have. Both are measured here, on this machine, by the
# function that `sharp probe MODEL` calls. The demo model is taken if it was pulled, else the tiny random one.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import sharp
from sharp.budget import plan_memory
from sharp.config import EngineConfig, ModelConfig
from sharp.model_config import ModelFileError
from sharp.probe_cache import get_probe
from sharp.weights import open_checkpoint

GIB, MIB = 1 << 30, 1 << 20
TINY = Path(sharp.__file__).resolve().parent.parent / "weights" / "tiny"
try:
    checkpoint = open_checkpoint("smollm2-135m-instruct")
except ModelFileError:
    checkpoint = open_checkpoint(TINY)
model = checkpoint.config
probe = get_probe(checkpoint.path, EngineConfig(device="cpu"), say=print)
print(f"{probe.free / GIB:.1f} GiB free of {probe.total / GIB:.1f} before loading, {probe.seconds:.0f} s")

# %% [markdown]
# ## Named terms, predicted beside measured
# The prediction is arithmetic on shapes (`sharp/budget.py`), made before anything is allocated; the
# measurement is how far resident memory rose. `reserve` is what the budget leaves free; measured, it is the
# peak of the steps over all buffers: what numpy takes for its temporary arrays. (On a GPU `forward` allocates
# nothing, and the reserve is for what CUDA takes by itself.)

# %%
probe.budget

# %%
terms = [term for term in probe.memory if term.measured is not None]
rows = np.arange(len(terms))
figure, axis = plt.subplots(figsize=(7, 2.6))
axis.barh(rows - 0.2, [t.predicted / MIB for t in terms], 0.38, color="#2b6cb0", label="predicted")
axis.barh(rows + 0.2, [t.measured / MIB for t in terms], 0.38, color="#dd8b2f", label="measured")
for row, term in zip(rows, terms, strict=True):
    error = "no prediction" if not term.predicted else f"{term.error:+.1%}"
    axis.text(max(term.predicted, term.measured) / MIB, row, f"  {error}", va="center", fontsize=9)
axis.set_yticks(rows, [term.name for term in terms])
axis.invert_yaxis()
axis.margins(x=0.18)
axis.set_xlabel("MiB")
axis.legend(loc="best")
figure.tight_layout()

# %% [markdown]
# ## A step's time against its tokens
# Points are measured (medians); lines are `StepCurve.predict`, piecewise linear and never falling, which a
# scheduler can ask before it plans a step. Small steps cost nearly the same whatever they hold: the weights
# are read once for all tokens. The knee is the smallest step whose throughput is within 10 % of the best:
# smaller ones waste the machine, larger ones only add latency.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
knee = probe.propose()
first = probe.prefill.contexts[0]
for axis, title, unit, curve in (
    (axes[0], "prefill", "tokens in the step", probe.prefill),
    (axes[1], "decode", "sequences in the step", probe.decode),
):
    smooth = np.unique(np.geomspace(1, curve.tokens[-1], 80).astype(int))
    for context, colour in zip(curve.contexts, ("#2b6cb0", "#dd8b2f"), strict=False):
        points = [(t, 1e3 * s) for t, c, s in curve.points if c == context]
        axis.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
        line = [1e3 * curve.predict(int(t), context) for t in smooth]
        axis.plot(smooth, line, color=colour, linewidth=1, label=f"context {context}")
    axis.set(title=title, xlabel=unit, ylabel="ms", xscale="log", yscale="log")
    axis.legend(fontsize=8)
rates = [probe.prefill.throughput(t, first) for t in probe.prefill.tokens]
axes[2].plot(probe.prefill.tokens, rates, "o-", color="#2b6cb0", markersize=4, linewidth=1)
axes[2].axhline(0.9 * max(rates), color="grey", linewidth=0.8, linestyle=":", label="90 % of the best")
axes[2].set(title=f"prefill throughput, context {first}", xlabel="tokens in the step", ylabel="tokens/s")
axes[2].set_xscale("log")
for axis in (axes[0], axes[2]):
    axis.axvline(probe.prefill.knee(first), color="#2a9d4b", linestyle="--", linewidth=1, label="knee")
    axis.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## From curves to options
# Without a target the step budget is the knee (but each running sequence must fit with its one token). With a
# target for the time between two tokens, it is the largest step predicted to stay under it at the longest
# context measured.

# %%
print(f"no target: max_num_batched_tokens {knee.max_num_batched_tokens}: {knee.why}")
longest = max(probe.prefill.contexts[-1], probe.decode.contexts[-1])
slowest = max(probe.prefill.predict(1, longest), probe.decode.predict(1, longest)) * 1e3
for factor in (1.5, 3, 6):
    found = probe.propose(factor * slowest)
    print(f"{factor * slowest:.3g} ms: max_num_seqs {found.max_num_seqs}; {found.why}")

# %% [markdown]
# ## What another card would hold
# `memory_limit` is the memory of a smaller device: `LLM(model, memory_limit=8 << 30)` behaves on any card as
# on one of 8 GiB, the CUDA context and the weights included. The same arithmetic says it without a card, in
# bfloat16: for this model, and for the shapes of Llama-3.2-1B (from its `config.json`).

# %%
llama_1b = ModelConfig(
    architecture="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
    num_q_heads=32, num_kv_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=5e5,
    max_position_embeddings=131072, tie_word_embeddings=True,
)  # fmt: skip
PARTS = ("context", "weights", "activations", "logits", "rope_table", "reserve", "kv_pages")
COLOURS = ("#9a9a9a", "#2b6cb0", "#63a0d4", "#9cc4e4", "#c9dff0", "#d9d9d9", "#2a9d4b")
figure, axis = plt.subplots(figsize=(8, 2.8))
labels = []
for name, shapes in ((checkpoint.path.stem[:12], model), ("Llama-3.2-1B", llama_1b)):
    for card in (8, 24):
        options = EngineConfig(memory_limit=card * GIB, max_num_batched_tokens=2048, max_num_seqs=256)
        budget = plan_memory(
            shapes, options, free=80 * GIB, dtype="bfloat16", kind="cuda",
            max_model_len=shapes.max_position_embeddings,
        )  # fmt: skip
        left = 0.0
        for part, colour in zip(PARTS, COLOURS, strict=True):
            size = getattr(budget, part) / GIB
            axis.barh(len(labels), size, left=left, color=colour, label=part if not labels else None)
            left += size
        held = budget.num_blocks * options.block_size
        axis.text(left, len(labels), f"  {held:,} tokens in pages", va="center", fontsize=9)
        labels.append(f"{name}, {card} GiB")
        assert left <= card
axis.set_yticks(range(len(labels)), labels)
axis.invert_yaxis()
axis.margins(x=0.45)
axis.set_xlabel("GiB")
figure.legend(*axis.get_legend_handles_labels(), fontsize=8, ncol=7, loc="upper center", frameon=False)
figure.tight_layout(rect=(0, 0, 1, 0.92))

# %% [markdown]
# A model that cannot fit is refused before it is loaded, with the figures and the known models that fit.

# %%
from sharp.fits import refuse_if_too_large

try:
    refuse_if_too_large(
        llama_1b, EngineConfig(memory_limit=2 * GIB), where="Llama-3.2-1B", free=80 * GIB, dtype="bfloat16",
        kind="cuda", max_model_len=4096,
    )  # fmt: skip
except MemoryError as error:
    print(error)
