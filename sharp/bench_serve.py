"""`python -m sharp.bench serve`: Poisson arrivals at several rates against a live engine.

Knows words, rates and rows. Refuses to know what the numbers mean (serving.py) and how requests are run and
timed (load.py). Requests are those of workloads.online: 16 to 1024 prompt tokens, 64 to 256 new ones.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharp.bench_model import OPTIONS, Opened, known_ids, open_model
from sharp.results import RowFile, check_out
from sharp.serving import Served, metrics, parse_limits, table, unit_of
from sharp.workloads import online, poisson

RATES = (4.0, 16.0, 64.0, math.inf)
MAX_PROMPTS = 100_000  # ids of so many are 400 MB


def positive(name: str, value: float, *, finite: bool = True) -> None:
    """ValueError unless it is over 0."""
    if not value > 0 or (finite and math.isinf(value)):
        raise ValueError(f"{name} is {value:g}; it must be over 0{' and finite' if finite else ''}")


def serve(
    opened: Opened,
    rates: list[float],
    count: int,
    limits: dict[str, float],
    seed: int,
    take: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> tuple[list[dict[str, Any]], int]:
    """A run a rate: their rows, none of a run whose answers are not right, and how many those are.

    take: called with the rows of each run as soon as it is over. ValueError if a request is longer than the
    engine takes."""
    requests = online(count, seed=seed)
    prompts = known_ids((ids for ids, _ in requests), opened.model.config.vocab_size)
    new = [tokens for _, tokens in requests]
    longest = max(len(ids) + tokens for ids, tokens in requests)
    limit = opened.config.max_model_len or opened.model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"the longest of the {count} requests is {longest} tokens with its answer, but max_model_len is "
            f"{limit}"
        )
    rows: list[dict[str, Any]] = []
    refused = 0
    for rate in rates:
        times = poisson(count, rate, seed=seed)
        load = opened.run(prompts, new, times)
        wrong = opened.wrong(prompts, new, load)
        served = [Served(len(prompts[place]), list(each)) for place, each in load.times.items()]
        case = f"{opened.name} {rate:g}/s"
        for problem in wrong:
            opened.say(f"{case}: no row: {problem}")
        refused += bool(wrong)
        if not served:
            continue
        found = metrics(served, load.seconds, limits)
        opened.say(f"{case}: {len(served)} of {count} requests in {load.seconds:.2f} s, {load.steps} steps")
        opened.say(table(found))
        under = " ".join(f"{name}:{limit:g}" for name, limit in limits.items())
        own = []
        for name, value in () if wrong else found.items():
            what = f"{name} {under}" if name == "request_goodput" else name
            us = 1e3 * value if unit_of(name) == "ms" else 1e6 * load.seconds
            own.append(opened.row("serve", f"{case} {what}", value, unit_of(name), us))
        take(own)
        rows += own
    return rows, refused


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="sharp.bench serve", description="Requests that arrive over time, against a live engine."
    )
    words.add_argument("--model", default="random:llama-3.2-1b", help="as for sharp, or random:SHAPE")
    words.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    words.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    words.add_argument(
        "--request-rate", type=float, nargs="+", default=list(RATES), metavar="R",
        help="arrivals a second, or inf: all at once (default: %(default)s)",
    )  # fmt: skip
    words.add_argument("--num-prompts", type=int, default=256, metavar="N", help="requests of each rate")
    words.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits of ttft, tpot, itl, e2el"
    )
    words.add_argument("--seed", type=int, default=11, help="of requests and arrivals (default: %(default)s)")
    for name in OPTIONS["cuda"]:
        words.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the engine")
    words.add_argument("--trace-out", type=Path, metavar="FILE", help="the last run's trace, for Perfetto")
    words.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    words.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, for `import`")
    return words


def main(words: list[str]) -> int:
    """The rows as JSON are the last line; returns the exit status, 1 if a run gave no rows."""
    from sharp.bench import head_commit
    from sharp.bench_ops import check_commit

    args = parser().parse_args(words)
    options = {name: getattr(args, name) for name in OPTIONS["cuda"] if getattr(args, name) is not None}
    try:
        limits = parse_limits(args.goodput)
        for rate in args.request_rate:
            positive("--request-rate", rate, finite=False)
        if len(set(args.request_rate)) < len(args.request_rate):
            raise ValueError(f"--request-rate names a rate twice: {args.request_rate}")
        if not 1 <= args.num_prompts <= MAX_PROMPTS:
            raise ValueError(f"--num-prompts is {args.num_prompts}; from 1 to {MAX_PROMPTS} is required")
        if args.seed < 0:
            raise ValueError(f"--seed is {args.seed}; at least 0 is required")
        check_out("--trace-out", args.trace_out)
        commit = check_commit(args.commit) if args.commit else head_commit(args.out is not None)
        file = RowFile(args.out, commit)
        opened = open_model(args.model, args.device, args.dtype, commit, options)
    except (ValueError, RuntimeError, MemoryError) as error:
        print(f"not measured: {error}")
        return 1
    try:
        opened.warm()
        rows, refused = serve(
            opened, args.request_rate, args.num_prompts, limits, args.seed,
            lambda found: file.take(found, opened.say),
        )  # fmt: skip
    except ValueError as error:
        print(f"not measured: {error}")
        return 1
    finally:
        opened.model.close()
        if args.trace_out is not None and opened.seen:  # also of a run that was interrupted
            opened.seen[-1].trace.save(args.trace_out)
    print(json.dumps(rows))
    return 1 if refused else 0
