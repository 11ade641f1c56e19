"""Values a caller may give: each wrong one is refused where it is given, by a message that names it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from fake_model import engine_config

from sharp.config import EngineConfig
from sharp.plan import BatchPlan
from sharp.request import MAX_LOGPROBS, MAX_SAMPLES, Request, SamplingParams

BAD_PARAMS: list[tuple[str, Any, type[Exception], str]] = [
    ("max_tokens", 0, ValueError, "0"),
    ("max_tokens", -5, ValueError, "-5"),
    ("max_tokens", 2**31, ValueError, "2147483647"),
    ("max_tokens", True, TypeError, "True"),
    ("max_tokens", 1.0, TypeError, "1.0"),
    ("max_tokens", "16", TypeError, "'16'"),
    ("max_tokens", None, TypeError, "None"),
    ("temperature", -0.5, ValueError, "-0.5"),
    ("temperature", math.nan, ValueError, "nan"),
    ("temperature", math.inf, ValueError, "inf"),
    ("temperature", 1e300, ValueError, "1e\\+06"),
    ("temperature", 10**400, ValueError, "1e\\+06"),
    ("temperature", 1e-300, ValueError, "1e-06"),
    ("temperature", "hot", TypeError, "'hot'"),
    ("temperature", True, TypeError, "True"),
    ("temperature", None, TypeError, "None"),
    ("top_k", -1, ValueError, "-1"),
    ("top_k", 2**31, ValueError, "2147483647"),
    ("top_k", 1.0, TypeError, "1.0"),
    ("top_k", True, TypeError, "True"),
    ("top_k", "40", TypeError, "'40'"),
    ("top_p", 0, ValueError, "over 0.*0"),
    ("top_p", -0.1, ValueError, "-0.1"),
    ("top_p", 1.01, ValueError, "at most 1.*1.01"),
    ("top_p", math.nan, ValueError, "nan"),
    ("top_p", 10**400, ValueError, "at most 1"),
    ("top_p", "0.9", TypeError, "'0.9'"),
    ("top_p", True, TypeError, "True"),
    ("top_p", None, TypeError, "None"),
    ("seed", -1, ValueError, "-1"),
    ("seed", 2**64, ValueError, "18446744073709551616"),
    ("seed", 1.5, TypeError, "1.5"),
    ("seed", False, TypeError, "False"),
    ("stop", 3, TypeError, "3"),
    ("stop", b"x", TypeError, "b'x'"),
    ("stop", ["a", 1], TypeError, "1"),
    ("stop", "", ValueError, "1 character"),
    ("stop", ["a", ""], ValueError, "1 character"),
    ("stop", {"a": 1}, TypeError, "a"),
    ("stop_token_ids", "12", TypeError, "12"),
    ("stop_token_ids", 5, TypeError, "5"),
    ("stop_token_ids", [-1], ValueError, "-1"),
    ("stop_token_ids", [1.0], TypeError, "1.0"),
    ("stop_token_ids", [True], TypeError, "True"),
    ("ignore_eos", 1, TypeError, "1"),
    ("logprobs", -1, ValueError, "-1"),
    ("logprobs", MAX_LOGPROBS + 1, ValueError, str(MAX_LOGPROBS)),
    ("logprobs", True, TypeError, "True"),
    ("n", 0, ValueError, "0"),
    ("n", -3, ValueError, "-3"),
    ("n", MAX_SAMPLES + 1, ValueError, str(MAX_SAMPLES)),
    ("n", True, TypeError, "True"),
    ("n", 2.0, TypeError, "2.0"),
    ("timeout_s", 0, ValueError, "0"),
    ("timeout_s", -1.5, ValueError, "-1.5"),
    ("timeout_s", math.nan, ValueError, "nan"),
    ("timeout_s", math.inf, ValueError, "inf"),
    ("timeout_s", 10**400, ValueError, "1e\\+09"),
    ("timeout_s", "soon", TypeError, "'soon'"),
    ("timeout_s", True, TypeError, "True"),
]


@pytest.mark.parametrize(("name", "value", "error", "told"), BAD_PARAMS)
def test_bad_sampling_params(name: str, value: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"(?s){name.removesuffix('_token_ids')}.*{told}"):
        SamplingParams(**{name: value})


def test_good_sampling_params() -> None:
    params = SamplingParams(max_tokens=1, temperature=0, stop="x", stop_token_ids=[3], logprobs=0)
    assert params.stop_strings == ("x",)
    assert params.stop_token_ids == (3,)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(temperature=1e-6, seed=2**64 - 1).seed == 2**64 - 1
    assert SamplingParams(top_k=2**31 - 1, top_p=1).top_k == 2**31 - 1
    assert (SamplingParams(top_k=0).top_k, SamplingParams().top_k, SamplingParams().top_p) == (0, None, 1.0)
    assert SamplingParams(top_p=1e-300).top_p == 1e-300
    hash(params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 2  # type: ignore[misc]


BAD_CONFIG: list[tuple[str, Any, type[Exception], str]] = [
    *(
        (name, 0, ValueError, "at least 1")
        for name in ("max_num_batched_tokens", "max_num_seqs", "block_size")
    ),
    *((name, -1, ValueError, "-1") for name in ("num_blocks", "memory_limit", "max_queue_len")),
    *((name, True, TypeError, "True") for name in ("max_num_seqs", "num_blocks", "seed")),
    ("block_size", 16.0, TypeError, "16.0"),
    ("max_queue_len", None, TypeError, "None"),
    ("max_model_len", 1, ValueError, "at least 2"),
    ("max_num_batched_tokens", 2**31, ValueError, "2147483647"),
    ("long_prefill_token_threshold", 0, ValueError, "at least 1"),
    ("max_num_seqs", 2000, ValueError, "1024"),
    ("seed", -1, ValueError, "-1"),
    ("seed", 2**64, ValueError, "2\\*\\*64"),
    ("dtype", "float16", ValueError, "bfloat16"),
    ("device", "tpu", ValueError, "cuda"),
    ("admission", "greedy", ValueError, "reserve, optimistic, not 'greedy'"),
    ("admission", None, ValueError, "None"),
    ("scheduling_policy", "lifo", ValueError, "fcfs, priority, .*blocking, latency-target, not 'lifo'"),
    ("scheduling_policy", "latency-target", ValueError, "needs target_itl_ms"),
    ("target_itl_ms", 5.0, ValueError, "5.0 goes with scheduling_policy 'latency-target', not with 'fcfs'"),
    ("scheduling_policy", 3, TypeError, "3"),
    ("prefix_caching", 1, TypeError, "1"),
    ("prefix_caching", None, TypeError, "None"),
    ("max_bypass", -1, ValueError, "at least 0"),
    ("max_bypass", 1.5, TypeError, "1.5"),
    ("rungs", [("gemm", "plain")], TypeError, "gemm"),
    ("rungs", {"gemm": 1}, TypeError, "1"),
]


@pytest.mark.parametrize(("name", "value", "error", "told"), BAD_CONFIG)
def test_bad_config(name: str, value: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"(?s){name}.*{told}"):
        EngineConfig(**{name: value})


def test_config_keeps_its_own_rungs() -> None:
    rungs = {"gemm": "plain"}
    config = EngineConfig(rungs=rungs)
    rungs["gemm"] = "other"
    assert config.rungs == {"gemm": "plain"}


def test_known_tokens() -> None:
    request = Request("r", None, [10, 11, 12], SamplingParams(), seed=0, output_token_ids=[13, 14])
    everything = [10, 11, 12, 13, 14]
    for start in range(6):
        for stop in range(start, 6):
            assert request.known_tokens(start, stop) == everything[start:stop]


def plan_of_two() -> BatchPlan:
    """A decode at position 4 of pages 2, 0 and a chunk of three at positions 0..2 of page 1; pages of 4
    tokens."""
    return BatchPlan(
        step=1,
        request_ids=("<a>", "b"),
        num_decodes=1,
        token_ids=np.array([7, 1, 2, 3], np.int32),
        positions=np.array([4, 0, 1, 2], np.int32),
        cu_seqlens_q=np.array([0, 1, 4], np.int32),
        context_lens=np.array([5, 3], np.int32),
        block_table=np.array([[2, 0], [1, -1]], np.int32),
        slot_mapping=np.array([0, 4, 5, 6], np.int32),
        logits_rows=np.array([0], np.int32),
        temperatures=np.zeros(1, np.float32),
        top_ks=np.zeros(1, np.int32),
        top_ps=np.ones(1, np.float32),
        seeds=np.zeros(1, np.uint64),
        output_indices=np.zeros(1, np.int32),
        num_logprobs=np.full(1, -1, np.int32),
        token_budget=8,
    )


def test_plan_properties() -> None:
    plan = plan_of_two()
    plan.check(4)
    assert (plan.num_tokens, plan.num_seqs, plan.padded_tokens) == (4, 2, 6)
    assert plan.logits_seqs.tolist() == [0]
    with pytest.raises(ValueError, match="read-only"):
        plan.token_ids[0] = 1


def test_plan_picture() -> None:
    picture = plan_of_two()._repr_html_()
    assert "&lt;a&gt;" in picture
    assert "<a>" not in picture
    assert "4 of 8 tokens" in picture
    assert "decode" in picture
    assert "chunk" in picture
    empty = dict.fromkeys(("token_ids", "positions", "slot_mapping", "context_lens"), np.zeros(0, np.int32))
    nothing = dataclasses.replace(
        plan_of_two(), request_ids=(), num_decodes=0, cu_seqlens_q=np.zeros(1, np.int32), **empty
    )
    assert "0 of 8 tokens" in nothing._repr_html_()


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": i32(5, 0, 1, 2)},
        {"positions": i32(4, 0, 2, 2)},
        {"slot_mapping": i32(1, 4, 5, 6)},
        {"slot_mapping": i32(0, 4, 5, 5)},
        {"context_lens": i32(4, 3)},
        {"context_lens": i32(5, 4)},
        {"block_table": i32(2, -1, 1, -1).reshape(2, 2)},
        {"cu_seqlens_q": i32(0, 2, 4)},
        {"cu_seqlens_q": i32(0, 1, 3)},
        {"num_decodes": 0},
        {"num_decodes": 2},
        {"logits_rows": i32(1)},
        {"temperatures": np.zeros(2, np.float32)},
        {"top_ks": i32(0, 0)},
        {"top_ks": np.zeros(1, np.float32)},
        {"top_ps": np.ones(1, np.float64)},
        {"token_ids": np.array([7, 1, 2, 3])},
        {"request_ids": ("b", "b")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_plan_check_sees_damage(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        dataclasses.replace(plan_of_two(), **change).check(4)


def test_small_config_is_valid() -> None:
    assert engine_config(max_num_batched_tokens=16).max_num_seqs == 8
