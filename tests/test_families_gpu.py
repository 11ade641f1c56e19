"""Every family and switch with the plain kernels on a real GPU; test_gpu.py runs it in timed children."""

from __future__ import annotations

import numpy as np
import pytest
from family_checks import (
    CONFIGS,
    MAX_ERROR,
    NUM_PROMPT,
    ROWS,
    check_same_bits,
    golden,
    in_pieces,
    load_model,
    open_tiny,
    ways,
)

pytestmark = pytest.mark.gpu

FILE, LOGITS = golden()
PROMPTS = {row["name"]: row["prompt_token_ids"] for row in FILE["models"]}


@pytest.fixture(autouse=True)
def only_in_the_child(on_gpu):
    """The parent of the groups selects these tests too, but in the simulator: far too slow for them."""
    if not on_gpu:
        pytest.skip("runs under --device=cuda only, in the children that test_gpu.py starts")


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_gives_transformers_logits_and_keeps_its_bits(tmp_path, name):
    model, ids = load_model(open_tiny(tmp_path, name), "cuda", "float32"), PROMPTS[name]
    logits = check_same_bits(model, ids, ways(NUM_PROMPT), ids[::-1][:37])
    error = np.abs(logits[list(ROWS)] - LOGITS[name]).max()
    print(f"{name}: {error:.1e}")
    assert error < MAX_ERROR
    model.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_keeps_its_bits_and_is_as_near_as_the_rounded_reference(tmp_path, name):
    checkpoint, ids, errors = open_tiny(tmp_path, name), PROMPTS[name], []
    for device in ("cuda", "cpu"):
        model = load_model(checkpoint, device, "bfloat16")
        if device == "cuda":
            logits = check_same_bits(model, ids, ways(NUM_PROMPT), ids[::-1][:37])
        else:
            logits = in_pieces(model, ids, [])
        errors.append(np.abs(logits[list(ROWS)] - LOGITS[name]).mean())
        model.close()
    print(f"{name}: {errors[0]:.1e}, reference {errors[1]:.1e}")
    assert errors[0] < 2 * errors[1]
