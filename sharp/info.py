"""What `sharp info` prints: this machine (what a bug report needs), or a model's shapes and sizes.

Knows where to ask: the CUDA driver by ctypes, installed packages by their metadata, ops by their rungs. Works
with nothing but the run-time dependencies, without a GPU, and where numba and CUDA cannot be imported.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from sharp.model_config import ModelConfig

Section = tuple[str, list[tuple[str, str]]]

PACKAGES = (
    "numpy", "ml-dtypes", "tokenizers", "safetensors", "gguf", "huggingface-hub", "jinja2",
    "msgspec", "typer", "rich", "tqdm",
    "numba", "llvmlite", "numba-cuda", "cuda-core", "cuda-bindings", "nvidia-cuda-nvcc",
    "nvidia-cuda-nvcc-cu12", "nvtx",
)  # fmt: skip
# Environment variables that change how fast or whether things run.
VARIABLES = re.compile(r"(CUDA|NUMBA|OMP|OPENBLAS|MKL|VECLIB)_\w+|SHARP_\w+|XDG_CACHE_HOME")
CU_COMPUTE_CAPABILITY_MAJOR, CU_COMPUTE_CAPABILITY_MINOR, CU_MULTIPROCESSOR_COUNT = 75, 76, 16
DTYPES = ("float32", "bfloat16")


def machine_report() -> list[Section]:
    """Sections of (name, value) about machine and installation. Never raises for what is missing."""
    return [
        ("sharp", _ours()),
        ("machine", _machine()),
        ("GPU", _gpus()),
        ("packages", [(name, _version(name)) for name in PACKAGES]),
        ("rungs (kernels per op)", _rungs()),
        ("caches", _caches()),
        ("environment", sorted((k, v) for k, v in os.environ.items() if VARIABLES.fullmatch(k))),
    ]


def _ours() -> list[tuple[str, str]]:
    from sharp import __version__

    root = Path(__file__).resolve().parent.parent
    rows = [("version", __version__), ("installed in", str(root))]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return rows
    return [*rows, ("commit", done.stdout.strip())] if done.returncode == 0 else rows


def _machine() -> list[tuple[str, str]]:
    import numpy as np

    settings: Any = np.show_config(mode="dicts")
    blas = settings.get("Build Dependencies", {}).get("blas", {}) if isinstance(settings, dict) else {}
    rows = [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("CPU", f"{_cpu_model()}, {os.cpu_count()} logical cores"),
        ("numpy's BLAS", f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()),
    ]
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        rows.append(("memory", f"{pages * size / 2**30:.1f} GiB"))
    except (OSError, ValueError):
        pass
    return rows


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _gpus() -> list[tuple[str, str]]:
    """Driver and devices as libcuda tells them, and whether our kernels can be used on them."""
    from kernels_numba import compiler
    from sharp.device import cuda_problem
    from sharp.environment import driver_cuda_version

    version = driver_cuda_version()
    if version is None:
        rows = [("driver", "no NVIDIA driver")]
    else:
        rows = [("driver", f"{driver_release()}, CUDA {version // 1000}.{version % 1000 // 10}")]
        rows += [(f"device {i}", text) for i, text in enumerate(_devices())]
    problem = "numba's simulator stands in for CUDA" if compiler.SIMULATOR else cuda_problem()
    return [*rows, ("usable", "yes" if problem is None else f"no: {problem}")]


def driver_release() -> str:
    """Of the NVIDIA driver, as its kernel module says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "release unknown"
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else "release unknown"


def _devices() -> list[str]:
    """A line for each device; one line that says why when the driver refuses."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        status = cuda.cuInit(0)
    except (OSError, AttributeError) as error:
        return [f"libcuda cannot be loaded: {error}"]
    if status:
        return [f"the driver refuses: cuInit gives error {status}"]
    count = ctypes.c_int(0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    lines = []
    for index in range(count.value):
        device, total, name = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(256)
        if cuda.cuDeviceGet(ctypes.byref(device), index):
            continue
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)

        def attribute(which: int, device: ctypes.c_int = device) -> int:
            value = ctypes.c_int(0)
            cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
            return value.value

        major, minor = attribute(CU_COMPUTE_CAPABILITY_MAJOR), attribute(CU_COMPUTE_CAPABILITY_MINOR)
        lines.append(
            f"{name.value.decode(errors='replace')}, compute capability {major}.{minor}, "
            f"{attribute(CU_MULTIPROCESSOR_COUNT)} SMs, {total.value / 2**30:.1f} GiB"
        )
    return lines or ["none visible"]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _rungs() -> list[tuple[str, str]]:
    from kernels_numba.ops import OPS

    return [(op, ", ".join(module.rungs)) for op, module in OPS.items()]


def _caches() -> list[tuple[str, str]]:
    import platformdirs

    from kernels_numba import cubins
    from sharp.pull import weights_root

    places = {"models": weights_root(), "user cache": Path(platformdirs.user_cache_dir("sharp"))}
    driver_cache = os.environ.get("CUDA_CACHE_PATH") or Path.home() / ".nv" / "ComputeCache"
    if Path(driver_cache).is_dir():
        places["driver's kernel cache"] = Path(driver_cache)
    count, size = cubins.contents()
    compiled = ("compiled kernels", f"{cubins.cache_directory()} ({count} kernels, {show_bytes(size)})")
    return [*((name, f"{path} ({_size(path)})") for name, path in places.items()), compiled]


def _size(path: Path) -> str:
    if not path.is_dir():
        return "does not exist"
    return show_bytes(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def model_report(name_or_path: str) -> list[Section]:
    """Sections about a model: constants, sizes, and the shape of every tensor. Raises ModelFileError."""
    from sharp.weights import expected_shapes, open_checkpoint

    checkpoint = open_checkpoint(name_or_path)
    config = checkpoint.config
    rows = [
        ("path", str(checkpoint.path)),
        ("family", config.architecture),
        ("switches", ", ".join(_switches(config)) or "none"),
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}"),
        ("intermediate size", f"{config.intermediate_size}"),
        ("heads", f"{config.num_q_heads} of queries, {config.num_kv_heads} of keys and values"),
        ("head dimension", f"{config.head_dim}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("rope", f"theta {config.rope_theta:g}, {config.rope.describe()}"),
        ("norm eps", f"{config.rms_norm_eps:g}"),
        ("end of sequence ids", ", ".join(map(str, config.eos_token_ids)) or "none"),
    ]
    tokenizer = checkpoint.tokenizer()
    rows += [
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"),
        ("chat template", "yes" if tokenizer.has_chat_template else "none"),
    ]
    parameters = config.num_parameters
    sizes = [
        ("parameters", f"{parameters:,}"),
        ("tensors as stored", show_bytes(checkpoint.num_bytes)),
    ]
    for dtype, width in zip(DTYPES, (4, 2), strict=True):
        sizes.append((f"weights in {dtype}", show_bytes(parameters * width)))
    for dtype in DTYPES:
        per_token = config.kv_bytes_per_token(dtype)
        whole = show_bytes(per_token * config.max_position_embeddings)
        sizes.append((f"KV per token, {dtype}", f"{per_token:,} bytes ({whole} for a whole context)"))
    shapes: dict[str, str] = {}
    for name, shape in expected_shapes(config).items():
        group = re.sub(r"\.layers\.\d+\.", f".layers.0-{config.num_layers - 1}.", name)
        shapes[group] = f"[{', '.join(map(str, shape))}]"
    return [("model", rows), ("sizes", sizes), ("shapes", list(shapes.items()))]


def _switches(config: ModelConfig) -> list[str]:
    """What the forward does for this model and not for a plain Llama, in words."""
    words = ["bias on q, k and v"] if config.qkv_bias else []
    words += ["norm of q and k heads"] if config.qk_norm else []
    windowed = [layer for layer in range(config.num_layers) if config.window(layer) is not None]
    if windowed:
        where = (
            "all layers"
            if len(windowed) == config.num_layers
            else f"{len(windowed)} of {config.num_layers} layers"
        )
        words.append(f"window of {config.sliding_window:,} tokens in {where}")
    return [*words, "lm_head tied"] if config.tie_word_embeddings else words


def show_bytes(count: int) -> str:
    """123456789 -> "117.7 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def print_report(sections: list[Section]) -> None:
    """Plain text on stdout, ready to be pasted into a report."""
    for title, rows in sections:
        print(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            print(f"  {name:{width}}  {value}")
