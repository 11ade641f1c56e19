"""Which rungs a model's attention takes by itself: both or neither, of one family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sharp.config import EngineConfig
from sharp.rungs import RIDING_KEYS, attention_rungs, choose_rungs, describe_rungs, refuse_rungs, riding_keys
from sharp.weights import open_checkpoint

ROOT = Path(__file__).resolve().parent.parent
HOPPER = {"decode_attention": "hopper", "prefill_attention": "hopper"}
MMA = {"decode_attention": "mma_sync", "prefill_attention": "mma_sync"}


@pytest.fixture(scope="module")
def llama():
    """The sizes of Llama-3.2-1B's heads on the tiny model's."""
    config = open_checkpoint(ROOT / "weights" / "tiny").config
    return replace(config, hidden_size=2048, num_q_heads=32, num_kv_heads=8, head_dim=64)


@pytest.mark.parametrize(("where", "changes", "wanted"), [
    ((9, 0), {}, HOPPER),
    ((9, 0), {"num_q_heads": 28, "num_kv_heads": 4, "head_dim": 128}, HOPPER),
    ((9, 0), {"dtype": "float32"}, {}),
    ((9, 0), {"head_dim": 80}, {}),
    ((9, 0), {"num_q_heads": 34, "num_kv_heads": 2}, {}),
    ((9, 0), {"block_size": 32}, {}),
    ((8, 0), {}, MMA),
    ((8, 6), {"head_dim": 128, "dtype": "float16"}, MMA),
    ((12, 0), {"num_q_heads": 28, "num_kv_heads": 4, "head_dim": 128}, MMA),
    ((8, 9), {"dtype": "float32"}, {}),
    ((8, 9), {"head_dim": 80}, {}),
    ((7, 5), {}, {}),
    (None, {}, {}),
])  # fmt: skip
def test_a_model_takes_both_attentions_or_neither(llama, where, changes, wanted):
    given = dict(changes)
    dtype, block_size = given.pop("dtype", "bfloat16"), given.pop("block_size", 64)
    assert attention_rungs("plain", where, dtype, replace(llama, **given), block_size, {}) == wanted
    assert attention_rungs("reference", where, dtype, replace(llama, **given), block_size, {}) == {}


def test_who_forces_one_gets_the_partner_that_keeps_its_bits(llama):
    def picked(**forced):
        return attention_rungs("plain", (9, 0), "bfloat16", llama, 64, forced)

    assert picked(gemm="plain") == HOPPER
    assert picked(decode_attention="hopper") == {"prefill_attention": "hopper"}
    assert picked(prefill_attention="hopper") == {"decode_attention": "hopper"}
    assert picked(decode_attention="mma_sync") == {"prefill_attention": "hopper"}  # equal bits, and faster
    for mine in ("plain", "mine"):
        assert picked(decode_attention=mine) == picked(prefill_attention=mine) == {}
        assert picked(decode_attention="hopper", prefill_attention=mine) == {}


def test_the_engine_says_which(llama):
    device = SimpleNamespace(kind="cuda", name="a card", default_rung="plain", capability=(9, 0))
    device.dtype, config = "bfloat16", EngineConfig(rungs={"gemm": "plain"})
    rungs = choose_rungs(llama, config, device)
    refuse_rungs(rungs, llama, config, device)
    assert ", decode_attention + prefill_attention hopper, " in describe_rungs(rungs, "plain")


@pytest.mark.parametrize(
    ("decode", "prefill", "longest", "wanted"),
    [
        ("hopper", "hopper", RIDING_KEYS, None),
        ("hopper", "hopper", RIDING_KEYS + 1, RIDING_KEYS),
        ("mma_sync", "hopper", 131072, RIDING_KEYS),
        ("mma_sync", "mma_sync", 4096, None),
        (None, None, 131072, None),
        ("hopper", "plain", 100, 0),
        ("mine", "mine", 100, 0),
    ],
)
def test_decodes_ride_with_chunks_where_they_keep_their_bits(decode, prefill, longest, wanted):
    rungs = {"decode_attention": decode, "prefill_attention": prefill}
    chosen = {op: rung for op, rung in rungs.items() if rung}
    assert riding_keys(chosen, "plain", longest) == wanted
