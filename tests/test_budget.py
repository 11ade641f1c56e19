"""The budget's arithmetic, a smaller card simulated, and models refused before they are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_model import model_config

from sharp.budget import CUDA_CONTEXT, CUDA_RESERVE, Budget, plan_memory, weight_bytes
from sharp.config import EngineConfig, ModelConfig
from sharp.fits import known_models_that_fit, refuse_if_too_large
from sharp.model import Model
from sharp.model_config import ModelFileError

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
# The shapes of Llama-3.2-1B (its config.json).
LLAMA_1B = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)


def plan(model: ModelConfig = LLAMA_1B, *, free: int, kind: str = "cuda", **options: Any) -> Budget:
    config = EngineConfig(**options)
    return plan_memory(
        model, config, free=free, dtype="bfloat16", kind=kind, max_model_len=model.max_position_embeddings
    )


def test_terms_by_hand() -> None:
    budget = plan(free=20 * GIB)
    assert budget.weights == 2 * 1_235_814_400  # parameters as the model's card counts them
    columns = 2 * 2048 + (32 + 16) * 64 + 32 * 64 + 3 * 8192
    assert budget.activations == (1024 * columns + 64 * 2048) * 2
    assert budget.logits == 64 * 128256 * 4
    assert budget.rope_table == 131072 * 64 * 4
    assert budget.page_bytes == 2 * 16 * 8 * 64 * 64 * 2
    assert budget.staging == 64 * 4  # the ids that are sampled
    left = 20 * GIB - budget.activations - budget.logits - budget.rope_table - CUDA_RESERVE - 64 * 4
    assert budget.num_blocks == left // budget.page_bytes
    assert budget.arena == budget.weights + 20 * GIB - CUDA_RESERVE - left % budget.page_bytes


@pytest.mark.parametrize("card", [8, 24])
def test_memory_limit_is_all_of_a_smaller_card(card: int) -> None:
    """On a card of 80 GB: the pages of a card of 8 or 24 whose free memory lost context and weights."""
    limit = card * GIB
    budget = plan(free=76 * GIB, memory_limit=limit)
    taken = budget.weights + CUDA_CONTEXT + sum(v for k, v in budget.terms().items() if k != "free")
    assert limit - budget.page_bytes < taken <= limit
    assert budget == plan(free=limit - budget.weights - CUDA_CONTEXT)


def test_memory_limit_over_what_is_free_changes_nothing() -> None:
    assert plan(free=4 * GIB, memory_limit=80 * GIB) == plan(free=4 * GIB)


def test_memory_limit_on_a_host_counts_the_float32_weights() -> None:
    budget = plan(free=60 * GIB, kind="cpu", memory_limit=8 * GIB)
    assert budget.weights == 4 * LLAMA_1B.num_parameters
    assert budget.context == budget.reserve == 0
    taken = budget.weights + sum(v for k, v in budget.terms().items() if k != "free")
    assert 8 * GIB - budget.page_bytes < taken <= 8 * GIB


def test_a_number_of_pages_is_num_blocks() -> None:
    assert plan(free=20 * GIB, num_blocks=10).num_blocks == 10
    with pytest.raises(
        MemoryError, match=r"4000 KV pages need 8,388,608,000 bytes.*memory_limit 8,589,934,592"
    ):
        plan(free=76 * GIB, memory_limit=8 * GIB, num_blocks=4000)


def test_the_report_says_predicted_measured_and_error() -> None:
    budget = plan(free=20 * GIB)
    report = budget.report({"weights": budget.weights * 2, "reserve": 0, "buffers": 1000})
    terms = {term.name: term for term in report.terms}
    assert terms["weights"].error == pytest.approx(-0.5)
    assert terms["reserve"].error is None  # measured as nothing: no ratio
    assert terms["kv_pages"].measured is None
    buffers = (budget.activations, budget.logits, budget.rope_table, budget.staging, budget.kv_pages)
    assert terms["buffers"].predicted == sum(buffers)
    assert "-50.0%" in str(report)
    assert report._repr_html_().count("<tr>") == len(terms) + 1
    assert json.loads(json.dumps(report.as_json()))[1]["name"] == "weights"
    assert "kv_pages" in str(budget)
    assert "<table>" in budget._repr_html_()


def refuse(model: ModelConfig, free: int, **options: Any) -> None:
    refuse_if_too_large(
        model,
        EngineConfig(**options),
        where="big.gguf",
        free=free,
        dtype="bfloat16",
        kind="cuda",
        max_model_len=model.max_position_embeddings,
    )


def test_weights_that_do_not_fit_are_refused() -> None:
    weights = weight_bytes(LLAMA_1B, "bfloat16", "cuda")
    with pytest.raises(MemoryError, match=rf"big.gguf: the weights need {weights:,} bytes.*known models"):
        refuse(LLAMA_1B, free=2 * GIB)
    with pytest.raises(MemoryError, match=r"memory_limit 2,147,483,648"):
        refuse(LLAMA_1B, free=70 * GIB, memory_limit=2 * GIB)


def test_weights_without_room_for_a_page_are_refused() -> None:
    with pytest.raises(MemoryError, match=r"big.gguf: 1 KV pages need .* known models"):
        refuse(LLAMA_1B, free=3 * GIB)
    refuse(LLAMA_1B, free=4 * GIB)


def test_known_models_are_judged_by_their_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"small": model_config(), "large": LLAMA_1B}

    class Opened:
        def __init__(self, name: str) -> None:
            if name not in configs:
                raise ModelFileError(f"{name} was not pulled")
            self.config = configs[name]

    monkeypatch.setattr("sharp.fits.read_manifest", lambda: dict.fromkeys(("small", "large", "absent")))
    monkeypatch.setattr("sharp.weights.open_checkpoint", Opened)

    def fit(free: int) -> list[str]:
        return known_models_that_fit(EngineConfig(), free=free, dtype="bfloat16", kind="cuda")

    assert fit(20 * GIB) == ["small", "large"]
    assert fit(3 * GIB) == ["small"]
    assert fit(1 * GIB) == []
    with pytest.raises(MemoryError, match=r"known models that would fit: small$"):
        refuse(LLAMA_1B, free=3 * GIB)


def test_a_model_is_refused_before_its_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: Any, **options: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("sharp.model.load_weights", loaded)
    with pytest.raises(MemoryError, match="memory_limit 1,000"):
        Model.load(ROOT / "weights" / "tiny", EngineConfig(device="cpu", memory_limit=1000))


def test_a_loaded_model_stays_within_memory_limit() -> None:
    limit = 8 << 20
    model = Model.load(ROOT / "weights" / "tiny", EngineConfig(device="cpu", memory_limit=limit))
    buffers = sum(array.nbytes for array in vars(model.work).values()) + model.cos_sin.nbytes
    buffers += sum(cache.k.nbytes + cache.v.nbytes for cache in model.kv)
    assert model.budget.weights + buffers <= limit + model.work.sampled.nbytes
    model.close()
