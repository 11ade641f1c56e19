"""How long a plan takes to become the words that cross to the device: `python tests/pack_times.py`.

Microseconds of StepPacker.pack() and launched(), least of 7 rounds of 100 steps: with the block table of the
step before, and with every entry of it changed.
"""

from __future__ import annotations

import timeit

import numpy as np

from kernels_numba.ops.apply_step import StepLayout
from sharp.buckets import Buckets
from sharp.step_buffers import StepPacker
from sharp.step_times import uniform_step

# Sequences, new tokens of each, keys before them.
CASES = {
    "1 decode": (1, 1, 300), "64 decodes": (64, 1, 300), "256 decodes": (256, 1, 1000),
    "8 prompts of 1,024": (8, 1024, 0),
}  # fmt: skip
STEPS, ROUNDS = 100, 7


def measure(num_seqs: int, tokens: int, context: int) -> tuple[float, float]:
    """(us of a step that changes no page, us of one that changes all)."""
    layout = StepLayout(8192, 256, 512)
    packer, out = StepPacker(layout), np.empty(layout.packed_words, np.int32)
    plan = uniform_step(num_seqs, tokens, context, 64, 1000)
    bucket = Buckets(layout.max_tokens, layout.max_seqs).of(plan)

    def steady() -> None:
        packer.pack(plan, bucket, out)
        packer.launched()

    def changed() -> None:
        packer.pack(plan, bucket, out)  # not launched: the next one sends its whole table

    steady()
    took = [min(timeit.repeat(step, number=STEPS, repeat=ROUNDS)) / STEPS for step in (steady, changed)]
    return took[0] * 1e6, took[1] * 1e6


if __name__ == "__main__":
    for name, case in CASES.items():
        steady_us, changed_us = measure(*case)
        print(f"{name:20} {steady_us:6.1f} us   every page changed {changed_us:6.1f} us")
