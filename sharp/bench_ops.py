"""Kernels measured op by op: which cases and rungs, and how measurements become rows of a file.

Knows: plans, rows, resuming. Refuses to know: how anything is timed (kernels_numba/bench does that), what is
done with the file (results.py). A row is on disk before the next case begins.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

from kernels_numba.files import write_whole
from sharp import results

# The plain rungs are for reading: on the largest shapes one call takes seconds. Unless asked for by name:
PLAIN_FLOPS = 5e10
ROUNDS = 7
SUSTAINED = " sustained"  # at the end of a case's name
RESERVE_BYTES = 1 << 20  # more than a whole grid's rows need


@dataclass(frozen=True)
class Gpu:
    """The device that is measured on: names as the driver gives them, compute capability."""

    name: str
    driver: str | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One case of one op, and the rungs to measure on it."""

    op: str
    case: str
    params: dict[str, Any]
    rungs: tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """cold: operands come from device memory; against: "torch" or "none"; commit: what is measured."""

    rounds: int
    cold: bool
    sustained: bool
    against: str
    commit: str

    def suffix(self) -> str:
        """What a case's name says of the cache."""
        return "" if self.cold else " warm"


def _rungs_of(op: str, named: list[str], gpu: Gpu | None) -> list[str]:
    from kernels_numba.bench.gpu import runs_on
    from kernels_numba.ops import OPS

    there = [name for name in OPS[op].rungs if name != "reference"]
    steps = getattr(OPS[op], "LADDER", ())
    chosen = [name for name in there if (name in named if named else name not in steps)]
    return [name for name in chosen if gpu is None or runs_on(name, gpu.capability)]


def _check_rungs(ops: Iterable[str], named: list[str], gpu: Gpu | None) -> None:
    from kernels_numba.bench.gpu import runs_on
    from kernels_numba.ops import OPS

    ops = list(ops)
    for name in named:
        there = sorted({rung for op in ops for rung in OPS[op].rungs} - {"reference"})
        if name not in there:
            of = ops[0] if len(ops) == 1 else "any op"
            raise ValueError(f"--rung is {name!r}; the kernels of {of} are {', '.join(there)}")
        if gpu is not None and not runs_on(name, gpu.capability):
            have = ".".join(map(str, gpu.capability))
            raise ValueError(f"--rung is {name!r}, which does not run on compute capability {have}")


def plan(
    ops: Iterable[str], *, named: list[str], text: str = "", quick: bool = False, gpu: Gpu | None = None
) -> tuple[list[Item], int]:
    """What to measure, and how many cases of plain rungs were left out for their length.

    named: rungs asked for (none: all kernels that run on the GPU, but no steps of a ladder), of which a case
    takes those that are worth its time (rungs_worth); text: as bench_cases takes it; gpu None: any.
    ValueError for a rung or a text that names nothing."""
    from kernels_numba.bench.cases import bench_cases, rungs_worth
    from kernels_numba.bench.ops import BENCH_OPS

    ops = list(ops)
    _check_rungs(ops, named, gpu)
    items, left_out, matching = [], 0, 0
    for op in ops:
        rungs = _rungs_of(op, named, gpu)
        for case, params in bench_cases(op, quick, text).items():
            matching += 1
            long = not named and BENCH_OPS[op].cost(params).flops > PLAIN_FLOPS
            worth = rungs_worth(op, params, rungs, named)
            chosen = tuple(rung for rung in worth if not (long and rung == "plain"))
            left_out += len(worth) - len(chosen)
            if chosen:
                items.append(Item(op, case, params, chosen))
    if not matching:
        example = next(iter(bench_cases(ops[0], quick)))
        raise ValueError(f"--case is {text!r}; no case contains that, they are called like {example!r}")
    return items, left_out


def _name(row: dict[str, Any]) -> tuple[str, ...]:
    """(op, case, rung): a file's rows are of one GPU."""
    return results.key_of(row)[1:]


class RowFile:
    """The rows measured so far; with a path, on disk whole after each one. Rows of `resume` count as done."""

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        """ValueError for a path that cannot be written, or that holds rows nobody asked to keep."""
        self.path, self.rows = path, []  # type: tuple[Path | None, list[dict[str, Any]]]
        if path is None:
            if resume:
                raise ValueError("--resume needs --out: the file to go on with")
            return
        if path.exists() and not path.is_file():
            raise ValueError(f"--out is {path}, which is not a regular file")
        held = self._read(path) if path.exists() else []
        if held and not resume:
            raise ValueError(f"--out is {path}, which holds {len(held)} rows: add --resume, or remove it")
        self.rows = held
        try:
            self._write(json.dumps(held, indent=1) + " " * RESERVE_BYTES)  # is there room for what will come?
            self._write(json.dumps(held, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"--out is {path}, which cannot be written: {error.strerror or error}") from None

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        try:
            rows = json.loads(path.read_text(encoding="utf-8") or "[]")
            if not isinstance(rows, list) or any(set(row) != set(results.FIELDS) for row in rows):
                raise ValueError("not a list of rows")
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"--out is {path}, which holds something else than rows: {error}") from None
        return rows

    def _write(self, text: str) -> None:
        """The whole file or none of it: an interrupted or full disk keeps what was there."""
        assert self.path is not None
        write_whole(self.path, text.encode(), sync=True)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the rows that are not wanted; says how many."""
        before = len(self.rows)
        self.rows = [row for row in self.rows if wanted(row)]
        return before - len(self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """All of them or none; each takes the place of an earlier one of the same op, case and rung."""
        new = {_name(row) for row in rows}
        self.rows[:] = [row for row in self.rows if _name(row) not in new] + rows
        if self.path is not None:
            self._write(json.dumps(self.rows, indent=1) + "\n")


@cache
def op_hash(op: str) -> str:
    """source_hash of the files behind an op."""
    return results.source_hash(results.op_sources(op))


def is_current(row: dict[str, Any], options: Options, gpu: Gpu) -> bool:
    """Whether a resumed row is what would be measured now: this code, GPU, driver, and kind of baseline."""
    return (
        row["commit"] == options.commit
        and row["source_hash"] == op_hash(row["op"])
        and (row["gpu"], row["driver"]) == (gpu.name, gpu.driver)
        and (row["baseline"] is None) == (options.against == "none")
    )


def lacks_sustained(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether a burst row of `rows` has no sustained one beside it, though its calls are short."""
    from kernels_numba.bench.timing import STEADY_US

    op, case, rung = _name(row)
    there = {_name(other) for other in rows}
    return (
        row["us"] < STEADY_US and not case.endswith(SUSTAINED) and (op, case + SUSTAINED, rung) not in there
    )


def make_rows(
    item: Item, rung: str, outcome: Any, cost: Any, options: Options, gpu: Gpu
) -> list[dict[str, Any]]:
    """The burst row, and the sustained one if that was measured, of one rung."""
    from kernels_numba import launch
    from kernels_numba.bench import contest, peers
    from kernels_numba.bench.ops import BENCH_OPS

    rows = []
    for measured, word in ((outcome.measured, ""), (outcome.sustained, SUSTAINED)):
        if rung in measured:
            figures = peers.figures(item.op, cost, measured[rung], measured.get(contest.BASELINE), gpu.name)
            peer, source = peers.reference(item.op, item.case, gpu.name)
            row = results.make_row(
                op=item.op, case=item.case + options.suffix() + word, rung=rung,
                dtype=BENCH_OPS[item.op].dtype,
                baseline=outcome.baseline, reference=peer, reference_source=source,
                err=round(measured[rung].err, 3), commit=options.commit, source_hash=op_hash(item.op),
                date=date.today().isoformat(), gpu=gpu.name, driver=gpu.driver,
                ptxas=launch.linker_version(), **figures,
            )  # fmt: skip
            rows.append(row)
    return rows


def describe(row: dict[str, Any], measured: Any, baseline: Any, l2: str, rounds: int, note: str = "") -> str:
    """The printed line: the row, its spread and the baseline's, what the caches held, and the note."""
    spread = f"{measured.low:.1f}..{measured.high:.1f} us, {rounds} rounds of {measured.calls} calls"
    if baseline is not None:
        spread += f"; baseline {baseline.low:.1f}..{baseline.high:.1f} us;"
    return f"{results.format_row(row)} ({spread} over {measured.sets} sets of operands, {l2}{note})"


def contenders_of(op: Any, rung: str) -> dict[str, Callable[..., Any]]:
    """The rung by its name; by "name key=value" each of the choices that its op offers."""
    call = op.rungs[rung]
    choices = getattr(op, "CHOICES", {}).get(rung, ())
    named = {" ".join([rung, *(f"{key}={value}" for key, value in how.items())]): how for how in choices}
    return {name: partial(call, **how) for name, how in named.items()} or {rung: call}


def keep_quickest(outcome: Any, rung: str) -> str:
    """Of a rung's choices keep the quickest, under the rung's name; says which, or "" without choices."""
    chosen = [name for name in outcome.measured if name.startswith(f"{rung} ")]
    if not chosen:
        return ""
    best = min(chosen, key=lambda name: outcome.measured[name].us)
    for measured in (outcome.measured, outcome.sustained):
        if best in measured:
            measured[rung] = measured[best]
        for name in chosen:
            measured.pop(name, None)
    return f", {best}"


def run(
    items: list[Item], options: Options, gpu: Gpu, file: RowFile, *, side: Any = None,
    open_workload: Callable[..., Any] | None = None, write: Callable[[str], None] = print,
    advance: Callable[[int], Any] = lambda n: None, read_gbs: float | None = None,
    copy_gbs: float | None = None,
) -> list[str]:  # fmt: skip
    """Measure each item that the file does not hold; returns what failed. A failure stops nothing else.

    side: the baseline's (contest.torch_side); open_workload: contest.Workload, or what stands in for it;
    read_gbs, copy_gbs: what the card reads and copies, for lines that are held against it."""
    from kernels_numba.bench import contest, targets
    from kernels_numba.ops import OPS

    open_workload = open_workload or contest.Workload
    done = {_name(row) for row in file.rows if not (options.sustained and lacks_sustained(row, file.rows))}
    failures: list[str] = []

    def fail(what: str) -> None:
        failures.append(what)
        write(f"NOT TIMED: {what}")

    for item in items:
        name = item.case + options.suffix()
        todo = [rung for rung in item.rungs if (item.op, name, rung) not in done]
        advance(len(item.rungs) - len(todo))
        if not todo:
            continue
        try:
            with open_workload(item.op, item.params, cold=options.cold, torch=side) as workload:
                for rung in todo:
                    contenders = contenders_of(OPS[item.op], rung)
                    outcome = workload.compare(contenders, options.rounds, sustained=options.sustained)
                    quickest = keep_quickest(outcome, rung)
                    for reason in outcome.refused.values():
                        fail(f"{item.op} {name} {rung}: {reason}")
                    rows = make_rows(item, rung, outcome, workload.cost, options, gpu)
                    for row, measured in zip(rows, (outcome.measured, outcome.sustained), strict=False):
                        other = measured.get(contest.BASELINE)
                        us, moved = measured[rung].us, row["gbs"]
                        note = targets.note(item.op, item.params, us, read_gbs, copy_gbs, moved)
                        note += "".join(f", {what} {n:.1f} s" for what, n in outcome.seconds.items() if n > 1)
                        note += quickest
                        write(describe(row, measured[rung], other, outcome.l2, options.rounds, note))
                    if rows:
                        file.add(rows)
                    advance(1)
        except Exception as error:  # no memory, or a baseline that cannot run: the next case may be well
            fail(f"{item.op} {name}: {type(error).__name__}: {error}")
    return failures


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line per op and rung: how many cases, and how they stand beside the baseline."""
    lines = []
    for op, rung in dict.fromkeys((row["op"], row["rung"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["op"], row["rung"]) == (op, rung)]
        beside = [ratio for ratio in ratios if ratio is not None]
        line = f"{op} {rung}: {len(ratios)} rows"
        if beside:
            line += f", geometric mean {statistics.geometric_mean(beside):.3f}x, least {min(beside):.3f}x"
        lines.append(line)
    return lines


def check_commit(text: str) -> str:
    """A commit's name as given. ValueError for what cannot be one."""
    if not re.fullmatch(r"[0-9a-f]{7,40}", text):
        raise ValueError(f"--commit is {text!r}; 7 to 40 hex digits are required")
    return text
