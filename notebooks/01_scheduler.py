# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The scheduler: a stall reproduced, then cured
#
# A step is a list of (request, number of tokens). Who is on the list decides how long everybody else waits
# for the next token. Here the real engine runs the tiny random model on this machine's CPU; only the answers
# are noise. First the way of engines that read a whole prompt before anybody goes on.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import sharp
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.device import open_device
from sharp.engine import Engine
from sharp.host_time import measure_host
from sharp.latency_target import LatencyTarget
from sharp.load import run_load
from sharp.meter import open_meter
from sharp.model import Model
from sharp.policies import SchedulingPolicy
from sharp.predictor import StepPredictor
from sharp.replay import replay
from sharp.simulate import simulate
from sharp.stall import Borrowed
from sharp.step_times import measure_curves
from sharp.views.pages import PageMap
from sharp.views.timeline import Timeline
from sharp.weights import open_checkpoint
from sharp.workloads import Arrival, every, random_traffic

TINY = Path(sharp.__file__).resolve().parent.parent / "weights" / "tiny"
options = {"device": "cpu", "max_num_batched_tokens": 1024, "max_num_seqs": 48, "num_blocks": 400}
model = Model(open_checkpoint(TINY), EngineConfig(**options), open_device("cpu", "auto"))
NAMES = {f"-{i + 1}": f"stream {i + 1}" for i in range(4)}


def engine_with(policy, **more):
    """An engine of this policy over the one model."""
    config = EngineConfig(**{**options, **more}, scheduling_policy=policy)
    return Engine(Borrowed(model), model.tokenizer, config)


# %% [markdown]
# ## The stall
# Four streams decode; every 0.3 s a prompt of 1,500 tokens arrives, for every policy alike. In the timeline a
# column is a step, as wide as it took: green is a token of an answer, blue a chunk of a prompt, and red a
# running request that got nothing.

# %%
streams = [Arrival(0.0, 32, 1900)] * 4
prompts = every(0.3, 1.2, prompt_tokens=1500, output_tokens=4, start=0.15)
loads, records = {}, {}


def live(name, policy, **more):
    """The same second under a policy."""
    engine = engine_with(policy, **more)
    run_load(engine, [Arrival(0.0, 64, 2)] * 2, seed=1)
    engine.stats.reset()
    loads[name] = run_load(engine, prompts, standing=streams, duration=1.2)
    records[name] = list(engine.stats.history)
    engine.close()
    load = loads[name]
    print(
        f"{name:<15} between two tokens: {load.itl.ms()}; prompts wait {load.ttft_of().p50 * 1e3:.0f} ms "
        f"(p50); {load.answer_tokens / load.seconds:.0f} answer tokens/s"
    )


def around_a_prompt(name, steps=60):
    """The timeline from a few steps before the second prompt's first chunk on."""
    found = records[name]
    first = next((i for i, r in enumerate(found) if any(who == "1" for who, _ in r.scheduled)), 0)
    return Timeline.of(found[max(0, first - 8) : first - 8 + steps], names=NAMES)


live("blocking", "blocking")
around_a_prompt("blocking", 30)

# %% [markdown]
# While a prompt is read, all four streams stand still. Now first come, first served with chunks: decodes come
# first in every step, and a prompt gets what remains, here up to 256 tokens.

# %%
live("fcfs, 256", "fcfs", max_num_batched_tokens=256)
around_a_prompt("fcfs, 256", 60)

# %% [markdown]
# ## As large as the time allows
# A fixed chunk is a guess. `latency-target` asks how long a step would take: `StepPredictor` puts the
# measured curves of pure prefill and pure decode steps together (`sharp probe` measures them; here a short
# version of it), and measured steps correct it.

# %%
probing = EngineConfig(**{**options, "max_num_batched_tokens": 512})
curves = measure_curves(model, probing, open_meter(model.device), max_model_len=2048, limit_s=4.0)
predictor = StepPredictor(
    StepCurve(curves.prefill), StepCurve(curves.decode), host_s=measure_host(model.config, 4)
)
decode_ms = 1e3 * loads["fcfs, 256"].itl.p50
target_ms = max(3 * decode_ms, 3e3 * predictor.decode.predict(4, 1024))
policy = LatencyTarget(target_ms, predictor)
live(f"target {target_ms:.0f} ms", policy)
print(f"its predictions are multiplied by {policy.factor:.2f} by now")
around_a_prompt(f"target {target_ms:.0f} ms", 60)

# %%
figure, axis = plt.subplots(figsize=(7, 2.8))
for name, found in records.items():
    gaps = np.sort([r.seconds for r in found if r.num_decodes >= 4])
    axis.plot(1e3 * gaps, np.linspace(0, 100, len(gaps)), label=name)
axis.axvline(target_ms, color="grey", linestyle=":", linewidth=1)
axis.set(xscale="log", xlabel="ms of a step in which all streams get a token", ylabel="% of them")
axis.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# (`blocking` looks good in this picture only because the steps that stall are not in it: no stream gets a
# token in them. The percentiles printed above count from token to token.)
#
# ## Packed, not padded
# Sixteen prompts of 16 to 256 tokens, one prompt a pass and packed into as few passes as the step's budget
# allows. A pass reads all weights once, whoever shares it.

# %%
lengths = np.random.default_rng(0).permutation(np.linspace(16, 256, 16).astype(int))
crowd = [Arrival(0.0, int(length), 1) for length in lengths]
for name, seqs in (("one a pass", 1), ("packed", 16)):
    engine = engine_with("fcfs", max_num_seqs=seqs)
    run_load(engine, crowd[:2])
    load = run_load(engine, crowd, seed=1)
    engine.close()
    print(
        f"{name:<12}{load.tokens_per_s:8,.0f} tokens/s in {load.steps} passes, "
        f"first tokens after {load.ttft_of().p95 * 1e3:.0f} ms (p95)"
    )

# %% [markdown]
# ## A policy of your own
# One class. This one gives prompts the whole step while fewer than four sequences decode, and a trickle
# afterwards. It runs in the simulator (the real scheduler in virtual time) and in the real engine.


# %%
class FillThenTrickle(SchedulingPolicy):
    name = "fill, then trickle"

    def __init__(self, enough=4, trickle=32):
        self.enough, self.trickle = enough, trickle

    def rank(self, request):
        return request.params.max_tokens  # short answers first

    def budget(self, contexts, prompts, most):
        return min(most, self.trickle) if len(contexts) >= self.enough else most


latency = LatencyTarget(target_ms, predictor)
# As much traffic as keeps this machine busy most of the time.
crowd = random_traffic(2000, 0.0, prompt=(16, 1500), output=(4, 200), seed=1)
config = EngineConfig(**{**options, "max_queue_len": 2000})
busy_s = simulate(crowd, predictor, config, num_blocks=400, max_model_len=2048).seconds
traffic = random_traffic(2000, 1.2 * busy_s, prompt=(16, 1500), output=(4, 200), seed=1)
print(f"{len(traffic)} requests in {1.2 * busy_s:.0f} s:")
for one in ("fcfs", "shortest-prompt-first", "blocking", latency, FillThenTrickle()):
    config = EngineConfig(**{**options, "scheduling_policy": one})
    found = simulate(traffic, predictor, config, num_blocks=400, max_model_len=2048)
    print(
        f"{found.policy:<22} ITL p99 {found.itl.p99 * 1e3:6.1f} max {found.itl.max * 1e3:6.1f} ms, "
        f"TTFT p50 {found.ttft.p50 * 1e3:5.0f} p95 {found.ttft.p95 * 1e3:5.0f} ms; took {found.wall_s:.1f} s"
    )

# %%
live("my own", FillThenTrickle())
around_a_prompt("my own", 60)

# %% [markdown]
# ## Where the pages go
# Every square is a page of 64 tokens, in its request's colour: dark if written, light with a dot if only
# booked (admission `reserve` books the worst case when a request starts), hatched if nobody uses it and it is
# kept for its content, with a rim if it is shared. All these prompts begin with the same 200 tokens; one
# request was cancelled.

# %%
engine = engine_with("fcfs", max_num_batched_tokens=256)
rng = np.random.default_rng(3)
common = rng.integers(10, 250, 200).tolist()
params = sharp.SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True)
for length in (400, 30, 700, 5, 300):
    engine.add_request(common + rng.integers(10, 250, length).tolist(), params)
    for _ in range(3):
        engine.step()
engine.abort("request-0")
pages = PageMap.of(engine.scheduler)
print(pages.counts())
pages

# %% [markdown]
# ## What happened, and again
# `engine.log` holds what the scheduler was asked and what it said. Saved, it can be planned again without a
# model: the same requests at the same steps, the same tokens, the same pages.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "run.jsonl"
    engine.log.save(path)
    again = replay(path)
    print(f"{path.stat().st_size:,} bytes; {again.steps} plans made again, each as it was")
assert again.steps == engine.scheduler.step
engine.close()
model.close()
