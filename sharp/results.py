"""The recorded measurements: rows of notebooks/results/<device-slug>.json, and the rules for changing them.

Knows the fields of a row and how rows of one op on one device replace each other. Refuses to measure
anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "notebooks" / "results"
FIELDS = (
    "op", "case", "rung", "dtype", "value", "unit", "us", "tflops", "gbs", "roofline", "baseline",
    "baseline_us",
    "ratio", "reference", "reference_source", "err", "commit", "source_hash", "date", "gpu", "driver",
    "ptxas",
)  # fmt: skip


def device_slug(name: str) -> str:
    """File name of a device's results: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def source_hash(paths: Iterable[str], root: Path = ROOT) -> str:
    """First 16 hex digits of the sha256 over the named files' contents, in sorted order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.encode() + b"\0" + (root / path).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def op_sources(op: str, root: Path = ROOT) -> list[str]:
    """The files, relative to root, whose bytes decide what a kernel op computes and how fast: its module,
    what it imports inside kernels_numba, and theirs. ValueError for an op without a module.
    """
    package = root / "kernels_numba"
    start = next((p for p in (package / "ops" / f"{op}.py", package / "ops" / op) if p.exists()), None)
    if start is None:
        raise ValueError(f"no op {op!r} in kernels_numba/ops")
    todo, seen = [start] if start.is_file() else sorted(start.rglob("*.py")), set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(
            r"^\s*from (kernels_numba[\w.]*) import", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            module = root.joinpath(*name.split("."))
            todo += [p for p in (module.with_suffix(".py"), module / "__init__.py") if p.exists()]
    return sorted(str(path.relative_to(root)) for path in seen)


def sources_of(op: str) -> Iterable[str]:
    """The files behind a recorded op's numbers: of a kernel op, or of a bench of the engine."""
    if op in ("engine", "serve"):
        from sharp.bench_engine import SOURCES as engine_sources

        return engine_sources
    if op == "scheduler":
        from sharp.bench_scheduler import SOURCES as scheduler_sources

        return scheduler_sources
    return op_sources(op)


def make_row(**values: Any) -> dict[str, Any]:
    """A row with every field of FIELDS, None where not given. Raises ValueError for a field that does not
    exist.
    """
    unknown = set(values) - set(FIELDS)
    if unknown:
        raise ValueError(f"unknown result fields {sorted(unknown)}; the fields are {', '.join(FIELDS)}")
    return {field: values.get(field) for field in FIELDS}


def commit_exists(commit: str, root: Path = ROOT) -> bool:
    """Whether the checkout's history holds this commit."""
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        return False
    check = subprocess.run(
        ["git", "cat-file", "-e", commit + "^{commit}"], cwd=root, capture_output=True, check=False
    )
    return check.returncode == 0


def check_rows(rows: list[dict[str, Any]], root: Path = ROOT) -> None:
    """ValueError for what must not be recorded: missing or unknown fields, no device, an unknown commit, an
    error beyond its tolerance, one measurement twice."""
    if not rows:
        raise ValueError("no rows to import")
    seen: set[tuple[Any, ...]] = set()
    for number, row in enumerate(rows):
        if set(row) != set(FIELDS):
            raise ValueError(f"row {number}: fields missing or unknown: {sorted(set(row) ^ set(FIELDS))}")
        if not row["op"] or not row["gpu"]:
            raise ValueError(f"row {number}: op and gpu must be named, got {row['op']!r} and {row['gpu']!r}")
        if not commit_exists(str(row["commit"]), root):
            raise ValueError(
                f"row {number}: commit {row['commit']!r} is not in this history: measure committed code"
            )
        if row["err"] is None or not row["err"] <= 1:
            raise ValueError(
                f"row {number}: err is {row['err']!r}; only a result within its tolerance (1) counts"
            )
        if key_of(row) in seen:
            raise ValueError(f"row {number}: {' '.join(map(str, key_of(row)))} occurs twice in the file")
        seen.add(key_of(row))


def key_of(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What a row is about: (device slug, op, case, rung)."""
    return device_slug(str(row["gpu"])), str(row["op"]), str(row["case"]), str(row["rung"])


def lost_rows(rows: list[dict[str, Any]], results: Path = RESULTS) -> list[dict[str, Any]]:
    """Recorded rows that an import of `rows` would delete and not replace: other cases or rungs of them."""
    ops, new = {key_of(row)[:2] for row in rows}, {key_of(row) for row in rows}
    return [row for row in read_rows(results) if key_of(row)[:2] in ops and key_of(row) not in new]


def import_rows(
    rows: list[dict[str, Any]], results: Path = RESULTS, root: Path = ROOT, *, partial: bool = False
) -> list[Path]:
    """Put rows into their devices' files; all earlier rows of the same op on the same device go at once.

    Raises ValueError as check_rows does, and for a part of what is recorded (lost_rows), unless `partial`
    says that the rest shall go; nothing is written then.
    """
    check_rows(rows, root)
    lost = lost_rows(rows, results)
    if lost and not partial:
        example = " ".join(key_of(lost[0])[1:])
        raise ValueError(
            f"{len(lost)} recorded rows of these ops are not in the file and would be deleted ({example!r} "
            "is one): measure the whole grid, or say --partial to delete them"
        )
    written = []
    for slug in sorted({device_slug(str(row["gpu"])) for row in rows}):
        path = results / f"{slug}.json"
        new = [row for row in rows if device_slug(str(row["gpu"])) == slug]
        replaced = {row["op"] for row in new}
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        kept = [row for row in old if row["op"] not in replaced]
        merged = sorted(kept + new, key=lambda row: (row["op"], row["case"], str(row["rung"])))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        written.append(path)
    return written


def drop_stale(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Delete and return the recorded rows whose sources are not what was measured any more."""
    dropped = []
    for path in sorted(results.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        present = {op: source_hash(sources_of(op)) for op in {row["op"] for row in rows}}
        stale = [row for row in rows if row["source_hash"] != present[row["op"]]]
        if stale:
            dropped += stale
            kept = [row for row in rows if row["source_hash"] == present[row["op"]]]
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return dropped


def read_rows(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every recorded row of every device."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("*.json")):
        rows.extend(json.loads(path.read_text(encoding="utf-8")))
    return rows


def check_out(name: str, path: Path | None) -> None:
    """ValueError, naming option and path, where no file can be written: before anything is measured."""
    from kernels_numba.files import refusal

    why_not = refusal(path) if path is not None else ""
    if why_not:
        raise ValueError(f"{name} is {path}, {why_not}")


class RowFile:
    """The rows so far, in a file (None: nowhere) after each of them. Those that the file holds of this commit
    are kept until they are measured anew: parts may be measured one by one. ValueError for a path where no
    file can be, or that holds something else than rows."""

    def __init__(self, path: Path | None, commit: str) -> None:
        check_out("--out", path)
        self._path = path
        try:
            old = json.loads(path.read_text(encoding="utf-8") or "[]") if path and path.exists() else []
            self._rows = {row["case"]: row for row in old if row["commit"] == commit}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"--out is {path}, which holds something else than rows: {error}") from None

    def take(self, part: Iterable[dict[str, Any]], say: Callable[[str], object]) -> None:
        """The rows of a part as they come. One that misses its tolerance is told; an import would refuse the
        whole file for it. If it is a stall's, whose answers are compared with each other, all of them go."""
        for row in part:
            case = row["case"]
            if row["err"] <= 1:
                self._rows[case] = row
            else:
                say(f"missed, no row: {case}, {row['err']} times its tolerance")
                kind = "stall/" if case.startswith("stall/") else case
                self._rows = {name: kept for name, kept in self._rows.items() if not name.startswith(kind)}
            self._write()

    def _write(self) -> None:
        if self._path is not None:
            from kernels_numba.files import write_whole  # `sharp.bench show` needs no kernels

            write_whole(self._path, (json.dumps(self.all, indent=1) + "\n").encode())

    @property
    def all(self) -> list[dict[str, Any]]:
        return list(self._rows.values())


def format_row(row: dict[str, Any]) -> str:
    """One readable line: what was measured, its rate, share of the roofline, baseline, peers."""
    rate = f"{row['value']:>8.2f} {row['unit']:<8}"
    if row["unit"] != "GB/s" and row["gbs"] is not None:
        rate += f" {row['gbs']:>7.1f} GB/s"
    share = f"{row['roofline']:>5.0%} of roofline" if row["roofline"] is not None else "roofline unknown"
    against = row["baseline"] or "no baseline"
    if row["ratio"] is not None:
        against = f"{row['ratio']:.2f}x {against}"
    peer = (
        f"  (peer: {row['reference']:g}, {row['reference_source']})" if row["reference"] is not None else ""
    )
    return (
        f"{row['op']:<10} {row['case']:<26} {row['rung'] or '-':<9} {row['us']:>10.2f} us {rate} {share}  "
        f"{against}  err {row['err']}  {row['date']}  {row['gpu']}{peer}"
    )
