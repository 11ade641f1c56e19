"""The engine against Hugging Face transformers in float32 (files and their origin: golden/make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_checks import TINY, load, poison

from sharp import LLM, SamplingParams
from sharp.plan import BatchPlan

GOLDEN = Path(__file__).resolve().parent / "golden"
NUM_TOKENS = 48
NEAR_TIE = 0.02  # transformers' own margin between its two best tokens, in logits
MAX_EXEMPT = 0.02  # of all tokens
MAX_ERROR = 2e-3  # of a logit
BLOCK = 64


def golden(name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    rows = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["prompts"]
    with np.load(GOLDEN / f"{name}.npz") as file:
        return rows, dict(file)


def check_ids(rows: list[dict[str, Any]], answers: list[list[int]]) -> int:
    """Ids are equal up to the first near tie that fell the other way; returns the number of exempt tokens."""
    exempt = 0
    for row, ids in zip(rows, answers, strict=True):
        assert len(ids) == len(row["token_ids"])
        for at, (ours, theirs) in enumerate(zip(ids, row["token_ids"], strict=True)):
            if ours != theirs:
                where = f"{row['prompt'][:30]!r} differs at token {at}: {ours}, not {theirs}"
                assert row["margins"][at] < NEAR_TIE, where
                exempt += len(ids) - at
                break
    total = sum(len(row["token_ids"]) for row in rows)
    assert exempt <= MAX_EXEMPT * total, f"{exempt} of {total} tokens are exempt as near ties"
    return exempt


def packed(rows: list[dict[str, Any]]) -> BatchPlan:
    """All prompts with their golden continuations as one prefill; logits at every generated position.

    Pages are dealt out in turns, so that no sequence's pages are neighbours.
    """
    sequences = [row["prompt_token_ids"] + row["token_ids"][:-1] for row in rows]
    lens = np.array([len(ids) for ids in sequences])
    assert lens.min() > 1
    cu_seqlens = np.concatenate([[0], np.cumsum(lens)])
    pages = -(-lens // BLOCK)
    table, page = np.full((len(rows), pages.max()), -1), 0
    for column in range(pages.max()):
        for row in range(len(rows)):
            if column < pages[row]:
                table[row, column], page = page, page + 1
    positions = np.concatenate([np.arange(n) for n in lens])
    owner = np.repeat(np.arange(len(rows)), lens)
    slots = table[owner, positions // BLOCK] * BLOCK + positions % BLOCK
    logits_rows = np.concatenate([np.arange(end - NUM_TOKENS, end) for end in cu_seqlens[1:]])
    num_rows = len(logits_rows)
    return BatchPlan(
        step=0,
        request_ids=tuple(str(i) for i in range(len(rows))),
        num_decodes=0,
        token_ids=np.concatenate(sequences).astype(np.int32),
        positions=positions.astype(np.int32),
        cu_seqlens_q=cu_seqlens.astype(np.int32),
        context_lens=lens.astype(np.int32),
        block_table=table.astype(np.int32),
        slot_mapping=slots.astype(np.int32),
        logits_rows=logits_rows.astype(np.int32),
        temperatures=np.zeros(num_rows, np.float32),
        top_ks=np.zeros(num_rows, np.int32),
        top_ps=np.ones(num_rows, np.float32),
        seeds=np.zeros(num_rows, np.uint64),
        output_indices=np.zeros(num_rows, np.int32),
        num_logprobs=np.full(num_rows, -1, np.int32),
    )


def teacher_forced(path: Path, rows: list[dict[str, Any]]) -> np.ndarray:
    """The reference's logits f32[prompts, NUM_TOKENS, V]."""
    plan = packed(rows)
    model, _ = load(
        path,
        "cpu",
        "float32",
        max_num_batched_tokens=plan.num_tokens,
        max_num_seqs=len(plan.logits_rows),
        num_blocks=int(plan.block_table.max()) + 1,
        block_size=BLOCK,
    )
    poison(model)
    logits = np.array(model.forward(model.stage(plan)))
    model.close()
    return logits.reshape(len(rows), NUM_TOKENS, -1)


# ---- the demo model


def test_demo_greedy_ids(demo_model: Path) -> None:
    """All prompts in one batch: text in, as a user gives it."""
    rows, _ = golden("smollm2")
    assert len(rows) >= 12
    assert max(len(row["prompt_token_ids"]) for row in rows) >= 1500
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(demo_model, device="cpu", dtype="float32", progress=False) as llm:
        outputs = llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        assert list(output.prompt_token_ids) == row["prompt_token_ids"], row["name"]
    exempt = check_ids(rows, [list(output.outputs[0].token_ids) for output in outputs])
    print(f"{len(rows)} prompts x {NUM_TOKENS} tokens, {exempt} exempt")


def test_demo_logits(demo_model: Path) -> None:
    rows, arrays = golden("smollm2")
    logits, worst = teacher_forced(demo_model, rows), 0.0
    for index, row in enumerate(rows):
        ids, expected = arrays[f"ids_{index}"], arrays[f"logits_{index}"]
        assert ids.shape == (NUM_TOKENS, 20)
        error = np.abs(np.take_along_axis(logits[index], ids, axis=1) - expected).max()
        assert error < MAX_ERROR, f"{row['name']}: {error}"
        # And nothing else belongs among the best: whatever is left is no larger than the 20th.
        rest = logits[index].copy()
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        assert (rest.max(axis=1) < expected[:, -1] + MAX_ERROR).all(), row["name"]
        worst = max(worst, float(error))
    print(f"largest error of {len(rows) * NUM_TOKENS * 20} logits: {worst:.2e}")


def test_golden_files_fit_their_prompts(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed prompts are those of golden/prompts.py: the files were made anew with the last change."""
    monkeypatch.syspath_prepend(GOLDEN)
    from prompts import CHATS, PROMPTS, TEXTS, TINY_PROMPTS

    from sharp.weights import open_checkpoint

    tokenizer = open_checkpoint(demo_model).tokenizer()
    rows, _ = golden("smollm2")
    made = {row["name"]: row["prompt"] for row in rows}
    assert made == {
        name: prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt)
        for name, prompt in PROMPTS.items()
    }
    assert [row["prompt"] for row in golden("tiny")[0]] == TINY_PROMPTS
    corpus = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    assert [row["text"] for row in corpus["texts"]] == TEXTS
    assert [row["messages"] for row in corpus["chats"]] == CHATS


# ---- the tiny model


def test_tiny_greedy_ids() -> None:
    rows, _ = golden("tiny")
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(TINY, device="cpu", dtype="float32", progress=False) as llm:
        outputs = llm.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    for row, output in zip(rows, outputs, strict=True):
        assert list(output.prompt_token_ids) == row["prompt_token_ids"], row["prompt"]
        assert list(output.outputs[0].token_ids) == row["token_ids"], row["prompt"]  # no exemption here


def test_tiny_logits() -> None:
    rows, arrays = golden("tiny")
    logits = teacher_forced(TINY, rows)
    for index, row in enumerate(rows):
        expected = arrays[f"logits_{index}"]
        np.testing.assert_allclose(logits[index], expected, rtol=0, atol=1e-4, err_msg=row["prompt"])


# ---- the checks themselves


def test_check_ids_can_fail() -> None:
    rows = [{"prompt": "x", "token_ids": [5] * 48, "margins": [1.0] * 46 + [0.001, 1.0]} for _ in range(12)]
    right = [[5] * 48 for _ in rows]
    assert check_ids(rows, right) == 0
    near_tie = [[5] * 46 + [6, 7], *right[1:]]
    assert check_ids(rows, near_tie) == 2
    with pytest.raises(AssertionError, match="differs at token 47: 6, not 5"):
        check_ids(rows, [[5] * 47 + [6], *right[1:]])
    with pytest.raises(AssertionError, match="exempt as near ties"):
        check_ids(rows, near_tie[:1] * 12)
