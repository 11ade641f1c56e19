"""The recorded measurements: rows of notebooks/results/<device-slug>.json, and the rules for changing them.

Knows the fields of a row and how rows of one op on one device replace each other. Refuses to measure
anything.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Iterable
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
    todo, seen = [start] if start.is_file() else sorted(start.glob("*.py")), set()
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


def import_rows(rows: list[dict[str, Any]], results: Path = RESULTS, root: Path = ROOT) -> list[Path]:
    """Put rows into their devices' files; all earlier rows of the same op on the same device go at once.

    Raises ValueError for a row with missing or unknown fields, without a device, or of an unknown commit;
    nothing
    is written then.
    """
    if not rows:
        raise ValueError("no rows to import")
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


def read_rows(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every recorded row of every device."""
    rows: list[dict[str, Any]] = []
    for path in sorted(results.glob("*.json")):
        rows.extend(json.loads(path.read_text(encoding="utf-8")))
    return rows


def format_row(row: dict[str, Any]) -> str:
    """One readable line."""
    ratio = f"{row['ratio']:5.2f}x {row['baseline']}" if row["ratio"] is not None else "no baseline"
    return (
        f"{row['op']:<10} {row['case']:<28} {row['rung'] or '-':<10} {row['dtype']:<9} "
        f"{row['value']:>9.2f} {row['unit']:<9} {ratio:<24} err {row['err']}  {row['date']}  {row['gpu']}"
    )
