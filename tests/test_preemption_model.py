"""Real models in disturbed histories: preempted, resumed, cut, packed, pages found and shared."""

from __future__ import annotations

import numpy as np
import pytest
from engine_checks import TINY, check_histories, check_preempted, compare, history, load, poison

from sharp.random_model import RandomCheckpoint
from sharp.scheduler import Scheduler

PROMPTS = [[5, 9, 17, 3, 250, 44, 81], [7], list(range(20, 90))]
TINY_OPTIONS = {"num_blocks": 8, "max_num_batched_tokens": 64, "max_num_seqs": 4}
BEGINNING = np.random.default_rng(1).integers(3, 250, 150).tolist()
SHARED = [[*BEGINNING[:70], 9, 11], [*BEGINNING, 4], BEGINNING[:129], [*BEGINNING[:64], 8], BEGINNING[:20]]
SHARED_OPTIONS = {"num_blocks": 24, "max_num_batched_tokens": 300, "max_num_seqs": 6}


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


def test_tiny_in_random_histories():
    found, forked, preempted = check_histories(
        TINY, "cpu", "float32", SHARED, 12, 6, exact=False, **SHARED_OPTIONS
    )
    assert min(found, forked, preempted) > 0


def test_a_fork_of_plain_kernels_keeps_its_bits():
    """In the simulator, so as short as can be: the first sample reads three tokens at once; the second has
    two of them in a copied page, computes the third in a step of its own, and gets the same bits."""
    model, config = load(TINY, "cuda", "bfloat16", num_blocks=3, max_num_batched_tokens=8, max_num_seqs=2)
    poison(model)
    results, scheduler = history(model, config, [[5, 9, 17]], 1, samples=2)
    assert scheduler.pages.forks.forked == 1
    (ids, logits, stored), (own_ids, own_logits, own_stored) = results[0]
    assert ids == own_ids
    compare(own_logits, logits, True, "logits")
    compare(own_stored, stored, True, "K and V")
    model.close()


def test_demo_on_the_reference(demo_model):
    options = {
        "num_blocks": 4,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 2,
        "admissions": ("optimistic",),
    }
    prompts = [[1, 4093, 198, 504, 3575], [504, 2365, 282]]
    check_preempted(demo_model, "cpu", "float32", prompts, 52, (50,), exact=False, **options)


def test_demo_in_random_histories(demo_model):
    options = {"num_blocks": 16, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    prompts = [[*BEGINNING[:66], 9, 11], [*BEGINNING[:70], 4]]
    found, forked, _ = check_histories(
        demo_model, "cpu", "float32", prompts, 3, 2, exact=False, seed=3, **options
    )
    assert min(found, forked) > 0


@pytest.fixture
def child(on_gpu):
    """The parent of the groups selects these tests too, but in the simulator: far too slow for them."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the child that test_gpu.py starts")


@pytest.mark.gpu
@pytest.mark.usefixtures("child")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_keeps_its_bits_on_a_gpu(dtype):
    check_preempted(TINY, "cuda", dtype, PROMPTS, 60, (1, 23, 50), exact=True, **TINY_OPTIONS)


@pytest.mark.gpu
@pytest.mark.usefixtures("child")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_in_random_histories_on_a_gpu(dtype):
    """Another seed in each run."""
    found, forked, preempted = check_histories(
        TINY, "cuda", dtype, SHARED, 60, 12, exact=True, **SHARED_OPTIONS
    )
    assert min(found, forked, preempted) > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("child")
def test_the_demo_models_shape_in_random_histories_on_a_gpu():
    """Random weights, bfloat16, the rungs that this GPU takes by itself."""
    found, forked, preempted = check_histories(
        RandomCheckpoint("smollm2-135m"), "cuda", "bfloat16", SHARED, 52, 6, exact=True, **SHARED_OPTIONS
    )
    assert min(found, forked, preempted) > 0
