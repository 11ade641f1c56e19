"""Real models on the reference with a step in flight: the same ids as without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engine_checks import TINY

from sharp.config import EngineConfig
from sharp.engine import Engine
from sharp.model import Model
from sharp.request import SamplingParams
from sharp.stall import Borrowed
from sharp.weights import open_checkpoint

Answers = dict[str, list[tuple[tuple[int, ...], str, str | None]]]


def answers(
    model: Model, config: EngineConfig, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[Answers, Engine]:
    """Requests that come a few steps apart: ids, text and reason of each of their answers."""
    engine = Engine(Borrowed(model), model.tokenizer, config)
    last: Answers = {}

    def step() -> None:
        for output in engine.step():
            last[output.request_id] = [(a.token_ids, a.text, a.finish_reason) for a in output.outputs]

    for number, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(prompt, own, str(number))
        for _ in range(number):
            step()
    while engine.has_unfinished:
        step()
        engine.scheduler.check()
    engine.close()
    return last, engine


def check(path: Path, tokens: int, prompts: list[list[int]], **options: object) -> Engine:
    """Chunks, prefix hits, samples, preemption, greedy and drawn answers; returns the engine with overlap."""
    config = EngineConfig(device="cpu", dtype="float32", **options)  # type: ignore[arg-type]
    model = Model.load(path, config)
    params = [
        SamplingParams(max_tokens=tokens, temperature=0.7 * (i % 2), seed=i, n=1 + (i == 1))
        for i in range(len(prompts))
    ]
    plain, _ = answers(model, config, prompts, params)
    ahead, engine = answers(model, EngineConfig(**{**vars(config), "overlap": True}), prompts, params)
    model.close()
    assert engine.overlap
    assert ahead == plain
    return engine


BEGINNING = np.random.default_rng(1).integers(3, 250, 80).tolist()


@pytest.mark.parametrize("admission", ["reserve", "optimistic"])
def test_tiny(admission: str) -> None:
    prompts = [[*BEGINNING[:66], 9, 11], [*BEGINNING, 4], [7], BEGINNING[:20], [*BEGINNING[:65], 8]]
    engine = check(
        TINY, 70, prompts, num_blocks=10 if admission == "reserve" else 7, admission=admission,
        max_num_batched_tokens=48, max_num_seqs=4,
    )  # fmt: skip
    assert (engine.scheduler.pages.hit_tokens > 0) == (admission == "reserve")
    assert engine.scheduler.pages.forks.forked > 0
    assert (engine.scheduler.preemptions > 0) == (admission == "optimistic")


def test_demo(demo_model: Path) -> None:
    """A short answer ends by eos, so a step goes too far; the others are cut off."""
    tokenizer = open_checkpoint(demo_model).tokenizer()
    talk = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    chat = tokenizer.encode(tokenizer.apply_chat_template(talk), add_special_tokens=False)
    prompts = [chat, [*BEGINNING[:70], 4], [504, 2365, 282]]
    engine = check(demo_model, 12, prompts, num_blocks=12, max_num_batched_tokens=64, max_num_seqs=4)
    ends = sum(record.num_sampled < record.num_decodes for record in engine.stats.history)
    assert ends > 0
