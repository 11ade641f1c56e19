"""Everything that callers do, at once: seconds of it here, minutes on a GPU (pytest -m "gpu and slow")."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_checks import TINY, load
from held_memory import counted_memory
from mixed_load import OPTIONS, Order, menu, run_mixed, with_stops

from sharp.plan import BatchPlan, SampleOutput
from sharp.random_model import RandomCheckpoint

SECONDS, GPU_SECONDS, MINUTES = 2.0, 20.0, 8
REACHED = {"length", "stop", "abort", "timeout", "cancelled", "refused"}
MAPS = 1 << 20  # bytes: tensor maps of launches, which are made when a launch of that size first comes
LEAK = 64 << 20  # bytes that a process may grow by after the first third: allocators keep some


def prepared(model: Any, config: Any, count: int, longest: int) -> list[Order]:
    orders = menu(count, model.config.vocab_size, longest, seed=0)
    return with_stops(model, model.tokenizer, config, orders)


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
    rungs as they are by default. Memory is this process's own, so that others may use the device too."""
    with counted_memory() as holds:
        model, config = load(
            RandomCheckpoint("smollm2-135m"), "cuda", "bfloat16", admission=admission, num_blocks=160,
            max_num_batched_tokens=512, max_num_seqs=48, max_queue_len=32, max_model_len=4096,
        )  # fmt: skip
        orders = prepared(model, config, count, 3000)
        found = run_mixed(
            model, model.tokenizer, config, orders, seconds, seed=2, wanted=REACHED, holds=holds
        )
        graphs = model.budget.graphs
        model.close()
    print(admission, found)
    assert set(found.reached) >= REACHED
    third = len(found.held) // 3
    assert found.held[0].device > 0
    assert no_more([held.device for held in found.held], third, MAPS), "what is asked of the device grows"
    assert no_more([held.pinned for held in found.held], third, LEAK), "pinned memory grows"
    assert no_more(found.host_bytes[third:], 0, LEAK), "the process grows"
    told = [held.process for held in found.held if held.process is not None]
    # A bucket's graph is made at its first step, whenever that comes.
    assert no_more(told, third, LEAK + graphs), "the process holds more and more of the device"


def no_more(sizes: list[int], looks: int, slack: int = 0) -> bool:
    """Whether nothing is larger than the largest of the first so many looks and one, and a slack."""
    return max(sizes, default=0) <= max(sizes[: looks + 1], default=0) + slack


def test_growth_is_noticed() -> None:
    assert no_more([], 1)
    assert no_more([5, 9, 9, 7], 1)
    assert not no_more([5, 8, 9, 7], 1)
    assert no_more([5, 8, 9, 7], 1, 1)


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
    """`python -m pytest --device=cuda -m "gpu and slow" -k reserve tests/test_mixed_load.py`, and the same
    with optimistic, side by side or one after the other: half of the minutes each."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only: python -m pytest --device=cuda -m 'gpu and slow'")
    on_a_gpu(admission, 30 * MINUTES, 200)
