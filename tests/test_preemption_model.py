"""Real models, preempted in the middle of their answers and resumed: nothing changes."""

from __future__ import annotations

import pytest
from engine_checks import TINY, check_preempted

from sharp.scheduler import Scheduler

PROMPTS = [[5, 9, 17, 3, 250, 44, 81], [7], list(range(20, 90))]
TINY_OPTIONS = {"num_blocks": 8, "max_num_batched_tokens": 64, "max_num_seqs": 4}


def test_tiny_on_the_reference():
    check_preempted(TINY, "cpu", "float32", PROMPTS, 60, (1, 23, 50), exact=False, **TINY_OPTIONS)


def test_tiny_for_want_of_pages(monkeypatch):
    """Three sequences of one page that grow to two each, in four pages."""
    victims = []
    original = Scheduler.preempt

    def preempt(self, request):
        victims.append(request.request_id)
        original(self, request)

    monkeypatch.setattr(Scheduler, "preempt", preempt)
    prompts = [list(range(start, start + 10)) for start in (5, 40, 90)]
    options = {**TINY_OPTIONS, "num_blocks": 4}
    check_preempted(TINY, "cpu", "float32", prompts, 60, (), exact=False, **options)
    assert victims == ["2"]  # the youngest; its page and the spare one let both others grow


def test_demo_on_the_reference(demo_model):
    options = {"num_blocks": 4, "max_num_batched_tokens": 64, "max_num_seqs": 2}
    prompts = [[1, 4093, 198, 504, 3575], [504, 2365, 282]]
    check_preempted(demo_model, "cpu", "float32", prompts, 12, (5, 9), exact=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_keeps_its_bits_on_a_gpu(dtype):
    check_preempted(TINY, "cuda", dtype, PROMPTS, 60, (1, 23, 50), exact=True, **TINY_OPTIONS)
