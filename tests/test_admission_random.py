"""Random workloads of every kind, a bounded number of them, and the tiniest budgets."""

from __future__ import annotations

import pytest
from random_workloads import MODES, run_workloads
from test_admission import Bench

from sharp.policies import POLICIES
from sharp.request import Request


def test_random_workloads() -> None:
    """What they met is counted: a workload that never evicts tests no eviction."""
    reached = run_workloads(300)
    print(dict(reached))
    kinds = "evictions preemptions forks rollbacks timeouts cancelled failed"
    for kind in ("hit tokens", "copied pages", "unknown ids", "dropped tokens", *kinds.split()):
        assert reached[kind] > 10, kind


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_tiny_budgets_complete(mode: str, policy: str, caching: bool) -> None:
    """16 tokens a step, 3 pages of 4 tokens: everything ends, also when cached pages hold all the memory."""
    bench = Bench(
        3,
        4,
        admission=mode,
        scheduling_policy=policy,
        max_num_batched_tokens=16,
        max_bypass=2,
        prefix_caching=caching,
    )
    items: list[Request] = []
    for i in range(40):
        items.append(bench.add(f"r{i}", 1 + i % 8, max_tokens=1 + i % 5, priority=i % 3))
    bench.finish()
    assert {item.finish_reason for item in items} == {"length"}
    assert bench.scheduler.blocks.num_cached == 0 or caching
