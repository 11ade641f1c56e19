# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour: one batch through the engine
#
# Everything below is the real engine on a tiny random model (its answers are noise, its steps are not). No
# GPU is needed: on a laptop the same forward runs over numpy. The whole engine is one chain of arrows:
#
# ```
# Scheduler.plan() -> BatchPlan -> stage() -> DeviceBatch -> forward() -> logits -> sample() -> ids
#                  -> Scheduler.commit() -> RequestOutput
# ```

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

import sharp
from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.model import Model
from sharp.request import SamplingParams
from sharp.trace import records_table

TINY = Path(sharp.__file__).resolve().parent.parent / "weights" / "tiny"

# %% [markdown]
# ## The model, and what its memory goes to
# `block_size` tokens of keys and values make a page. The budget is arithmetic on measured free memory: named
# terms, and the number of pages that remain.

# %%
config = EngineConfig(device="cpu", max_num_batched_tokens=48, max_num_seqs=8, num_blocks=32)
model = Model.load(TINY, config)
print(model.device_name)
for term, size in model.budget.terms().items():
    print(f"{term:<12} {size:>16,} bytes")

# %% [markdown]
# ## Requests of very different lengths
# Adding a request checks it and queues it; nothing is computed yet.

# %%
engine = Engine(model, model.tokenizer, config)
lengths = [3, 70, 9, 25, 1]
rng = np.random.default_rng(0)
for length in lengths:
    prompt = rng.integers(10, 250, length).tolist()
    engine.add_request(prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
print(len(engine.scheduler.waiting), "waiting,", engine.scheduler.blocks.num_free, "pages free")

# %% [markdown]
# ## plan(): a ragged list, not a rectangle
# The budget is 48 tokens a step. Prompts are packed behind one another; the one of 70 tokens is cut, and its
# rest comes in later steps, beside everybody's decoding.

# %%
plan = engine.scheduler.plan()
plan

# %%
print("cu_seqlens_q ", plan.cu_seqlens_q)
print("context_lens ", plan.context_lens)
print("positions    ", plan.positions)
print("slot_mapping ", plan.slot_mapping)
print("block_table\n", plan.block_table)
print("logits_rows  ", plan.logits_rows, "(only sequences whose prompt is complete need logits)")

# %% [markdown]
# ## stage, forward, sample, commit: by hand
# `stage` brings the indices to the device, `forward` is a list of launches (read `sharp/model.py`), `sample`
# gives one id per logits row, and `commit` is the only place where a request grows.

# %%
batch = model.stage(plan)
logits = model.forward(batch)
sampled = model.sample(logits, batch)
print("logits", logits.shape, "ids", sampled.token_ids)
for request in engine.scheduler.commit(plan, sampled):
    print(request.request_id, request.status.value, request.output_token_ids)

# %% [markdown]
# ## step(): the same verbs, until everybody has an answer
# It asks the model in two calls: `launch(plan)` queues a step (stage, forward, sample), `land()` waits
# for its ids. On a device that works beside the host it launches the next step before it lands one; there,
# or with `overlap=True`, step() returns what the step before has given.

# %%
while engine.has_unfinished:
    for output in engine.step():
        if output.finished:
            print(output.request_id, output.outputs[0].finish_reason, output.outputs[0].token_ids)
engine.scheduler.check()
blocks = engine.scheduler.blocks
print(blocks.num_free, "pages free again,", blocks.num_cached, "kept for prompts that begin alike")

# %%
display(HTML(records_table(engine.stats.history)))

# %% [markdown]
# ## A step ahead
# With overlap a step is planned while the one before runs. The ids sampled there are not known yet: the plan
# names them by their logits row, `~row`, and the device fills them in. Who turns out to have ended goes one
# step too far, and that token is dropped; the answers are the same.

# %%
ahead = EngineConfig(**{**vars(config), "overlap": True})
other = Engine(model, model.tokenizer, ahead)
other.add_request([5, 6, 7], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
while other.has_unfinished:
    outputs = other.step()
    flying = ", ".join(f"step {plan.step} with ids {plan.token_ids}" for plan in other.scheduler.in_flight)
    landed = [output.outputs[0].token_ids for output in outputs]
    print(f"in flight: {flying or 'nothing':<32} landed: {landed or 'nothing'}")

# %% [markdown]
# ## What padding would have cost
# Each bar is a step: the tokens that were computed, and those that a rectangle of the same sequences would
# have had.

# %%
history = list(engine.stats.history)
steps = [record.step for record in history]
figure, axis = plt.subplots(figsize=(7, 3))
axis.bar(steps, [record.padded_tokens for record in history], color="#d9d9d9", label="as a rectangle")
axis.bar(steps, [record.num_tokens for record in history], color="#2b6cb0", label="computed")
axis.axhline(
    config.max_num_batched_tokens, color="black", linewidth=0.8, linestyle="--", label="token budget"
)
axis.set_xlabel("step")
axis.set_ylabel("tokens")
axis.legend()
figure.tight_layout()
assert sum(r.num_tokens for r in history) <= sum(r.padded_tokens for r in history)

# %% [markdown]
# ## The promise: neighbours do not change an answer
# The same request alone, and with its prompt cut into pieces of 7 tokens: the same ids.

# %%
prompt = rng.integers(10, 250, 40).tolist()
greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def answer(neighbours: int, cut: int | None) -> tuple[int, ...]:
    """The ids of `prompt` among so many strangers, its prompt cut every so many tokens."""
    own = EngineConfig(
        device="cpu",
        max_num_batched_tokens=48,
        max_num_seqs=8,
        num_blocks=32,
        long_prefill_token_threshold=cut,
    )
    engine = Engine(model, model.tokenizer, own)
    for index in range(neighbours):
        engine.add_request([index + 1] * (5 * index + 1), greedy)
    wanted = engine.add_request(prompt, greedy)
    answers = {}
    while engine.has_unfinished:
        for output in engine.step():
            answers[output.request_id] = output.outputs[0].token_ids
    return answers[wanted]


alone = answer(0, None)
assert alone == answer(5, None) == answer(0, 7) == answer(3, 1)
print(alone)
