# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Tensor cores: a GEMM in five rungs
#
# `out[M, N] = x[M, K] @ weight[N, K]^T`, bfloat16 in and out, sums in float32. Five kernels, each the one
# before plus one idea:
#
# | rung | new idea | what multiplies | expected on an H100 at 4096³ |
# |---|---|---|---|
# | `naive` | a thread an output | `fma` of one thread | about 1 TFLOP/s |
# | `plain` | tiles in shared memory, used many times | `fma` of one thread | 10 to 25 |
# | `mma_step` | tensor cores, loads in the background | `mma.sync`: a warp, 16 x 8 x 16 | 150 to 350 |
# | `wgmma` | operands stay in shared memory, a copy engine | `wgmma`: 4 warps, 64 x 128 x 16 | 400 to 600 |
# | `hopper` | who loads never multiplies, blocks live on | `wgmma`, always one in flight | 750 to 800 |
#
# The last column is what we expected when we wrote this, not a measurement; measurements are at the end. No
# GPU is needed: without one, kernels run in numba's simulator or in numpy, and are compiled to machine code.

# %%
import dataclasses
import inspect
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Code, display

import kernels_numba
from kernels_numba import compiler, simt
from kernels_numba.assemble import ToolsMissing
from kernels_numba.bench.peers import datasheet
from kernels_numba.compiler import KernelsUnavailable, cuda
from kernels_numba.cost import roofline_fraction
from kernels_numba.disassemble import disassemble
from kernels_numba.layouts import banks_of, mma_layout, unit_offset
from kernels_numba.ops import OPS
from kernels_numba.ops.gemm import gemm_cost, gemm_spec, hopper, make_gemm_kernel
from kernels_numba.ops.gemm.hopper_config import HopperConfig, smem_plan
from kernels_numba.ops.gemm.ladder import mma_step, wgmma
from kernels_numba.ops.gemm.ladder.in_numpy import in_numpy, source_of
from kernels_numba.ops.gemm.ladder.naive import make_naive_kernel
from sharp.results import read_rows

ROOT = Path(kernels_numba.__file__).resolve().parent.parent
RUNGS = ["naive", "plain", "mma_step", "wgmma", "hopper"]
EXPECTED = {
    "naive": (0.8, 1.3),
    "plain": (10, 25),
    "mma_step": (150, 350),
    "wgmma": (400, 600),
    "hopper": (750, 800),
}
GPU = compiler.AVAILABLE and not compiler.SIMULATOR and cuda.is_available()
GPU_NAME = str(cuda.get_current_device().name) if GPU else ""
print("on a GPU:", GPU_NAME or "no, and none is needed")


def show(function, first, last):
    """Print the lines of a function from the first that holds `first` to the next that holds `last`."""
    lines = inspect.getsource(inspect.unwrap(function)).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i > start and last in line)
    display(Code(inspect.cleandoc("\n" + "\n".join(lines[start : stop + 1])), language="python"))


# %% [markdown]
# ## What one tensor-core instruction computes
# `mma.sync.m16n8k16`: the 32 threads of a warp together add the product of a 16 x 16 block of x and a 16 x 8
# block of weightᵀ to a 16 x 8 block of the result: 2,048 multiply-adds in one instruction. Nobody holds a
# matrix: each thread (lane) holds 8 elements of A, 4 of B and 4 of C in its registers. Numbers are lanes;
# what lane 13 holds is framed. The tables are the manual's (`kernels_numba/layouts.py`). A row of the result
# lies in 4 neighbouring lanes, so only these have to talk when attention takes a row's maximum or sum.


# %%
def draw_fragment(axis, lane, title, rows, columns, mine=13):
    """A matrix coloured by who holds each element."""
    axis.imshow(lane, cmap="twilight", vmin=0, vmax=36, alpha=0.45)
    for (row, column), holder in np.ndenumerate(lane):
        axis.text(column, row, holder, ha="center", va="center", fontsize=7)
        if holder == mine:
            box = plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
            axis.add_patch(box)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(rows)
    axis.set_xlabel(columns)
    axis.set_xticks(range(0, lane.shape[1], 4))
    axis.set_yticks(range(0, lane.shape[0], 4))


figure, axes = plt.subplots(
    1, 3, figsize=(10, 5.2), gridspec_kw={"width_ratios": [2, 1, 1]}, layout="constrained"
)
draw_fragment(axes[0], mma_layout("a")[0], "A [16, 16]: a block of x", "m", "k")
draw_fragment(axes[1], mma_layout("b")[0].T, "Bᵀ [16, 8]: of weightᵀ", "k", "n")
draw_fragment(axes[2], mma_layout("c")[0], "C [16, 8]: the result", "m", "n")

# %% [markdown]
# ## Why shared memory is swizzled
# Shared memory has 32 banks of 4 bytes, and each answers once a cycle. A row of a tile is 64 bfloat16 = 128
# bytes = all the banks, in 8 units of 16 bytes. `ldmatrix` reads 8 x 8 blocks: the same unit of 8 rows.
# Stored plainly, that is one column of the left picture: 4 banks, asked 8 times. With unit u of row r at
# place u ^ (r % 8), it is 8 different groups of banks. TMA writes and wgmma reads exactly this pattern (the
# "128-byte swizzle"); rung `mma_step` does it by hand.

# %%
row, unit = np.mgrid[:8, :8]
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
for axis, swizzled in zip(axes, (False, True), strict=True):
    bank = banks_of(unit_offset(row, unit, swizzled))
    axis.imshow(bank, cmap="viridis", alpha=0.55)
    for (r, u), first in np.ndenumerate(bank):
        axis.text(u, r, f"{first}-{first + 3}", ha="center", va="center", fontsize=8)
    axis.add_patch(plt.Rectangle((1.5, -0.5), 1, 8, fill=False, edgecolor="#c53030", linewidth=3))
    groups = len(set(bank[:, 2]))
    how = "swizzled" if swizzled else "plain"
    axis.set_title(f"{how}: unit 2 of 8 rows takes {8 // groups} cycle{'s' * (groups < 8)}", fontsize=10)
    axis.set_xlabel("unit of 16 bytes (8 elements along K)")
    axis.set_ylabel("row of the tile")
figure.suptitle("The banks that hold each unit")

# %% [markdown]
# ## Rung 1: a thread an output
# The formula, and nothing else. Every operand crosses the memory system once for each output it is part of:
# 2 loads for one multiply-add.

# %%
show(make_naive_kernel, "def naive_kernel", "out[m, n] =")

# %% [markdown]
# ## Rung 2: tiles in shared memory
# A block loads a slice of x and of weight once, and each element of it is used by a whole row or column of
# threads. Each thread keeps 4 x 4 outputs, so 8 loads from shared memory feed 16 multiply-adds.

# %%
show(make_gemm_kernel, "for k0 in range(0", "acc[i * cols + j] = cuda.fma")

# %% [markdown]
# Both rungs are plain Python to numba's simulator, where they run without a GPU (in a process of its own,
# because a process has either the compiler or the simulator). They add in the same order, k upward, so they
# agree to the bit.

# %%
IN_SIMULATOR = """
import numpy as np
from kernels_numba.compiler import cuda
from kernels_numba.ops import OPS
rng = np.random.default_rng(0)
x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((6, 20), (9, 20)))
results = {}
for rung in ("naive", "plain"):
    out = cuda.to_device(np.full((6, 9), np.nan, np.float32))
    OPS["gemm"].rungs[rung](out, cuda.to_device(x), cuda.to_device(weight))
    results[rung] = out.copy_to_host()
    print(rung, "largest error", np.abs(results[rung] - x.astype(float) @ weight.T).max())
print("the same bits:", np.array_equal(*results.values()))
"""


def simulate(code):
    """Run code where numba.cuda is its simulator."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout.strip())


if compiler.AVAILABLE:
    simulate(IN_SIMULATOR)
else:
    print("numba.cuda cannot be imported here:", compiler.REASON)

# %% [markdown]
# ## Rung 3: tensor cores, a warp at a time
# Three new things, all visible in the loop below. `cp_async`: the next tile is on its way while this one is
# multiplied. `ldmatrix`: 8 x 8 blocks go from shared memory to the lanes that the picture above names.
# `mma`: 16 x 8 x 16 products; a warp makes 32 x 64 outputs, so 6 `ldmatrix` feed 16 `mma`.

# %%
print(mma_step.PLAN.picture())
show(mma_step.make_mma_step_kernel, "while k_at < k:", "k_at = k_next")

# %% [markdown]
# The simulator has no warps, so this kernel runs in `kernels_numba/simt.py`: all threads of a block in
# lockstep, every register an array of one number a thread. Slow, but it is the kernel's own text, and it
# fails loudly where the kernel reads outside an array or uses a copy that nobody waited for.

# %%
rng = np.random.default_rng(1)
M, N, K = 100, 136, 200
x, weight = simt.to_bits(rng.standard_normal((M, K))), simt.to_bits(rng.standard_normal((N, K)) / np.sqrt(K))
truth = gemm_spec(simt.to_float(x).astype(np.float64), simt.to_float(weight))


def error_in_numpy(step, source=""):
    """Error of each output of a step, run in numpy, relative to the largest true value."""
    out = np.full((M, N), np.nan, np.float32)
    in_numpy(step, out, x, weight, source=source)
    return np.abs(out - truth) / np.abs(truth).max()


print(f"mma_step in numpy: largest error {error_in_numpy('mma_step').max():.1e} of the largest output")


# %% [markdown]
# And it compiles, for any GPU from sm_80 on. This is its loop over K, as machine code:


# %%
def machine_code(kernel, arch, op):
    """Print registers, spills and what the main loop is made of, or which tool is missing."""
    try:
        code = disassemble(kernel, arch)
    except (ToolsMissing, KernelsUnavailable) as error:
        print(error)
        return
    loop = code.loop(op)
    kinds = Counter(line.split()[0].partition(".")[0] for line in loop)
    print(f"{kernel.name} for {arch}: {code.registers} registers, {code.spill_bytes} bytes spilled")
    print(
        f"main loop, {len(loop)} instructions:", ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(7))
    )
    print(*[line for line in loop if line.startswith(op)][:4], "...", sep="\n    ")


machine_code(mma_step.mma_step_kernel("bfloat16", False), "sm_86", "HMMA")
# %% [markdown]
# ## Rung 4: wgmma, fed by the copy engine
# On Hopper four warps multiply together: 64 x 128 x 16 in one instruction, 64 times a `mma.sync`, with both
# operands read from shared memory, so `ldmatrix` and its registers are gone. And one thread asks for a whole
# tile: the copy engine (TMA) computes the addresses, swizzles, and fills with zeros past the edges. What is
# left of the loop is a wait, four wgmma, and a refill.

# %%
print(wgmma.PLAN.picture())
show(wgmma.make_wgmma_kernel, "def load(", "tma_load_2d(int32(smem + s_weight")
show(wgmma.make_wgmma_kernel, "while k_at < k:", "phase = int32(phase ^ 1)")

# %%
print(f"wgmma in numpy: largest error {error_in_numpy('wgmma').max():.1e} of the largest output")
machine_code(wgmma.wgmma_kernel("bfloat16", False), "sm_90a", "HGMMA")
# %% [markdown]
# ## Rung 5: who loads never multiplies
# In rung 4 everybody stops at the block's barrier before a stage is refilled, and the tensor cores stop with
# them. Here one warp does nothing but ask for tiles, and the warps that multiply hand stages back through
# barriers of their own, so a product is always in flight. Blocks are persistent: each takes the next tile
# while its last one is still being stored.

# %%
print(inspect.getdoc(hopper.make_gemm_hopper_kernel))
config = HopperConfig(128, 256)
print()
print(config)
print(smem_plan(config).picture())
machine_code(hopper.hopper_kernel(config, "bfloat16", "bfloat16", False), "sm_90a", "HGMMA")


# %% [markdown]
# ## Right first
# With a GPU, every rung that runs on it is checked against the definition. The tensor-core rungs must even
# agree to the bit, because all walk K upward from 0, 16 at a time.


# %%
def on_gpu(rung, x, weight):
    """float32 result of a rung on bfloat16 bits; None where the card is too old for it."""
    out = cuda.to_device(simt.to_bits(np.full((len(x), len(weight)), np.nan)))
    try:
        OPS["gemm"].rungs[rung](out, cuda.to_device(x), cuda.to_device(weight))
    except ValueError as error:
        print(error)
        return None
    return simt.to_float(out.copy_to_host())


if GPU:
    results = {rung: on_gpu(rung, x, weight) for rung in RUNGS}
    for rung, result in results.items():
        if result is not None:
            error = np.abs(result - truth).max() / np.abs(truth).max()
            print(f"{rung:<9} largest error {error:.1e} of the largest output")
            assert error < 2.0**-8
    cores = [results[rung] for rung in RUNGS[2:] if results[rung] is not None]
    assert all(np.array_equal(cores[0], other) for other in cores)
else:
    print("No GPU here. The definition all rungs are held to is numpy:")
    display(Code(inspect.getsource(gemm_spec), language="python"))


# %% [markdown]
# ## Then fast
# The roofline of a 4096³ product is the tensor cores' peak: 137 GFLOP against 0.1 GB. With a GPU all rungs
# are timed here, in turn; without one, this shows what `notebooks/results` holds.


# %%
def time_rung(rung, size=4096):
    """TFLOP/s and share of the roofline of one rung, the best of 5 bursts; None where it does not run.

    Operands take 100 MB, so most come from memory, not from L2. For numbers to quote there is `just bench`.
    """
    random = np.random.default_rng(0)
    x, weight = (cuda.to_device(simt.to_bits(random.standard_normal((size, size)))) for _ in range(2))
    out, call = cuda.device_array((size, size), np.uint16), OPS["gemm"].rungs[rung]
    try:
        call(out, x, weight)
    except ValueError:
        return None
    calls, best = (1 if rung in ("naive", "plain") else 20), float("inf")
    for _ in range(5):
        start, end = cuda.event(), cuda.event()
        start.record()
        for _ in range(calls):
            call(out, x, weight)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3 / calls)
    cost, peaks = gemm_cost(size, size, size), datasheet(GPU_NAME)
    return cost.flops / best / 1e12, roofline_fraction(cost, peaks, best) if peaks else None


def recorded(rung, case="M=4096 N=4096 K=4096"):
    """(TFLOP/s, share of the roofline, label) of the recorded row of a rung; None if there is none."""
    rows = [row for row in read_rows() if row["op"] == "gemm" and row["rung"] == rung and row["tflops"]]
    rows = [row for row in rows if row["case"] == case] or rows
    if not rows:
        return None
    row = max(rows, key=lambda row: row["tflops"])
    label = f"recorded: {row['gpu']}, {row['date']}, commit {row['commit'][:7]}, {row['case']}"
    return row["tflops"], row["roofline"], label


measured = {}
for rung in RUNGS:
    here = time_rung(rung) if GPU else None
    found = (*here, "here, now") if here else recorded(rung)
    if found is None:
        print(f"{rung:<9} no record yet: run `just bench` on a GPU, or this notebook there")
    else:
        measured[rung] = found
        share = "" if found[1] is None else f", {found[1]:.1%} of the roofline"
        print(f"{rung:<9} {found[0]:.3g} TFLOP/s{share} ({found[2]})")

# %%
figure, axis = plt.subplots(figsize=(8.5, 3.6))
for place, rung in enumerate(RUNGS):
    low, high = EXPECTED[rung]
    label = "expected on an H100" if place == 0 else None
    axis.barh(place, high - low, left=low, color="#d9d9d9", height=0.6, label=label)
    if rung in measured:
        value, share, where = measured[rung]
        axis.plot(value, place, "D", color="#2b6cb0", markersize=8)
        note = f"{value:.3g} TFLOP/s" + ("" if share is None else f", {share:.1%} of the roofline")
        color = "#2b6cb0"
    else:
        note, color = "no record yet", "#718096"
    if low > 100:
        end, side = min(low, measured.get(rung, (low,))[0]), {"ha": "right", "xytext": (-8, 0)}
    else:
        end, side = max(high, measured.get(rung, (high,))[0]), {"ha": "left", "xytext": (8, 0)}
    axis.annotate(
        note, (end, place), textcoords="offset points", va="center", fontsize=8, color=color, **side
    )
axis.set_xscale("log")
axis.set_xlim(0.2, 2000)
axis.set_yticks(range(len(RUNGS)), RUNGS)
axis.invert_yaxis()
axis.set_xlabel("TFLOP/s at M = N = K = 4096")
axis.legend(loc="lower left")
axis.set_title(
    "; ".join(dict.fromkeys(where.partition(", M=")[0] for *_, where in measured.values())), fontsize=9
)
figure.tight_layout()

# %% [markdown]
# ## Break it
# Change one line of a kernel and see which outputs go wrong. Each entry is (rung, old text, new text); add
# your own. Where the kernel would leave its arrays, or hang, that is said instead.

# %%
BREAK = [
    ("mma_step", "(2 * step + x_half) ^ swizzle", "2 * step + x_half"),
    ("mma_step", "4, a_bottom, 0, b, 2", "4, a_bottom, 0, b, 0"),
    ("wgmma", "while k_at < k:", "while k_at < k - TILE_K:"),
    ("wgmma", "+ group_row * ROW", ""),
    ("mma_step", "int32(row < rows)", "1"),
    ("wgmma", "int32(phase ^ 1)", "int32(phase)"),
]
wrong = {}
for step, old, new in BREAK:
    assert old in source_of(step), f"{old!r} is no longer in {step}.py"
    try:
        wrong[step, old, new] = error_in_numpy(step, source_of(step).replace(old, new))
    except (IndexError, RuntimeError) as error:
        print(f"{step}: {old!r} -> {new!r}: {type(error).__name__}: {error}")

figure, axes = plt.subplots(1, len(wrong), figsize=(3.1 * len(wrong), 3.2), squeeze=False)
for axis, ((step, old, new), error) in zip(axes[0], wrong.items(), strict=True):
    shown = axis.imshow(np.nan_to_num(error, nan=1), cmap="magma_r", vmin=0, vmax=0.5)
    axis.set_title(f"{step}\n{old[-30:]}\n-> {new[-30:] or '(nothing)'}", fontsize=8)
    axis.set_xlabel("n")
axes[0, 0].set_ylabel("m")
figure.colorbar(shown, ax=list(axes[0]), label="error / largest output", shrink=0.8)
plt.show()

# %% [markdown]
# ## Change one line
# How wide should a tile of the last rung be? Wider tiles read less per product; narrower ones leave room for
# more stages in flight and more blocks for small problems. Edit the widths and run the cell: stages, shared
# memory and registers move. (No choice shows in a bit of the result.)

# %%
WIDTHS = (64, 128, 256)
print(" tile    stages  shared memory  registers  accumulators  flops a byte loaded")
for tile_n in WIDTHS:
    tile = dataclasses.replace(config, tile_n=tile_n)
    kernel = hopper.hopper_kernel(tile, "bfloat16", "bfloat16", False)
    try:
        registers = disassemble(kernel, "sm_90a").registers
    except (ToolsMissing, KernelsUnavailable):
        registers = "?"
    flops_a_byte = 2 * 128 * tile_n / (2 * (128 + tile_n))
    facts = f"{tile.stages:>8} {kernel.smem:>14,} {registers:>10} {tile_n // 2:>13} {flops_a_byte:>20.0f}"
    print(f"128x{tile_n:<4}{facts}")
