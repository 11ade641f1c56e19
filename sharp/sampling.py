"""Logits -> token ids, and the log-probabilities a request asked for.

The choice itself is the op `sample` (argmax, or Gumbel-max over Philox numbers keyed by seed and output
index, among the ids that top-k and top-p leave), on the device the logits are on. Log-probabilities are for
people and are computed on the host, for the rows that want them only. Refuses to know requests, stop
conditions and text.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from sharp.device import Array, Device
from sharp.plan import SampleOutput
from sharp.staging import DeviceBatch

_told: WeakSet[Device] = WeakSet()  # whose engine has heard of the slower way


def say_slower(device: Device) -> None:
    """RuntimeWarning, once for an engine: what a step with log-probabilities costs on a GPU."""
    if device.kind == "cuda" and device not in _told:
        _told.add(device)
        warnings.warn(
            "SamplingParams(logprobs=...) is not computed on the GPU yet: each step that has such a request "
            "copies its logits to the host and waits for them",
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


def sample(
    logits: Array, batch: DeviceBatch, out: Array, ops: SimpleNamespace, device: Device
) -> SampleOutput:
    """The next token of each sequence that has logits in this step.

    logits: f32[R, V] on the device; out: i32[R] on the device, overwritten. Waits for the step to finish,
    also
    when R is 0, so that the host may reuse the staging buffer afterwards.
    Raises FloatingPointError if a row has no comparable logit (the forward produced NaN).
    """
    plan = batch.plan
    if not len(plan.logits_rows):
        device.synchronize()
        return SampleOutput(token_ids=np.empty(0, np.int32), logprobs=())
    ops.sample(
        out, logits, batch.temperatures, batch.seeds, batch.output_indices, batch.top_ks, batch.top_ps,
        stream=device.stream,
    )  # fmt: skip
    token_ids = device.download(out)
    if (token_ids < 0).any():
        row = int(np.flatnonzero(token_ids < 0)[0])
        raise FloatingPointError(
            f"step {plan.step}: logits row {row} is NaN throughout: the forward is broken"
        )
    wanted = np.flatnonzero(plan.num_logprobs >= 0)
    logprobs: list[dict[int, float] | None] = [None] * len(token_ids)
    if len(wanted):
        say_slower(device)
        host_logits = device.download(logits)
        for row in wanted.tolist():
            logprobs[row] = top_logprobs(host_logits[row], int(token_ids[row]), int(plan.num_logprobs[row]))
    return SampleOutput(token_ids=token_ids.copy(), logprobs=tuple(logprobs))
