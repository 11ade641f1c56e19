"""The engine end to end on random weights of real shapes: batch-1 decoding, an online load, documents, start.

Knows the cases, the peers' figures and what makes a row. busy64 is 64 sequences that decode: how busy the GPU
is kept. offline is online in the order in which LLM.generate starts requests, which no peer was measured in.
Refuses to know kernels, and to make a row of answers that are not what each request gets alone
(bench_model.py). The requests are those on which the peers were measured (workloads.py), and of two other
seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharp.bench_model import OPTIONS, Opened, known_ids, open_model
from sharp.bench_startup import measure_startup, weights_on_disk
from sharp.random_model import SHAPES
from sharp.results import check_out
from sharp.workloads import VOCABULARY, documents, online

KINDS = ("decode1", "busy64", "online", "offline", "documents", "startup")
DECODE_PROMPT, DECODE_NEW = 128, 256
STEADY_SEQS, STEADY_NEW = 64, 640  # for 500 steps in which all of them decode
# The first is the peers'. offline: the requests of online in the order in which LLM.generate starts them.
SEEDS = {"online": (11, 12, 13), "offline": (11, 12, 13), "documents": (13, 14, 15)}
ROUNDS = 3  # of a case; the median counts
# Measured on an NVIDIA H100 80GB on 2026-11-23, with the requests of the first seeds, where there is one:
# milliseconds a token, new tokens/s, tokens/s, seconds from a process's start on a fresh machine until ready.
PEER = "vLLM 0.26.0 (FA3, graphs, async scheduling), H100, 2026-11-23"
REFERENCES = {
    ("decode1", "llama-3.2-1b"): 2.20, ("decode1", "qwen2.5-7b"): 6.17,
    ("online", "llama-3.2-1b"): 19_867, ("online", "qwen2.5-7b"): 7_964,
    ("documents", "llama-3.2-1b"): 237_110, ("documents", "qwen2.5-7b"): 46_063,
    ("startup fresh", "llama-3.2-1b"): 113, ("startup fresh", "qwen2.5-7b"): 98,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much of a case is run: at most so many requests, and new tokens of each; None: all. rounds: of
    each; seeds: how many of a case's."""

    requests: int | None = None
    new: int | None = None
    rounds: int = ROUNDS
    seeds: int = 3

    @property
    def whole(self) -> bool:
        return self.requests is None and self.new is None


@dataclass(frozen=True)
class Case:
    """A name, prompts with the new tokens of each, and how its value is read off a run."""

    name: str
    kind: str
    prompts: list[list[int]]
    new: list[int]
    unit: str

    def value(self, load: Any) -> float:
        """ms a token of one request from its first to its last; else new tokens/s, or prompt tokens/s where
        only a first token is wanted. (What busy64 is for is not read off a load.)"""
        if self.kind == "decode1":
            times = load.times[0]
            return float(1e3 * (times[-1] - times[0]) / (len(times) - 1))
        tokens = sum(map(len, self.prompts)) if self.kind == "documents" else sum(self.new)
        return float(tokens / load.seconds)


def cases(kinds: Sequence[str], shape: str, vocab_size: int, size: Size) -> Iterator[Case]:
    """The cases of a model that run in an engine of this process."""
    few = slice(size.requests)

    def cut(count: int) -> int:
        return count if size.new is None else min(count, size.new)

    if "decode1" in kinds:
        rng = random.Random(7)
        ids = [rng.randint(1, VOCABULARY) for _ in range(DECODE_PROMPT)]
        # A time from token to token needs two of them.
        new = [max(2, cut(DECODE_NEW))]
        yield Case(f"decode1/{shape}", "decode1", known_ids([ids], vocab_size), new, "ms")
    if "busy64" in kinds:
        rng = random.Random(8)
        crowd = [[rng.randint(1, VOCABULARY) for _ in range(DECODE_PROMPT)] for _ in range(STEADY_SEQS)][few]
        new = [cut(STEADY_NEW)] * len(crowd)
        yield Case(f"busy64/{shape}", "busy64", known_ids(crowd, vocab_size), new, "token/s")
    for kind in SEEDS:
        for place, seed in enumerate(SEEDS[kind][: size.seeds] if kind in kinds else ()):
            made = [(ids, 1) for ids in documents(seed=seed)] if kind == "documents" else online(seed=seed)
            if kind == "offline":
                made.sort(key=lambda request: -request[1])
            name = f"{kind}/{shape}" + (f" seed {seed}" if place else "")
            prompts = known_ids((ids for ids, _ in made[few]), vocab_size)
            yield Case(name, kind, prompts, [cut(new) for _, new in made[few]], "token/s")


def run_case(opened: Opened, case: Case, size: Size) -> dict[str, Any] | None:
    """Time a case and hold its answers against each request alone; its row, or None and why."""
    loads = []
    for _ in range(size.rounds):
        load = opened.run(case.prompts, case.new, [0.0] * len(case.prompts))
        loads.append((case.value(load), load, opened.gpu_busy()))
        opened.say(
            f"{case.name}: {loads[-1][0]:,.3f} {case.unit} in {load.seconds:.3f} s, {load.steps} steps"
        )
    for problem in opened.wrong(case.prompts, case.new, loads[-1][1]):
        opened.say(f"{case.name}: no row: {problem}")
        return None
    if any(load.answers != loads[0][1].answers for _, load, _ in loads):
        opened.say(f"{case.name}: no row: rounds have different answers")
        return None
    value, load, busy = sorted(loads, key=lambda one: one[0])[len(loads) // 2]
    host = opened.host_share()
    if busy is not None and host is not None:
        opened.say(f"{case.name}: GPU busy {busy:.1%} of the last steps' time; host / GPU time {host:.1%}")
    if not size.whole:
        opened.say(f"{case.name}: right, and no row: it was run at reduced size")
        return None
    if case.kind == "busy64":
        if busy is None:
            opened.say(f"{case.name}: no row: this device does not tell when its steps ran")
            return None
        return opened.row("engine", case.name, 100 * busy, "%", 1e6 * load.seconds / load.steps)
    us = 1e3 * value if case.unit == "ms" else 1e6 * load.seconds
    known = REFERENCES.get((case.kind, opened.name)) if " seed " not in case.name else None
    peer = {"reference": known, "reference_source": PEER} if known else {}
    return opened.row("engine", case.name, value, case.unit, us, **peer)


def run_startup(opened: Opened, size: Size, folder: Path) -> list[dict[str, Any]]:
    """Rows of `startup/SHAPE` (kernels compiled, weights in memory) and `startup/SHAPE fresh`."""
    device = opened.model.device
    fresh, cached, err = measure_startup(folder, device.kind, device.dtype, size.rounds)
    rows = []
    for name, seconds in ((f"startup/{opened.name}", cached), (f"startup/{opened.name} fresh", fresh)):
        opened.say(f"{name}: {seconds:.2f} s from the process's start to its first token")
        known = REFERENCES.get(("startup fresh", opened.name)) if name.endswith("fresh") else None
        peer = {"reference": known, "reference_source": PEER} if known else {}
        if err:
            opened.say(f"{name}: no row: the processes had different first tokens")
        elif size.whole:
            rows.append(opened.row("engine", name, seconds, "s", 1e6 * seconds, **peer))
    return rows


def run_model(
    shape: str, kinds: Sequence[str], size: Size, opener: Callable[[str], Opened]
) -> tuple[list[dict[str, Any]], int]:
    """All cases of a shape: their rows, and how many rows a case was denied."""
    opened = opener(f"random:{shape}")
    if size.requests is None and opened.model.device.kind == "cpu":
        opened.say("on a CPU whole cases take from minutes to hours; --requests N takes the first N of each")
    rows, denied = [], 0
    try:
        opened.warm()
        for case in cases(kinds, shape, opened.model.config.vocab_size, size):
            row = run_case(opened, case, size)
            rows += [row] if row else []
            known = case.kind != "busy64" or opened.model.device.kind == "cuda"
            denied += row is None and size.whole and known
    finally:
        opened.model.close()  # a process of its own needs the memory
    if "startup" in kinds:
        with weights_on_disk(shape) as folder:
            found = run_startup(opened, size, folder)
        rows += found
        denied += (2 - len(found)) * size.whole
    return rows, denied


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="sharp.bench engine",
        description="The engine end to end, on random weights of real shapes; --against transformers: on the "
        "CPU beside transformers, on a model's own weights.",
    )
    words.add_argument("--against", choices=["transformers"])
    words.add_argument(
        "--model", nargs="+", default=[], metavar="M",
        help=f"shapes ({', '.join(SHAPES)}; default: all); --against: a model as for sharp",
    )  # fmt: skip
    words.add_argument("--case", nargs="+", default=list(KINDS), choices=KINDS, help="default: all")
    words.add_argument("--quick", action="store_true", help="one round of each, the peers' seeds alone")
    words.add_argument("--requests", type=int, metavar="N", help="of each case the first N: makes no row")
    words.add_argument("--new-tokens", type=int, metavar="N", help="at most N a request: makes no row")
    words.add_argument("--rounds", type=int, metavar="N", help=f"turns of each case (default: {ROUNDS})")
    words.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    words.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    for name in OPTIONS["cuda"]:
        words.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the engine")
    words.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    words.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, for `import`")
    return words


def check(args: argparse.Namespace) -> None:
    """ValueError naming the option, its value and the limit."""
    for name, value in (
        ("--requests", args.requests),
        ("--new-tokens", args.new_tokens),
        ("--rounds", args.rounds),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is required")
    for shape in args.model:
        if shape not in SHAPES:
            raise ValueError(f"--model is {shape!r}; one of {', '.join(SHAPES)} is required")
    check_out("--out", args.out)


def bench_cases(args: argparse.Namespace) -> int:
    """What `sharp.bench engine` measures by itself; the rows as JSON are the last line."""
    from sharp.bench import head_commit
    from sharp.bench_ops import check_commit

    options = {name: getattr(args, name) for name in OPTIONS["cuda"] if getattr(args, name) is not None}
    size = Size(
        args.requests, args.new_tokens, args.rounds or (1 if args.quick else ROUNDS), 1 if args.quick else 3
    )
    rows: list[dict[str, Any]] = []
    denied = 0
    try:
        check(args)
        commit = check_commit(args.commit) if args.commit else head_commit(args.out is not None)

        def opener(name: str) -> Opened:
            return open_model(
                name, args.device, args.dtype, commit, options, lambda text: print(text, flush=True)
            )

        for shape in args.model or SHAPES:
            found, without = run_model(shape, args.case, size, opener)
            rows, denied = rows + found, denied + without
            if args.out is not None:
                args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except (ValueError, RuntimeError, MemoryError) as error:
        print(f"not measured: {error}")
        denied += 1
    print(json.dumps(rows))
    return 1 if denied else 0
