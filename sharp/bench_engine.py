"""The engine on the CPU beside transformers, on the same weights, checked before it counts.

Knows: prompts, ids, wall time. Refuses to know: kernels, and how a row is recorded. torch and transformers
are imported when a baseline is made. Refuses to report a time for answers that are not the baseline's.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sharp import results

NEAR_TIE = 0.02  # logits: under this top-2 margin of the baseline, either token is a right answer
SOURCES = (
    "sharp/engine.py", "sharp/scheduler.py", "sharp/running.py", "sharp/batching.py", "sharp/pagebook.py",
    "sharp/model.py", "sharp/staging.py", "sharp/sampling.py", "sharp/pipeline.py", "sharp/flights.py",
    "sharp/eager.py", "sharp/runtime.py", "sharp/graphs.py", "sharp/buckets.py", "sharp/step_buffers.py",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Prompts (token ids) and the number of new tokens of each; what is timed is the whole call."""

    name: str
    prompts: list[list[int]]
    new_tokens: int


def engine_cases(tokenizer: Any) -> list[Case]:
    """Batch-1 decoding (a short prompt, so that decode dominates), and the demo's 8 prompts of mixed
    length.
    """
    from sharp.demo_prompts import demo_conversations

    mixed = [tokenizer.encode(tokenizer.apply_chat_template(talk)) for talk in demo_conversations()]
    short = tokenizer.encode("The history of the bicycle begins")
    return [Case("decode-1x64", [short], 64), Case("mixed-8x48", mixed, 48)]


class Transformers:
    """The baseline: transformers' LlamaForCausalLM in float32 on the very weights of our checkpoint."""

    def __init__(self, checkpoint: Any) -> None:
        import torch
        import transformers

        config = checkpoint.config
        if config.architecture != "llama" or config.rope.kind != "default":
            found = f"{config.architecture} with {config.rope.kind} rope"
            raise ValueError(f"{checkpoint.path} is {found}; the baseline is llama with default rope")
        self.torch, self.pad = torch, config.eos_token_ids[0]
        self.name = f"transformers {transformers.__version__}"
        hf_config = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_q_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=config.bos_token_id,
            eos_token_id=None,
            pad_token_id=self.pad,
        )
        self.model = transformers.LlamaForCausalLM(hf_config).float().eval()
        state = {name: torch.from_numpy(checkpoint.read(name).copy()) for name in checkpoint.names}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"the baseline's weights do not fit: missing {missing}, unexpected {unexpected}")

    def generate(self, case: Case) -> list[list[int]]:
        """Greedy ids of a left-padded batch, as transformers' users run it."""
        torch = self.torch
        longest = max(map(len, case.prompts))
        ids = torch.tensor([[self.pad] * (longest - len(p)) + p for p in case.prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in case.prompts])
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=case.new_tokens,
                min_new_tokens=case.new_tokens,
            )  # fmt: skip
        return [row[longest:].tolist() for row in out]

    def margin(self, prefix: list[int]) -> float:
        """The top-2 margin of the next token's logits after `prefix`, unpadded."""
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([prefix])).logits[0, -1]
        best = self.torch.topk(logits, 2).values
        return float(best[0] - best[1])


def disagreement(case: Case, ours: list[list[int]], theirs: list[list[int]], baseline: Transformers) -> float:
    """The largest margin, in units of NEAR_TIE, at which the two first part; 0 if all ids are equal. Over
    1: wrong.
    """
    worst = 0.0
    for prompt, a, b in zip(case.prompts, ours, theirs, strict=True):
        parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if parted is not None:
            worst = max(worst, baseline.margin(prompt + b[:parted]) / NEAR_TIE)
    return worst


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_name() -> str:
    """ "CPU <model>" as the operating system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return "CPU " + line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "CPU " + (platform.processor() or platform.machine())


def bench_engine(model: str, commit: str, rounds: int) -> list[dict[str, Any]]:
    """Time the engine on the CPU beside transformers; one row per case."""
    from tqdm.auto import tqdm

    from sharp import LLM, SamplingParams
    from sharp.weights import open_checkpoint

    checkpoint = open_checkpoint(model)
    llm = LLM(model, device="cpu", dtype="float32", prefix_caching=False)  # every round does all the work
    baseline = Transformers(checkpoint)
    rows = []
    for case in engine_cases(llm.tokenizer):
        params = SamplingParams(max_tokens=case.new_tokens, temperature=0.0, ignore_eos=True)

        def ours(case: Case = case, params: SamplingParams = params) -> list[list[int]]:
            answers = llm.generate(case.prompts, params, use_tqdm=False)
            return [list(answer.outputs[0].token_ids) for answer in answers]

        def theirs(case: Case = case) -> list[list[int]]:
            return baseline.generate(case)

        err = disagreement(case, ours(), theirs(), baseline)  # also the warm-up of both
        if err > 1:
            raise SystemExit(
                f"{case.name}: our ids part from the baseline's at a margin of {err * NEAR_TIE:.3f}"
            )
        times: list[tuple[float, float]] = []
        for _ in tqdm(range(rounds), desc=case.name, unit="round"):
            times.append((seconds(ours), seconds(theirs)))
        mine = statistics.median(t[0] for t in times)
        other = statistics.median(t[1] for t in times)
        tokens = len(case.prompts) * case.new_tokens
        row = results.make_row(
            op="engine", case=case.name, rung="reference", dtype="float32", value=round(tokens / mine, 2),
            unit="token/s", us=round(mine * 1e6), baseline=baseline.name, baseline_us=round(other * 1e6),
            ratio=round(other / mine, 3), err=round(err, 3), commit=commit,
            source_hash=results.source_hash(SOURCES), date=date.today().isoformat(), gpu=cpu_name(),
        )  # fmt: skip
        rows.append(row)
        spread = f"ours {min(t[0] for t in times):.2f}..{max(t[0] for t in times):.2f} s"
        spread += f", {baseline.name} {min(t[1] for t in times):.2f}..{max(t[1] for t in times):.2f} s"
        print(results.format_row(row), f"({spread}, {rounds} rounds)", flush=True)
    llm.close()
    return rows
