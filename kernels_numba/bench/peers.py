"""What the vendor promises, and what others measured: numbers to hold ours against that we cannot run here.

Knows: names of GPUs, sources. Refuses to know: our times.
"""

from __future__ import annotations

import re

from kernels_numba.bench.ops import BENCH_OPS
from kernels_numba.bench.timing import Measurement
from kernels_numba.cost import Cost, Peaks, roofline_fraction

# Name as the driver gives it, without "NVIDIA " -> memory rate and dense bf16 rate with float32 accumulation.
# Sources: NVIDIA's datasheets of H100, H200, GH200, A100, A40, A10, L40S, L40, L4; its white papers on the
# GA102, AD102 and RTX Blackwell architectures. Where a datasheet gives rates with sparsity, these are half.
PEAKS: tuple[tuple[str, Peaks], ...] = (
    (r"H100 80GB HBM3|H100 SXM\w*", Peaks(3.35e12, 989.4e12)),
    (r"H100 PCIe", Peaks(2.0e12, 756e12)),
    (r"H100 NVL", Peaks(3.9e12, 835.5e12)),
    (r"H200", Peaks(4.8e12, 989.4e12)),
    (r"H200 NVL", Peaks(4.8e12, 835.5e12)),
    (r"GH200 480GB", Peaks(4.0e12, 989.4e12)),
    (r"A100-(SXM4|PCIE)-40GB", Peaks(1.555e12, 312e12)),
    (r"A100-SXM4-80GB", Peaks(2.039e12, 312e12)),
    (r"A100 80GB PCIe", Peaks(1.935e12, 312e12)),
    (r"A40", Peaks(0.696e12, 149.7e12)),
    (r"A10", Peaks(0.6e12, 125e12)),
    (r"L40S", Peaks(0.864e12, 362.05e12)),
    (r"L40", Peaks(0.864e12, 181.05e12)),
    (r"L4", Peaks(0.3e12, 121e12)),
    (r"GeForce RTX 3090", Peaks(0.936e12, 71e12)),
    (r"GeForce RTX 4090", Peaks(1.008e12, 165.2e12)),
    (r"GeForce RTX 5090", Peaks(1.792e12, 209.5e12)),
)

REFERENCE_GPU = "NVIDIA H100 80GB HBM3"
_FA3 = f"FlashAttention 3 on an {REFERENCE_GPU}, driver 580, measured 2026-11-23"
_FA3_MIXED = _FA3 + ", other draws of the lengths"
# (op, case) -> (figure in the row's unit, source)
REFERENCES: dict[tuple[str, str], tuple[float, str]] = {
    ("prefill_attention", "32/8/128 8x2048"): (512, _FA3),
    ("prefill_attention", "32/8/128 1x16384"): (727, _FA3),
    ("prefill_attention", "32/8/128 64mix16-2048"): (400, _FA3_MIXED),
    ("prefill_attention", "28/4/128 8x2048"): (446, _FA3),
    ("prefill_attention", "28/4/128 1x16384"): (708, _FA3),
    ("prefill_attention", "28/4/128 64mix16-2048"): (402, _FA3_MIXED),
    ("prefill_attention", "9/3/64 8x2048"): (234, _FA3),
    ("prefill_attention", "9/3/64 1x16384"): (500, _FA3),
    ("prefill_attention", "9/3/64 64mix16-2048"): (232, _FA3_MIXED),
    ("decode_attention", "28/4/128 B=1 kv=4096"): (581, _FA3),
    ("decode_attention", "28/4/128 B=8 kv=1024"): (955, _FA3),
    ("decode_attention", "28/4/128 B=8 kv=4096"): (1858, _FA3),
    ("decode_attention", "28/4/128 B=64 kv=1024"): (2233, _FA3),
    ("decode_attention", "28/4/128 B=64 kv=4096"): (2737, _FA3),
    ("decode_attention", "28/4/128 B=64 kv=mix100-8000"): (2410, _FA3_MIXED),
    ("decode_attention", "28/4/128 B=256 kv=mix100-8000"): (2836, _FA3_MIXED),
    ("decode_attention", "9/3/64 B=8 kv=4096"): (1175, _FA3),
    ("decode_attention", "9/3/64 B=64 kv=mix100-8000"): (1880, _FA3_MIXED),
}


def datasheet(gpu: str) -> Peaks | None:
    """The peaks of a GPU by its full name; None if it is not in the table (a slice of one is not)."""
    name = gpu.removeprefix("NVIDIA ")
    return next((peaks for pattern, peaks in PEAKS if re.fullmatch(pattern, name)), None)


def reference(op: str, case: str, gpu: str) -> tuple[float, str] | tuple[None, None]:
    """What a peer that cannot run beside us does on this case, and where that is from; on that GPU alone."""
    return REFERENCES.get((op, case), (None, None)) if gpu == REFERENCE_GPU else (None, None)


def figures(
    op: str, cost: Cost, mine: Measurement, baseline: Measurement | None, gpu: str
) -> dict[str, float | str | None]:
    """The numbers of a row: value and unit (the op's own), us, tflops, gbs, roofline (fraction; None for an
    unknown GPU), baseline_us and ratio (None without a baseline)."""
    seconds, peaks, unit = mine.us * 1e-6, datasheet(gpu), BENCH_OPS[op].unit
    tflops, gbs = round(cost.flops / seconds / 1e12, 3), round(cost.bytes / seconds / 1e9, 1)
    return {
        "value": tflops if unit == "TFLOP/s" else gbs,
        "unit": unit,
        "us": round(mine.us, 2),
        "tflops": tflops,
        "gbs": gbs,
        "roofline": round(roofline_fraction(cost, peaks, seconds), 4) if peaks else None,
        "baseline_us": round(baseline.us, 2) if baseline else None,
        "ratio": round(baseline.us / mine.us, 4) if baseline else None,
    }
