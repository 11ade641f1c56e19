"""`sharp simulate`: a workload file through the scheduler on a probe's curves, one line a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec

from sharp.cli.errors import CommandError, bad_input
from sharp.config import MAX_INT32, EngineConfig
from sharp.latency_target import LatencyTarget
from sharp.probe import Probe
from sharp.simulate import Noisy, Simulated, simulate
from sharp.workloads import read_workload

# What a simulation has no use for, or takes from --policy and from the probe.
ELSEWHERE = {"scheduling_policy", "block_size", "memory_limit", "seed", "device", "dtype", "rungs"}
READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "bool": (lambda text: {"true": True, "false": False}[text.lower()], "true or false"),
    "str": (str, "text"),
}
OPTIONS = {field.name: str(field.type) for field in fields(EngineConfig) if field.name not in ELSEWHERE}


def simulate_command(
    workload: Path, probe: Path, policies: list[str], settings: list[str], as_json: bool
) -> dict[str, Any] | None:
    """Run the workload under each policy; print the table, or return what --json prints.

    CommandError for a wrong file, line or option.
    """
    with bad_input():
        arrivals = read_workload(workload)
    found = read_probe_file(probe)
    given = parse_settings(settings)
    longest = max(a.prompt_tokens + a.output_tokens for a in arrivals)
    with bad_input():
        proposal = found.propose()
        wanted = min(given.get("max_num_seqs", 0), MAX_INT32)  # of a larger one the option itself is told
        tokens = max(proposal.max_num_batched_tokens, wanted)
        seqs = min(proposal.max_num_seqs, given.get("max_num_batched_tokens", tokens))
        options = {
            "max_num_batched_tokens": tokens, "max_num_seqs": seqs, "max_model_len": longest,
            "num_blocks": found.num_blocks, "block_size": found.block_size,
            **({"overlap": True} if found.kind == "cuda" else {}),  # as an engine there does by itself
            **given,
        }  # fmt: skip
        target = options.pop("target_itl_ms", None)
        config = EngineConfig(**options)
        predictor = found.predictor
        if target is not None and "latency-target" not in policies:
            raise ValueError("--set target_itl_ms goes with --policy latency-target")
        configs = []
        for name in policies:
            if name == "latency-target" and target is not None:
                configs.append(replace(config, scheduling_policy=LatencyTarget(target, predictor)))
            else:
                configs.append(replace(config, scheduling_policy=name))
    assert config.num_blocks is not None
    assert config.max_model_len is not None
    runs = [
        simulate(
            arrivals,
            Noisy(predictor, found.curves.noise),
            one,
            num_blocks=config.num_blocks,
            max_model_len=config.max_model_len,
        )
        for one in configs
    ]
    if as_json:
        results = [{**msgspec.to_builtins(run), "tokens_per_s": run.tokens_per_s} for run in runs]
        return {"options": options, "runs": results}
    print(f"{len(arrivals):,} requests on {found.model}, {found.device}, {found.dtype}; " + show(options))
    print(simulation_text(runs))
    return None


def show(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def read_probe_file(path: Path) -> Probe:
    """The Probe that `sharp probe --json` printed. CommandError names the file."""
    try:
        return Probe.from_json(path.read_bytes())
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror or error}", 2) from None
    except ValueError as error:
        raise CommandError(f"{path} is not what `sharp probe --json` prints: {error}", 2) from None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """["max_num_seqs=64", ...] -> {"max_num_seqs": 64, ...}; values are checked by EngineConfig."""
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in OPTIONS:
            raise CommandError(
                f"--set is {setting!r}; it must be OPTION=VALUE, OPTION one of {', '.join(OPTIONS)}", 2
            )
        read, what = READ[OPTIONS[name].partition(" ")[0]]
        try:
            given[name] = read(text)
        except (ValueError, KeyError):
            raise CommandError(f"--set {name} is {text!r}; it must be {what}", 2) from None
    return given


def simulation_text(runs: list[Simulated]) -> str:
    """A table for people, times in milliseconds."""
    head = ("", *(run.policy for run in runs))
    rows: list[tuple[str, ...]] = [head]
    for name in ("p50", "p95", "p99", "max"):
        rows.append((f"ITL {name}, ms", *(f"{getattr(run.itl, name) * 1e3:,.2f}" for run in runs)))
    for name in ("p50", "p95", "p99", "max"):
        rows.append((f"TTFT {name}, ms", *(f"{getattr(run.ttft, name) * 1e3:,.1f}" for run in runs)))
    counts: tuple[tuple[str, str, Callable[[Simulated], float]], ...] = (
        ("answer tokens/s", "{:,.1f}", lambda run: run.tokens_per_s),
        ("completed", "{:,}", lambda run: run.completed),
        ("refused: queue full", "{:,}", lambda run: run.refused["QueueFull"]),
        ("refused: too large", "{:,}", lambda run: run.refused["RequestTooLarge"]),
        ("queue, mean", "{:,.2f}", lambda run: run.queue_mean),
        ("queue, most", "{:,}", lambda run: run.queue_max),
        ("sequences in a step, most", "{:,}", lambda run: run.running_max),
        ("preemptions", "{:,}", lambda run: run.preemptions),
        ("steps", "{:,}", lambda run: run.steps),
        ("virtual seconds", "{:,.1f}", lambda run: run.seconds),
        ("took, s", "{:,.1f}", lambda run: run.wall_s),
    )
    for label, form, of in counts:
        rows.append((label, *(form.format(of(run)) for run in runs)))
    wide = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))]
        )
        for row in rows
    )
