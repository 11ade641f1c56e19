"""Benchmarks beside transformers and torch, in one process, interleaved, and checked before they count.

`python -m sharp.bench engine --against transformers --commit SHA --out FILE` measures the engine, `... gemm`
a kernel (kernels_numba/bench.py times it); `... import FILE` records;
with no arguments the recorded table is printed. torch and transformers are imported here alone, lazily.
Refuses to report a time for answers that are not the baseline's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sharp import results

NEAR_TIE = 0.02  # logits: under this top-2 margin of the baseline, either token is a right answer
SOURCES = ("sharp/engine.py", "sharp/scheduler.py", "sharp/model.py", "sharp/staging.py", "sharp/sampling.py")


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
    llm = LLM(model, device="cpu", dtype="float32")
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


def nvidia_facts() -> tuple[str, str]:
    """(GPU name, driver version). Raises SystemExit, after the recorded table, where there is no CUDA
    device."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()[0]  # fmt: skip
    except (OSError, subprocess.CalledProcessError, IndexError):
        show()
        raise SystemExit("no NVIDIA GPU here: nothing was measured; above is what is recorded") from None
    name, _, driver = found.partition(",")
    return name.strip(), driver.strip()


def bench_gemm(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the GEMM for many tokens beside torch.matmul; one row a case, written to --out as they come."""
    from tqdm.auto import tqdm

    from kernels_numba import bench, launch
    from kernels_numba.ops import OPS
    from kernels_numba.registry import pick

    gpu, driver = nvidia_facts()
    rung = pick("gemm", OPS["gemm"].rungs, args.rung)
    cases = bench.gemm_cases(args.quick, args.case)
    commit, digest = args.commit or head_commit(), results.source_hash(results.op_sources("gemm"))
    rows: list[dict[str, Any]] = []
    if args.resume and args.out and args.out.exists():
        earlier = json.loads(args.out.read_text(encoding="utf-8"))
        rows = [row for row in earlier if (row["commit"], row["source_hash"]) == (commit, digest)]
    done = {row["case"] for row in rows}
    todo = [case for case in cases if case.name not in done]
    progress = tqdm(bench.measure_all(todo, rung, args.rounds), total=len(todo), desc="gemm", unit="case")
    for case, measured in progress:
        figures = bench.gemm_figures(case, measured, gpu)
        row = results.make_row(
            op="gemm", case=case.name, rung=args.rung, dtype="bfloat16",
            value=figures["tflops"], unit="TFLOP/s",
            baseline="torch.matmul", err=round(measured.err, 3), commit=commit, source_hash=digest,
            date=date.today().isoformat(), gpu=gpu, driver=driver, ptxas=launch.linker_version(), **figures,
        )  # fmt: skip
        rows.append(row)
        spread = f"({measured.low:.1f}..{measured.high:.1f} us, {args.rounds} rounds, {measured.detail})"
        progress.write(f"{results.format_row(row)} {spread}")
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    ratios = [row["ratio"] for row in rows]
    print(
        f"{len(rows)} shapes: geometric mean {statistics.geometric_mean(ratios):.3f}x, "
        f"least {min(ratios):.3f}x"
    )
    return rows


def show() -> None:
    """Print the recorded table."""
    rows = results.read_rows()
    for row in rows:
        print(results.format_row(row))
    if not rows:
        print("no measurements are recorded yet (notebooks/results is empty)")


def head_commit() -> str:
    """The checkout's commit. Raises SystemExit where files differ from it: a row must name the code that
    ran.
    """
    git = ["git", "-C", str(results.ROOT)]
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "sharp", "kernels_numba"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if dirty:
        raise SystemExit(
            "sharp/ or kernels_numba/ differ from the last commit: commit first, or pass --commit"
        )
    return subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sharp.bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    commands = parser.add_subparsers(dest="command")
    engine = commands.add_parser("engine", help="the engine on the CPU beside transformers")
    engine.add_argument("--against", choices=["transformers"], default="transformers")
    engine.add_argument("--model", default="smollm2-135m-instruct")
    engine.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    engine.add_argument("--rounds", type=int, default=5)
    engine.add_argument("--out", type=Path, help="write the rows here, for `import`")
    gemm = commands.add_parser("gemm", help="the GEMM for many tokens beside torch.matmul, on a GPU")
    gemm.add_argument("--against", choices=["torch"], default="torch")
    gemm.add_argument("--rung", default="hopper")
    gemm.add_argument("--case", default="", help="only shapes whose name contains this text")
    gemm.add_argument("--quick", action="store_true", help="three sizes of M instead of six")
    gemm.add_argument(
        "--resume", action="store_true", help="keep the rows that --out holds of this very code"
    )
    gemm.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    gemm.add_argument("--rounds", type=int, default=7)
    gemm.add_argument("--out", type=Path, help="write the rows here, for `import`")
    recorder = commands.add_parser("import", help="record the rows of a file that `engine --out` wrote")
    recorder.add_argument("file", type=Path)
    commands.add_parser("show", help="print the recorded table")
    args = parser.parse_args(argv)
    if args.command == "engine":
        rows = bench_engine(args.model, args.commit or head_commit(), args.rounds)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(rows))
    elif args.command == "gemm":
        try:
            print(json.dumps(bench_gemm(args)))
        except ValueError as error:
            sys.exit(f"not measured: {error}")
    elif args.command == "import":
        try:
            paths = results.import_rows(json.loads(args.file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            sys.exit(f"not imported: {error}")
        print("recorded in", *(str(path.relative_to(results.ROOT)) for path in paths))
    else:
        show()


if __name__ == "__main__":
    main()
