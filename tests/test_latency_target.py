"""latency-target against devices of known step times: exact, off by a factor, noisy, unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharp import LLM, SamplingParams
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.latency_target import BOUND, LEAST_CHUNK, LatencyTarget
from sharp.policies import SchedulingPolicy
from sharp.predictor import StepPredictor, StepWork
from sharp.probe import Probe, run_probe
from sharp.probe_cache import get_probe
from sharp.simulate import Simulated, simulate
from sharp.workloads import Arrival, every

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
SIZES = (1, 8, 64, 512, 4096)


def gpu_like(work: StepWork) -> float:
    """4 ms up to 200 tokens, then 20 us a token; 1 ns for a pair of a chunk's, 50 ns for a decode's key."""
    tokens = work.decodes + sum(count for count, _ in work.chunks)
    pairs = sum(count * (context + count / 2) for count, context in work.chunks)
    return 20e-6 * max(200, tokens) + 1e-9 * pairs + 50e-9 * work.keys


def curves_of(truth: Callable[[StepWork], float]) -> tuple[StepCurve, StepCurve]:
    """What a probe would measure of such a device."""
    prefill = [(t, c, truth(StepWork(0, 0, 0, ((t, c),), 1))) for t in SIZES for c in (0, 1024)]
    decode = [(n, c, truth(StepWork(n, n * c, c, (), n))) for n in (1, 4, 16, 64) for c in (64, 1024)]
    return StepCurve.of(prefill), StepCurve.of(decode)


class Device:
    """Stands where simulate asks for seconds: the truth, times a factor, times noise."""

    def __init__(self, factor: float = 1.0, noise: float = 0.0, outliers: int = 0) -> None:
        self.factor, self.noise, self.outliers = factor, noise, outliers
        self.rng, self.steps = np.random.default_rng(0), 0

    def seconds(self, work: StepWork) -> float:
        self.steps += 1
        slow = 20.0 if self.outliers and self.steps % self.outliers == 0 else 1.0
        return gpu_like(work) * self.factor * slow * math.exp(self.noise * self.rng.standard_normal())


STREAMS = [Arrival(0.0, 64, 2000) for _ in range(16)]
WORKLOAD = sorted(
    [*STREAMS, *every(0.5, 10, prompt_tokens=6000, output_tokens=8, start=1)], key=lambda a: a.arrival_s
)


def run(policy: Any, device: Any, **options: Any) -> Simulated:
    config = EngineConfig(
        scheduling_policy=policy, max_num_batched_tokens=4096, max_num_seqs=64, max_model_len=8192, **options
    )
    found = simulate(WORKLOAD, device, config, num_blocks=4096, max_model_len=8192)
    assert found.completed == len(WORKLOAD)
    return found


def policy(target: float = 10.0) -> LatencyTarget:
    return LatencyTarget(target, StepPredictor(*curves_of(gpu_like)))


def test_the_target_holds_and_the_device_is_busy() -> None:
    found, fastest = run(policy(), Device()), run("fcfs", Device())
    assert fastest.itl.p99 > 0.045  # without a target a prompt's chunk delays all
    assert 0.008 < found.itl.p99 <= 0.010
    assert found.itl.max <= 0.010
    assert found.seconds < 1.15 * fastest.seconds


@pytest.mark.parametrize("factor", [3.0, 1.5, 0.5, 1 / 3])
def test_curves_off_by_a_factor(factor: float) -> None:
    found = run(policy(15.0 * factor), Device(factor))
    assert found.itl.p99 <= 0.015 * factor
    assert found.itl.p99 > 0.0105 * factor  # and the time that there is gets used
    assert found.ttft.max < 4 * factor


def test_noise_and_pauses() -> None:
    noisy = run(policy(), Device(noise=0.05))
    assert noisy.itl.p95 <= 0.0105
    assert noisy.itl.p99 <= 0.011
    paused = policy()
    found = run(paused, Device(outliers=50))
    assert found.itl.p95 <= 0.010
    assert 0.8 < paused.factor < 1.1  # one pause in 50 steps is no slower device
    assert found.ttft.p95 < 2 * run(policy(), Device()).ttft.p95


def test_the_correction_is_bounded() -> None:
    one = policy()
    plan: Any = type("Plan", (), {})()
    plan.num_decodes, plan.logits_rows = 1, [0, 1]
    plan.context_lens, plan.cu_seqlens_q = np.array([65, 100]), np.array([0, 1, 101])
    for _ in range(100):
        one.observe(plan, 1e9)
    assert one.factor == BOUND
    for _ in range(100):
        one.observe(plan, 1e-9)
    assert one.factor == 1 / BOUND


def test_without_a_probe_it_learns() -> None:
    guess = LatencyTarget(10.0)
    assert guess.guessing
    found = run(guess, Device())
    assert found.itl.p99 <= 0.0105
    assert found.seconds < 1.5 * run("fcfs", Device()).seconds
    slow = LatencyTarget(100.0)
    assert run(slow, Device(10)).itl.p99 <= 0.105


def test_a_prompt_is_read_even_if_decodes_alone_take_longer() -> None:
    """Decodes alone take 4 ms and more; 5 ms leave nothing for chunks beyond the least."""
    found = run(policy(4.5), Device(1.5))
    assert found.completed == len(WORKLOAD)
    contexts = np.full(16, 64, np.int32)
    assert policy(4.1).budget(contexts, [], 4000) >= LEAST_CHUNK
    assert policy(4.1).budget(contexts, [], 5) == 5
    assert policy(4.1).budget(contexts[:0], [], 4000) == 4000
    assert policy(4.1).budget(contexts, [], 4000) < 250


class Reading:
    def __init__(self, computed: int) -> None:
        self.num_computed_tokens, self.num_tokens = computed, computed + 100_000
        self.request_id = str(computed)


def test_what_is_over_the_target_waits_where_that_is_sooner() -> None:
    """16 tokens behind 64,000 keys take 5.1 ms beside decodes of 4.05: over the target of 4.3. Where a step
    may be large, one in 150 is, and others are read meanwhile; where it may not, the least goes on."""
    contexts, far, near = np.full(16, 64, np.int32), Reading(64_000), Reading(0)
    one = policy(4.3)
    assert one.budget(contexts, [far, near], 4000) == 4000  # type: ignore[list-item]
    for _ in range(3):
        chunk = one.budget(contexts, [far, near], 4000)  # type: ignore[list-item]
        assert LEAST_CHUNK <= chunk < 200
        assert one.share([(far, 4000), (near, 4000)], chunk) == [0, chunk]  # type: ignore[list-item]
    plan: Any = type("Plan", (), {})()
    plan.num_decodes, plan.logits_rows, plan.cu_seqlens_q = 16, [0] * 16, np.arange(17)
    plan.context_lens = contexts
    for _ in range(151):
        one.observe(plan, 4.05e-3)
    assert one.budget(contexts, [far, near], 4000) == 4000  # type: ignore[list-item]
    small = policy(4.3)
    for _ in range(3):
        assert small.budget(contexts, [far], 200) == LEAST_CHUNK  # type: ignore[list-item]
        assert small.share([(far, 200)], LEAST_CHUNK) == [LEAST_CHUNK]  # type: ignore[list-item]


def test_longer_contexts_make_smaller_chunks() -> None:
    contexts = np.full(16, 64, np.int32)
    sizes = [policy(20).budget(contexts, [Reading(c)], 4096) for c in (0, 4000, 64_000)]  # type: ignore[list-item]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[2]
    for size, context in zip(sizes, (0, 4000, 64_000), strict=True):
        work = StepWork(16, 16 * 64, 64, ((size, context),), 16)
        assert 0.017 < gpu_like(work) <= 0.020


@pytest.mark.parametrize(
    ("target", "error", "told"),
    [
        (0, ValueError, "positive number of milliseconds, not 0"),
        (-1.0, ValueError, "not -1.0"),
        (math.nan, ValueError, "not nan"),
        (math.inf, ValueError, "not inf"),
        ("5", TypeError, "'5'"),
        (True, TypeError, "True"),
        (3.0, ValueError, r"3 cannot be met: a step that decodes one token and reads no prompt takes 4 ms"),
    ],
)
def test_wrong_targets(target: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"target_itl_ms.*{told}"):
        policy(target)
    if error is TypeError or "cannot" not in told:
        with pytest.raises(error, match="target_itl_ms"):
            EngineConfig(scheduling_policy="latency-target", target_itl_ms=target)


@pytest.mark.parametrize("tokens", [-1, 4096, 10**9, 0, 1.5, True, None])
def test_a_wrong_budget_is_told(tokens: Any) -> None:
    class Bad(SchedulingPolicy):
        name = "bad"

        def budget(self, contexts: Any, prompts: Any, most: int) -> Any:
            return tokens if len(contexts) == 16 or tokens == 0 else most

    with pytest.raises(ValueError, match=r"'bad' gives prompts .* tokens of a step with \d+ decodes"):
        run(Bad(), Device())


def test_a_policy_may_pause_reading() -> None:
    """0 while something decodes is a policy's right: prompts then wait for the answers' end."""

    class AnswersFirst(SchedulingPolicy):
        name = "answers first"

        def budget(self, contexts: Any, prompts: Any, most: int) -> int:
            return 0 if len(contexts) else most

    found = run(AnswersFirst(), Device())
    assert found.itl.max < 0.006


def test_the_llm_takes_the_kept_step_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A probe of this model, device and block size is used; without one it is said that times are guessed."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path))
    options: dict[str, Any] = {
        "device": "cpu", "scheduling_policy": "latency-target", "target_itl_ms": 500.0, "num_blocks": 20,
        "progress": False,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"step times of a slow device.*nothing kept.*`sharp probe MODEL`"):
        llm = LLM(TINY, **options)
    chosen = llm.engine.scheduler.policy
    assert isinstance(chosen, LatencyTarget)
    assert chosen.guessing
    llm.close()
    kept = get_probe(TINY, EngineConfig(device="cpu"), measure=short_probe)
    with LLM(TINY, **options, max_num_seqs=9) as llm:
        chosen = llm.engine.scheduler.policy
        assert isinstance(chosen, LatencyTarget)
        assert not chosen.guessing
        assert chosen.predictor.prefill == kept.prefill
        answers = llm.generate([[5, 9, 17], [7] * 90], SamplingParams(max_tokens=5), use_tqdm=False)
        assert [len(answer.outputs[0].token_ids) for answer in answers] == [5, 5]
    with pytest.warns(UserWarning, match="slow device"):
        LLM(TINY, **options, block_size=32).close()
    with pytest.raises(ValueError, match=r"target_itl_ms 1e-05 cannot be met: .* takes"):
        LLM(TINY, **{**options, "target_itl_ms": 1e-5})


def short_probe(*args: Any, **options: Any) -> Probe:
    return run_probe(*args, **options, limit_s=0.3)
