# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The step runtime: who waits for whom
#
# A step is planned, launched, waited for and committed. The host does the first, the second and the last; the
# device computes in between. This notebook draws both, before and after each thing that keeps them apart.

# %%
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import sharp
from kernels_numba import compiler
from sharp.busy import idle, steps_busy
from sharp.config import EngineConfig
from sharp.device import cuda_problem, open_device
from sharp.engine import Engine
from sharp.model import Model
from sharp.pretend import PretendDevice
from sharp.random_model import SHAPES, IdTokenizer, RandomCheckpoint
from sharp.request import SamplingParams
from sharp.stall import Borrowed
from sharp.trace_events import COMPUTE
from sharp.views.lanes import calmest, draw
from sharp.weights import open_checkpoint

problem = "numba's simulator stands in for CUDA" if compiler.SIMULATOR else cuda_problem()
HAS_GPU = problem is None
if HAS_GPU:
    print("Everything below runs on the GPU of this machine, too.")
else:
    print(f"No GPU can be used here ({problem}): graphs and a GPU's own times are not shown.")
    print("The loop is real all the same: over the tiny model on this CPU, and over a pretended device.")

# %% [markdown]
# ## Running and drawing
# `run` gives an engine sixteen requests and steps it by hand to the end; `engine.trace` holds when each phase
# ran, `engine.stats` what each step took.

# %%
PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SHOWN = 6  # steps of a picture, of those in which all sixteen decode
seen = {}


def run(name, model, tokenizer, **options):
    """Sixteen prompts of 8 to 128 tokens through a new engine; its records, trace and answers."""
    config = EngineConfig(max_num_batched_tokens=512, max_num_seqs=16, prefix_caching=False, **options)
    engine = Engine(Borrowed(model), tokenizer, config)
    rng = np.random.default_rng(0)
    for length in np.linspace(8, 128, 16).astype(int):
        engine.add_request(rng.integers(2, model.config.vocab_size, length).tolist(), PARAMS)
    answers = {}
    while engine.has_unfinished:
        for output in engine.step():
            answers[output.request_id] = output.outputs[0].token_ids
    seen[name] = SimpleNamespace(trace=engine.trace, records=list(engine.stats.history), answers=answers)
    engine.close()
    return seen[name]


def shares(name):
    """Where a decode step's time goes: medians over the steps in which all sixteen decode."""
    found = seen[name]
    steady = [r for r in found.records if r.num_decodes == 16]
    parts = {
        p: np.median([getattr(r, f"{p}_s") for r in steady]) for p in ("plan", "launch", "wait", "commit")
    }
    whole = np.median([r.seconds for r in steady])
    line = ", ".join(f"{part} {1e6 * s:,.0f} us" for part, s in parts.items())
    numbers = {r.step for r in steady}
    spans = found.trace.spans()
    texts = np.median([s.end - s.start for s in spans if s.name == "detokenise" and s.step in numbers])
    print(f"{name:<28} {1e3 * whole:7.3f} ms a step: {line} (texts {1e6 * texts:.0f} us)")
    work = [(span.start, span.end) for span in spans if span.row == COMPUTE]
    if work:
        host = np.median([r.host_s / r.gpu_s for r in steady if r.gpu_s])
        print(f"{'':<28} device busy {steps_busy(work, 30):.1%} of 30 steps; host / device time {host:.0%}")


def picture(*names):
    """The calmest few steps of each run, one under the other, on one scale of time."""
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 2.2 * len(names)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        steady = [r.step for r in seen[name].records if r.num_decodes == 16]
        draw(axis, seen[name].trace, calmest(seen[name].trace, SHOWN, steady[5:-SHOWN]), SHOWN, title=name)
    widest = max(axis.get_xlim()[1] for axis in axes[:, 0])
    for axis in axes[:, 0]:
        axis.set_xlim(0, widest)
    figure.tight_layout()
    plt.show()


# %% [markdown]
# ## On this CPU
# The numpy reference computes in `launch`, on the very cores that plan and commit: there is nobody to wait
# for, and nothing to win by overlap, which is off by default there. The answers must be the same.

# %%
TINY = Path(sharp.__file__).resolve().parent.parent / "weights" / "tiny"
config = EngineConfig(device="cpu", max_num_batched_tokens=512, max_num_seqs=16, num_blocks=64)
tiny = Model(open_checkpoint(TINY), config, open_device("cpu", "auto"))
run("CPU", tiny, tiny.tokenizer, overlap=False)
run("CPU, overlap", tiny, tiny.tokenizer, overlap=True)
assert seen["CPU"].answers == seen["CPU, overlap"].answers
shares("CPU")
shares("CPU, overlap")
picture("CPU", "CPU, overlap")

# %% [markdown]
# ## A device beside the host
# `PretendDevice` computes nothing; its steps take a set time by the clock, beside the host, as a GPU's do.
# What the picture shows of the loop is real, the device's times are made up: here a step runs for 2 ms, and
# the host takes 1.2 ms to queue it, launch by launch.
#
# Without overlap the device stands still while the host commits, plans and launches. With it, the next step
# is in the queue before this one ends: the ids that the host does not know yet are looked up by the device.


# %%
def pretended(launch_s):
    """A device whose steps take 2 ms."""
    return PretendDevice(tiny.config, lambda plan: 2e-3, launch_s=launch_s)


run("launches, no overlap", pretended(1.2e-3), tiny.tokenizer, overlap=False)
run("launches, overlap", pretended(1.2e-3), tiny.tokenizer, overlap=True)
assert seen["launches, no overlap"].answers == seen["launches, overlap"].answers
shares("launches, no overlap")
shares("launches, overlap")
picture("launches, no overlap", "launches, overlap")

# %% [markdown]
# ## One launch instead of hundreds
# Where a step is shorter than its launches, overlap alone cannot help: the host is the slower of the two. A
# captured graph is one call. Pretended again: steps of 1 ms, launches of 1.5 ms one by one, 0.05 ms as a
# graph.

# %%
short = {"seconds": lambda plan: 1e-3}
run(
    "short steps, launches",
    PretendDevice(tiny.config, launch_s=1.5e-3, **short),
    tiny.tokenizer,
    overlap=True,
)
run("short steps, one call", PretendDevice(tiny.config, launch_s=5e-5, **short), tiny.tokenizer, overlap=True)
shares("short steps, launches")
shares("short steps, one call")
picture("short steps, launches", "short steps, one call")

# %% [markdown]
# Where the device stood still in the first of the two, gap by gap:

# %%
spans = [(span.start, span.end) for span in seen["short steps, launches"].trace.spans(COMPUTE)][-30:]
gaps = idle(spans, spans[0][0], spans[-1][1])
print(f"{len(gaps)} gaps, together {1e3 * sum(b - a for a, b in gaps):.1f} ms of "
      f"{1e3 * (spans[-1][1] - spans[0][0]):.1f} ms")  # fmt: skip

# %% [markdown]
# ## On a GPU
# The same four pictures of a real one: graphs off and on, overlap off and on, over random weights of
# SmolLM2-135M's shape. (`deterministic=False`, a kernel that is faster and keeps no bits, does not exist yet:
# there is nothing to switch off.)

# %%
if HAS_GPU:
    for graphs in (False, True):
        config = EngineConfig(device="cuda", max_num_batched_tokens=512, max_num_seqs=16, graphs=graphs)
        model = Model(RandomCheckpoint("smollm2-135m"), config, open_device("cuda", "auto"))
        kind = "graphs" if graphs else "no graphs"
        for overlap in (False, True):
            name = f"{kind}, {'overlap' if overlap else 'no overlap'}"
            run(name, model, IdTokenizer(), overlap=overlap, device="cuda", graphs=graphs)
            shares(name)
        picture(f"{kind}, no overlap", f"{kind}, overlap")
        model.close()
    names = [name for name in seen if "graphs" in name]
    assert all(seen[name].answers == seen[names[0]].answers for name in names), "one set of bits for all"
else:
    print(f"not available here: {problem}. ({len(SHAPES)} shapes wait for a GPU: {', '.join(SHAPES)}.)")

# %% [markdown]
# ## A step that does not end
# A watchdog looks at the step in flight. Here the device stands still for 1.6 s in one step; it is named
# while it runs, and nothing is stopped: the engine goes on as soon as the device does.

# %%
logging.basicConfig(format="%(name)s: %(message)s")


def stalls(plan):
    """A millisecond, but for one step."""
    return 1.6 if plan.step == 30 else 1e-3


run("a stall", PretendDevice(tiny.config, stalls), tiny.tokenizer, overlap=True)
slowest = max(seen["a stall"].records, key=lambda record: record.seconds)
print(f"step {slowest.step} took {slowest.seconds:.1f} s, the run had {len(seen['a stall'].records)} steps")

# %% [markdown]
# ## The whole run, to zoom into
# `engine.trace.save(path)`, or `--trace-out FILE` on the command line, writes what ui.perfetto.dev opens: the
# rows above, and counters of requests, pages and tokens a step.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "trace.json"
    seen["launches, overlap"].trace.save(path)
    print(f"{path.stat().st_size:,} bytes, {len(seen['launches, overlap'].trace.spans())} spans")
tiny.close()
