"""Benchmarks: of kernels, op by op, of the engine and its scheduler; and the recorded table.

`python -m sharp.bench [OP]` measures kernels on a GPU beside torch (all ops, or one), `... engine` the engine
end to end, `... serve` requests that arrive over time, `... scheduler` plans, stalls and the simulator,
`... import FILE` records what --out wrote, `... show` prints what is recorded. Without a GPU, kernels cannot
be measured: then the recorded table is printed instead; with no op asked for that is all (exit status 0), an
op that was asked for makes it a failure (1). Knows: words and files. Refuses to know: how anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sharp import bench_ops, results
from sharp.cli.errors import INTERRUPTED, say

LEAST_ROUNDS = 5


class NoGpu(Exception):
    """No kernel can be measured here; says why."""


def show(op: str = "") -> None:
    """Print the recorded table, or an op's part of it."""
    rows = [row for row in results.read_rows() if op in ("", row["op"])]
    for row in rows:
        print(results.format_row(row))
    if not rows:
        of = f" of {op}" if op else ""
        print(f"no measurements{of} are recorded yet (in notebooks/results)")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def head_commit(to_file: bool = True) -> str:
    """The checkout's commit. Where files differ from it: ValueError if rows go to a file, because a row must
    name the code that ran; else the commit with "-dirty", which no import takes."""
    git = ["git", "-C", str(results.ROOT)]
    try:
        changed, commit = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["status", "--porcelain", "--", "sharp", "kernels_numba"], ["rev-parse", "HEAD"])
        )
    except (OSError, subprocess.CalledProcessError):
        raise ValueError("git does not say which commit this is: pass --commit") from None
    if changed and to_file:
        raise ValueError(
            "sharp/ or kernels_numba/ differ from the last commit: commit first, or pass --commit"
        )
    return commit + ("-dirty" if changed else "")


def gpu_here() -> bench_ops.Gpu:
    """The current CUDA device. NoGpu where there is none, or only numba's simulator."""
    from kernels_numba import compiler
    from sharp.device import cuda_problem

    problem = "numba's simulator stands in for CUDA" if compiler.SIMULATOR else cuda_problem()
    if problem:
        raise NoGpu(problem)
    from kernels_numba.bench.gpu import capability

    name = compiler.cuda.get_current_device().name
    name = name.decode() if isinstance(name, bytes) else str(name)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return bench_ops.Gpu(name, next(iter(said.split()), None), capability())


def torch_is_here() -> bool:
    """Whether torch is installed, without importing it."""
    from importlib.util import find_spec

    return find_spec("torch") is not None


def bench_kernels(args: argparse.Namespace) -> int:
    """Measure what the words ask for; the rows as JSON are the last line. Returns the exit status.

    ValueError for words that fit nothing, NoGpu."""
    from tqdm.auto import tqdm

    from kernels_numba.bench import gpu as gpu_bench
    from kernels_numba.bench import targets, tune_decode
    from kernels_numba.bench.contest import torch_side
    from kernels_numba.ops import OP_NAMES

    if args.rounds < LEAST_ROUNDS:
        raise ValueError(f"--rounds is {args.rounds}; at least {LEAST_ROUNDS} are required")
    ops = (args.op,) if args.op else OP_NAMES
    words = {"named": args.rung, "text": args.case, "quick": args.quick}
    bench_ops.plan(ops, **words)  # wrong words are told on any machine
    gpu = gpu_here()
    items, left_out = bench_ops.plan(ops, gpu=gpu, **words)
    against = args.against or ("torch" if torch_is_here() else "none")
    commit = bench_ops.check_commit(args.commit) if args.commit else head_commit(args.out is not None)
    options = bench_ops.Options(args.rounds, not args.warm, args.sustained, against, commit)
    file = bench_ops.RowFile(args.out, args.resume)
    other = file.keep(lambda row: bench_ops.is_current(row, options, gpu))
    if other:
        print(f"{other} rows of {args.out} are of other code, another device or baseline: not kept")
    if left_out:
        print(f"{left_out} long cases of plain kernels are left out; --rung plain measures them")
    if not args.against:
        print(f"baseline: {against}" + ("" if against == "torch" else " (torch is not installed)"))
    side, read, copied = torch_side(against), None, None
    if options.cold and any(targets.reads_weights(item.op, item.params) for item in items):
        read = tune_decode.read_gbs()
        print(f"reading alone: {read:.0f} GB/s")
    if options.cold and any(targets.copies(item.op, item.params) for item in items):
        copied = gpu_bench.copy_gbs()
        print(f"copying alone: {copied:.0f} GB/s, read and written")
    with tqdm(total=sum(len(item.rungs) for item in items), desc=args.op or "bench", unit="case") as bar:
        try:
            failures = bench_ops.run(
                items,
                options,
                gpu,
                file,
                side=side,
                write=bar.write,
                advance=bar.update,
                read_gbs=read,
                copy_gbs=copied,
            )
        except KeyboardInterrupt:
            kept = f"; {args.out} holds them, --resume goes on" if args.out else ""
            bar.write(f"interrupted after {len(file.rows)} rows{kept}")
            return 130
    lines = [*bench_ops.summary(file.rows), *targets.summary(file.rows, read, copied)]
    for line in [*lines, *(f"not timed: {failure}" for failure in failures)]:
        print(line)
    print(json.dumps(file.rows))
    return 1 if failures else 0


def _kernel_words(words: list[str]) -> argparse.Namespace:
    from kernels_numba.ops import OP_NAMES

    parser = argparse.ArgumentParser(
        prog="sharp.bench", description="Measure kernels on a GPU, beside torch.",
        epilog="Other commands: engine, serve, scheduler, import FILE, show (each has --help).",
    )  # fmt: skip
    parser.add_argument(
        "op", nargs="?", default="", metavar="OP", help=f"one of {', '.join(OP_NAMES)}; all without it"
    )
    parser.add_argument(
        "--rung",
        action="extend",
        nargs="+",
        default=[],
        metavar="R",
        help="kernels to measure (default: all)",
    )
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="only cases whose name contains TEXT, or one of 'A|B'"
    )
    parser.add_argument(
        "--against", choices=["torch", "none"], help="the baseline (default: torch if it is installed)"
    )
    parser.add_argument("--quick", action="store_true", help="few cases of each op: under 4 minutes in all")
    parser.add_argument("--warm", action="store_true", help="one set of operands, which L2 may hold")
    parser.add_argument(
        "--sustained", action="store_true", help="400 calls back to back, too, as rows of their own"
    )
    parser.add_argument("--rounds", type=int, default=bench_ops.ROUNDS, help="turns of each contender")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of this very code")
    parser.add_argument("--commit", help="the commit being measured (default: HEAD of a clean checkout)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows here, for `import`")
    args = parser.parse_args(words)
    if args.op and args.op not in OP_NAMES:
        parser.error(f"OP is {args.op!r}; {', '.join(COMMANDS)} or one of {', '.join(OP_NAMES)} is required")
    return args


def _kernels(words: list[str]) -> int:
    args = _kernel_words(words)
    try:
        return bench_kernels(args)
    except NoGpu as reason:
        show(args.op)
        print(f"no GPU can be used here ({reason}): nothing was measured; above is what is recorded")
        return 1 if args.op else 0
    except ValueError as error:
        sys.exit(f"not measured: {error}")


def _engine(words: list[str]) -> int:
    from sharp.bench_cases import bench_cases, parser

    args = parser().parse_args(words)
    if args.against is None:
        return bench_cases(args)
    from sharp.bench_engine import bench_engine

    model = args.model[0] if args.model else "smollm2-135m-instruct"
    try:
        rows = bench_engine(model, args.commit or head_commit(), args.rounds or LEAST_ROUNDS)
    except ValueError as error:
        sys.exit(f"not measured: {error}")
    if args.out:
        _write_rows(args.out, rows)
    print(json.dumps(rows))
    return 0


def _import(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sharp.bench import", description="Record the rows of a file that --out wrote."
    )
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument(
        "--drop-stale", action="store_true",
        help="instead of a file: delete the recorded rows whose sources have changed since",
    )  # fmt: skip
    parser.add_argument(
        "--partial", action="store_true",
        help="the file is a part of the grid: delete the recorded rows of its ops that are not in it",
    )  # fmt: skip
    args = parser.parse_args(words)
    if (args.file is None) != args.drop_stale:
        parser.error("a FILE to record, or --drop-stale, is required")
    if args.drop_stale:
        for row in results.drop_stale():
            print(f"deleted: {' '.join(results.key_of(row))}, measured at {row['commit']}")
        return 0
    try:
        rows = json.loads(args.file.read_text(encoding="utf-8"))
        results.check_rows(rows)
        lost = results.lost_rows(rows)
        paths = results.import_rows(rows, partial=args.partial)
    except (OSError, ValueError) as error:
        sys.exit(f"not imported: {error}")
    for row in lost:
        print("deleted:", " ".join(results.key_of(row)[1:]))
    print("recorded in", *(str(path.relative_to(results.ROOT)) for path in paths))
    return 0


def _show(words: list[str]) -> int:
    argparse.ArgumentParser(prog="sharp.bench show", description="Print the recorded table.").parse_args(
        words
    )
    show()
    return 0


def _serve(words: list[str]) -> int:
    from sharp.bench_serve import main as bench_serve

    return bench_serve(words)


def _scheduler(words: list[str]) -> int:
    from sharp.bench_scheduler import main as bench_scheduler

    return bench_scheduler(words)


COMMANDS = {"engine": _engine, "scheduler": _scheduler, "serve": _serve, "import": _import, "show": _show}


def main(argv: list[str] | None = None) -> None:
    """Run a command; raises SystemExit with a status other than 0 if something was not measured."""
    words = sys.argv[1:] if argv is None else argv
    command = COMMANDS.get(words[0]) if words else None
    try:
        status = command(words[1:]) if command else _kernels(words)
    except KeyboardInterrupt:
        say("sharp.bench: interrupted; rows that were done are in the file of --out, if one was named")
        sys.exit(INTERRUPTED)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
