"""sharp: an LLM inference engine in readable Python, from the scheduler to the kernels.

A padded rectangle is never built. A step is a ragged list of (request, number of new tokens); a decode is the
case of one token, a prompt chunk the case of many; several prompts and many decodes ride in one forward pass,
under one token budget.

    Scheduler.plan() -> BatchPlan -> stage() -> DeviceBatch -> forward() -> logits -> sample() -> ids
                     -> Scheduler.commit() -> RequestOutput

- scheduler.py decides, in pure Python; plan.py is its decision as numpy arrays; nothing else changes a
  Request. What runs is a table of columns (running.py), its pages are in one book (pagebook.py).
- staging.py moves a plan to the device; model.py is one forward for every device; `ops` are numpy
  (`reference`) or numba.cuda kernels (`plain`, and faster ones), picked op by op: LLM(rungs={"gemm":
  "plain"}).
- On a GPU, runtime.py queues a step behind the one before: its words go to fixed buffers (step_buffers.py),
  its launches are one replay of a graph (graphs.py).
- engine.py is the only loop, pipeline.py its steps: with overlap the next one is planned and launched while
  one runs, and ids that only the device knows are named by their rows (flights.py). A step that fails ends
  its own requests (failures.py). If the loop dies, every caller gets its error at once; nobody hangs.
- Admission books a request's worst case in KV pages, so that nothing running can run out of memory. Equal
  beginnings are computed once (prefix.py); n answers share one reading of their prompt (forks.py).
- In one rung family on one device, a request's answer has the same bits whatever shares its batch. (The numpy
  reference promises equal ids only: BLAS chooses its summation order by the shape.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharp.config import EngineConfig, ModelConfig
    from sharp.engine import Engine
    from sharp.failures import StepFailed
    from sharp.llm import LLM
    from sharp.plan import BatchPlan, SampleOutput
    from sharp.request import (
        CompletionOutput,
        EngineClosed,
        EngineDead,
        QueueFull,
        RequestOutput,
        RequestTooLarge,
        SamplingParams,
    )

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "Engine": "engine",
    "EngineConfig": "config",
    "ModelConfig": "config",
    "BatchPlan": "plan",
    "SampleOutput": "plan",
    "CompletionOutput": "request",
    "EngineClosed": "request",
    "EngineDead": "request",
    "QueueFull": "request",
    "RequestOutput": "request",
    "RequestTooLarge": "request",
    "SamplingParams": "request",
    "StepFailed": "failures",
}

__all__ = [
    "LLM",
    "BatchPlan",
    "CompletionOutput",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineDead",
    "ModelConfig",
    "QueueFull",
    "RequestOutput",
    "RequestTooLarge",
    "SampleOutput",
    "SamplingParams",
    "StepFailed",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first used: `import sharp` itself loads nothing heavy."""
    if name in _HOMES:
        return getattr(import_module(f"sharp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sharp' has no attribute {name!r}")
