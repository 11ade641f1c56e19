"""Everything that callers do, at once: seconds of it here, minutes on a GPU (pytest -m "gpu and slow")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_checks import TINY, load
from mixed_load import OPTIONS, Order, answers_alone, menu, run_mixed

from sharp.plan import BatchPlan, SampleOutput
from sharp.random_model import RandomCheckpoint

SECONDS, GPU_SECONDS, MINUTES = 2.0, 20.0, 8
REACHED = {"length", "stop", "abort", "timeout", "cancelled", "refused"}
LEAK = 64 << 20  # bytes that a process may grow by after the first third: allocators keep some


def prepared(model: Any, config: Any, count: int, longest: int) -> list[Order]:
    orders = menu(count, model.config.vocab_size, longest, seed=0)
    return [answers_alone(model, model.tokenizer, config, order) for order in orders]


@pytest.mark.parametrize(("admission", "overlap"), [("reserve", False), ("optimistic", True)])
def test_seconds_of_it_on_the_reference(admission: str, overlap: bool) -> None:
    model, config = load(TINY, "cpu", "float32", **{**OPTIONS, "admission": admission, "overlap": overlap})
    orders = prepared(model, config, 24, 130)
    wanted = {*REACHED, "queue full"} | ({"preempted"} if admission == "optimistic" else set())
    found = run_mixed(model, model.tokenizer, config, orders, SECONDS, seed=1, wanted=wanted)
    print(found)
    assert wanted <= set(found.reached)
    assert admission == "optimistic" or not found.reached["preempted"]
    model.close()


def test_a_neighbours_token_is_noticed() -> None:
    """A model whose answers depend on who shares the step, once in a while, does not pass."""

    model, config = load(TINY, "cpu", "float32", **OPTIONS)
    orders = prepared(model, config, 8, 60)
    right = model.sample

    def wrong(logits: Any, batch: Any) -> SampleOutput:
        sampled, plan = right(logits, batch), batch.plan
        assert isinstance(plan, BatchPlan)
        ids = sampled.token_ids.copy()
        if plan.num_seqs >= 4:
            ids[-1:] ^= 1
        return replace(sampled, token_ids=ids)

    model.sample = wrong
    with pytest.raises(AssertionError, match="alone it has"):
        run_mixed(model, model.tokenizer, config, orders, SECONDS, seed=1)
    model.close()


def on_a_gpu(admission: str, seconds: float, count: int) -> None:
    """The demo model's shape in bfloat16, with pages for a tenth of what is asked for; graphs, overlap and
    rungs as they are by default. Not run on a GPU yet."""
    model, config = load(
        RandomCheckpoint("smollm2-135m"), "cuda", "bfloat16", admission=admission, num_blocks=160,
        max_num_batched_tokens=512, max_num_seqs=48, max_queue_len=32, max_model_len=4096,
    )  # fmt: skip
    orders = prepared(model, config, count, 3000)
    found = run_mixed(model, model.tokenizer, config, orders, seconds, seed=2, wanted=REACHED)
    model.close()
    print(admission, found)
    assert set(found.reached) >= REACHED
    third = len(found.device_bytes) // 3
    assert max(found.device_bytes) <= max(found.device_bytes[: third + 1]), "the device's memory grows"
    assert max(found.host_bytes[third:]) < found.host_bytes[third] + LEAK, "the process grows"


@pytest.mark.gpu
@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_some_of_it_on_a_gpu(admission: str, on_gpu: bool) -> None:
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")
    on_a_gpu(admission, GPU_SECONDS, 40)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_minutes_of_it_on_a_gpu(admission: str, on_gpu: bool) -> None:
    """`python -m pytest --device=cuda -m "gpu and slow" tests/test_mixed_load.py`: the minutes in halves."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only: python -m pytest --device=cuda -m 'gpu and slow'")
    on_a_gpu(admission, 30 * MINUTES, 200)
