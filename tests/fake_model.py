"""A fake model for tests of the engine, strict on purpose: its answers depend on the pages it reads.

`forward` writes each new token with its position into the slot the plan names, and draws the next token's
logits from a hash of what it then finds through the block table up to context_lens. A skipped token, a wrong
slot, position, page or context length, or a page shared by two requests changes the answer from what
`expected` says. Cells that were never written raise. `fail_in` and `delay` serve the tests of errors and
interruptions.
"""

from __future__ import annotations

import codecs
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharp.config import EngineConfig, ModelConfig
from sharp.eager import Eager
from sharp.plan import BatchPlan, SampleOutput
from sharp.request import SamplingParams

EOS = 0
VOCAB = 300  # 0 and 1 special, 2..257 bytes, then some words that span and hold stop strings
WORDS = ("stop", "STOP here", "ab", "ba", "aba", "END", "E", "N", "D", "\n\n", " é", "日本", "x</s>y")


def model_config(max_positions: int = 4096, vocab_size: int = VOCAB) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        eos_token_ids=(EOS,),
    )


def next_logits(tokens: Any, positions: Any, vocab_size: int = VOCAB) -> np.ndarray:
    """f32[V]: as if from a model that attends to every (token, position) so far, in this order."""
    key = 1469598103934665603
    for token, position in zip(np.asarray(tokens).tolist(), np.asarray(positions).tolist(), strict=True):
        key = ((key ^ (token * 65599 + position + 1)) * 1099511628211) % 2**64
    logits = np.random.default_rng(key).standard_normal(vocab_size).astype(np.float32)
    logits[258:] += 2  # words and letters are likelier than single bytes
    logits[EOS] += 1.5
    return logits


def draw(
    logits: np.ndarray, temperature: float, seed: int, output_index: int, top_k: int = 0, top_p: float = 1.0
) -> int:
    """Greedy, or Gumbel-max with noise from (seed, output_index) alone, over what top-k and top-p leave."""
    if temperature > 0:
        noise = np.random.default_rng([int(seed), int(output_index)]).gumbel(size=len(logits))
        logits = logits / np.float32(temperature)
        order = np.argsort(-logits, kind="stable")[: top_k or None]
        if top_p < 1:
            sums = np.cumsum(np.exp(logits[order].astype(np.float64)))
            order = order[: np.searchsorted(sums, np.float32(top_p) * sums[-1]) + 1]
        logits = np.where(np.isin(np.arange(len(logits)), order), logits + noise, -np.inf)
    return int(np.argmax(logits))


def logprobs_of(logits: np.ndarray, token: int, count: int) -> dict[int, float]:
    scores = logits.astype(np.float64)
    scores = scores - np.log(np.exp(scores).sum())
    best = {int(i): float(scores[i]) for i in np.argsort(-scores, kind="stable")[:count]}
    best.setdefault(token, float(scores[token]))
    return best


def expected(
    prompt: list[int], params: SamplingParams, seed: int = 0, max_model_len: int = 4096
) -> list[int]:
    """The ids that any correct engine gives: a plain loop over one request. Stop strings are left out of
    it."""
    tokens = list(prompt)
    seed = seed if params.seed is None else params.seed
    while len(tokens) - len(prompt) < params.max_tokens and len(tokens) < max_model_len:
        logits = next_logits(tokens, range(len(tokens)))
        index, cut = len(tokens) - len(prompt), (params.top_k or 0, params.top_p)
        tokens.append(draw(logits, params.temperature, seed, index, *cut))
        if tokens[-1] in params.stop_token_ids or (tokens[-1] == EOS and not params.ignore_eos):
            break
    return tokens[len(prompt) :]


@dataclass
class FakeModel(Eager):
    """Pages of (token, position) cells instead of keys and values. Satisfies sharp.engine.StepModel."""

    config: ModelConfig = field(default_factory=model_config)
    num_blocks: int = 64
    block_size: int = 4
    check_plans: bool = True
    fail_in: str = ""  # "stage", "forward" or "sample" raises `error`, from step `fail_at` on
    fail_at: int = 1
    error: BaseException | None = None
    delay: float = 0.0  # seconds of a forward
    closed: bool = False
    device_name: str = "fake"

    def __post_init__(self) -> None:
        self.tokens = np.full(self.num_blocks * self.block_size, -1, np.int64)
        self.positions = np.full_like(self.tokens, -1)
        self.plans: list[BatchPlan] = []

    def _maybe_fail(self, phase: str) -> None:
        if self.fail_in == phase and len(self.plans) >= self.fail_at:
            assert self.error is not None
            raise self.error

    def stage(self, plan: BatchPlan) -> BatchPlan:
        assert not self.closed, "used after close()"
        self.plans.append(plan)
        self._maybe_fail("stage")
        if self.check_plans:
            plan.check(self.block_size)
            assert plan.block_table.max(initial=-1) < self.num_blocks
        return plan

    def forward(self, plan: BatchPlan) -> np.ndarray:
        if self.delay:
            time.sleep(self.delay)
        self._maybe_fail("forward")
        for pages in (self.tokens, self.positions):
            rows = pages.reshape(-1, self.block_size)
            rows[plan.page_copies[:, 1]] = rows[plan.page_copies[:, 0]]
        self.tokens[plan.slot_mapping] = plan.token_ids
        self.positions[plan.slot_mapping] = plan.positions
        logits = np.empty((len(plan.logits_rows), self.config.vocab_size), np.float32)
        for row, seq in enumerate(plan.logits_seqs.tolist()):
            own = np.arange(int(plan.context_lens[seq]))
            slots = plan.block_table[seq, own // self.block_size] * self.block_size + own % self.block_size
            tokens, positions = self.tokens[slots], self.positions[slots]
            # The query's own position counts as well: it is what a causal mask is made of.
            query = int(plan.positions[plan.logits_rows[row]])
            assert (tokens >= 0).all(), "a cell is read that was never written"
            positions = np.where(own == len(own) - 1, query, positions)
            logits[row] = next_logits(tokens, positions, self.config.vocab_size)
        return logits

    def sample(self, logits: np.ndarray, plan: BatchPlan) -> SampleOutput:
        self._maybe_fail("sample")
        numbers = (plan.temperatures, plan.seeds, plan.output_indices, plan.top_ks, plan.top_ps)
        columns = (column.tolist() for column in numbers)
        tokens = [draw(*parameters) for parameters in zip(logits, *columns, strict=True)]
        wanted = zip(logits, tokens, plan.num_logprobs.tolist(), strict=True)
        logprobs = tuple(None if n < 0 else logprobs_of(row, token, n) for row, token, n in wanted)
        return SampleOutput(token_ids=np.array(tokens, np.int32), logprobs=logprobs)

    def close(self) -> None:
        self.closed = True


class FakeTokenizer:
    """Bytes and a few words: characters beyond ASCII take several tokens, words hold several characters."""

    eos_token_ids = (EOS,)
    vocab_size = VOCAB

    def __init__(self) -> None:
        words = [word.encode() for word in WORDS]
        self.pieces = [b"", b"", *(bytes([i]) for i in range(256)), *words]
        # Ids past the words are letters again, so that random answers are readable text now and then.
        self.pieces += [bytes([97 + i % 4]) for i in range(VOCAB - len(self.pieces))]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + byte for byte in text.encode()]

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = True) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer(self.pieces)


class FakeDetokenizer:
    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self.decoder.decode(self.pieces[token_id])

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


def engine_config(**options: Any) -> EngineConfig:
    """Small numbers by default, so that every limit is met in a short test; strictly in order of arrival."""
    defaults = {"block_size": 4, "max_num_batched_tokens": 32, "max_num_seqs": 8, "max_bypass": 0}
    if options.get("scheduling_policy") == "latency-target":
        defaults["target_itl_ms"] = 20.0
    options = {**defaults, **options}
    return EngineConfig(**options)
