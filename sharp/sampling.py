"""Logits -> token ids, and the log-probabilities a request asked for.

The choice itself is the op `sample` (argmax, or Gumbel-max over Philox numbers keyed by seed and output
index, among the ids that top-k and top-p leave), on the device the logits are on. Log-probabilities are for
people and are computed on the host, for the rows that want them only. Refuses to know requests, stop
conditions and text.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from sharp.device import Array, Device
from sharp.plan import BatchPlan, Int32, SampleOutput
from sharp.staging import DeviceBatch, StepArrays

_told: WeakSet[Device] = WeakSet()  # whose engine has heard of the slower way


def say_slower(device: Device) -> None:
    """RuntimeWarning, once for an engine: what a step with log-probabilities costs on a GPU."""
    if device.kind == "cuda" and device not in _told:
        _told.add(device)
        warnings.warn(
            "SamplingParams(logprobs=...) is not computed on the GPU yet: each step that has such a request "
            "copies its logits to the host",
            RuntimeWarning,
            stacklevel=2,
        )


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """log(softmax(logits)) over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def top_logprobs(logits: npt.NDArray[np.float32], token_id: int, count: int) -> dict[int, float]:
    """Natural-log probabilities of the `count` likeliest ids, best first (ties: lowest id), and of
    `token_id`.

    logits: f32[V], untempered. `token_id` comes last if it is not among the best.
    """
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:count]
    chosen = {int(i): float(logprobs[i]) for i in best}
    chosen.setdefault(token_id, float(logprobs[token_id]))
    return chosen


def draw(out: Array, logits: Array, batch: StepArrays, ops: SimpleNamespace, stream: Any) -> None:
    """Queue the choice of a token for each row: out i32[R], logits f32[R, V]; waits for nothing."""
    ops.sample(
        out, logits, batch.temperatures, batch.seeds, batch.output_indices, batch.top_ks, batch.top_ps,
        stream=stream,
    )  # fmt: skip


def sample_output(
    plan: BatchPlan, token_ids: Int32, logits: Mapping[int, npt.NDArray[np.float32]]
) -> SampleOutput:
    """What a step has sampled: token_ids i32[R]; logits: f32[V] of each row whose log-probabilities are asked
    for. Raises FloatingPointError if a row has no comparable logit (the forward produced NaN)."""
    if (token_ids < 0).any():
        row = int(np.flatnonzero(token_ids < 0)[0])
        raise FloatingPointError(
            f"step {plan.step}: logits row {row} is NaN throughout: the forward is broken"
        )
    logprobs: list[dict[int, float] | None] = [None] * len(token_ids)
    for row, values in logits.items():
        logprobs[row] = top_logprobs(values, int(token_ids[row]), int(plan.num_logprobs[row]))
    return SampleOutput(token_ids=token_ids, logprobs=tuple(logprobs))


def sample(
    logits: Array, batch: DeviceBatch, out: Array, ops: SimpleNamespace, device: Device
) -> SampleOutput:
    """The next token of each sequence that has logits in this step.

    logits: f32[R, V] on the device; out: i32[R] on the device, overwritten. Waits for the step to finish,
    also when R is 0, so that the host may reuse the staging buffer afterwards. Raises as sample_output.
    """
    plan = batch.plan
    if not len(plan.logits_rows):
        device.synchronize()
        return SampleOutput(token_ids=np.empty(0, np.int32), logprobs=())
    draw(out, logits, batch, ops, device.stream)
    token_ids = np.array(device.download(out))
    wanted = np.flatnonzero(plan.num_logprobs >= 0).tolist()
    if wanted:
        say_slower(device)
    host_logits = device.download(logits) if wanted else ()
    return sample_output(plan, token_ids, {row: host_logits[row] for row in wanted})
