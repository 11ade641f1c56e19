"""Probes kept in the user's cache directory, and used again only while they are still true.

Knows what a probe's numbers depend on. Refuses to measure: that is probe.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import platformdirs

from kernels_numba.files import write_whole
from sharp.config import EngineConfig
from sharp.device import Device, open_device
from sharp.meter import free_before_context
from sharp.predictor import StepPredictor
from sharp.probe import Probe, run_probe
from sharp.pull import resolve
from sharp.weights import Checkpoint, open_checkpoint

FREE_TOLERANCE = 0.1  # of all memory: by more than this the free bytes may not have moved
FORM = "2"  # of the file; a new one makes old files misses
PACKAGES = ("ml-dtypes", "numba-cuda", "cuda-bindings")

BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Say = Callable[[str], None]


def fingerprint(device: Device, path: Path, config: EngineConfig) -> dict[str, str]:
    """All that the numbers depend on, in words: device, driver, model files, options, versions, kernels."""
    from kernels_numba import cubins
    from sharp import __version__
    from sharp.info import driver_release

    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {
        "form": FORM,
        "device": device.name,
        "driver": driver_release() if device.kind == "cuda" else "",
        "threads": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "blas": json.dumps([os.environ.get(name, "") for name in BLAS_THREADS]),
        "dtype": device.dtype,
        "model": str(path.resolve()),
        "files": json.dumps(stats),
        "options": repr(replace(config, device=device.kind, dtype=device.dtype)),
        "versions": json.dumps(
            [__version__, platform.python_version(), np.__version__, *map(_version, PACKAGES)]
        ),
        "kernels": cubins.SOURCES,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def probe_path(key: dict[str, str], directory: Path | None = None) -> Path:
    """The file of a fingerprint."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return (directory or Path(platformdirs.user_cache_dir("sharp")) / "probes") / f"{digest}.json"


def read_probe(path: Path, key: dict[str, str], free: int | None) -> tuple[Probe | None, str]:
    """The kept probe if it is still true, and in words what was found.

    free: bytes now, nothing loaded. They must be within 10 % of all memory of what they were; None: for whom
    step times are enough.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, "nothing kept for this device, model and version"
    except OSError as error:
        return None, f"{path} cannot be read ({error.strerror})"
    try:
        probe = Probe.from_json(data)
    except ValueError as error:
        return None, f"{path} is damaged ({error})"
    if probe.fingerprint != key:
        return None, f"{path} is of another device, model or version"
    if free is not None and abs(probe.free - free) > FREE_TOLERANCE * probe.total:
        return None, f"free memory was {probe.free:,} bytes on {probe.date} and is {free:,} now"
    return replace(probe, from_cache=True), f"measured on {probe.date}, still true ({path})"


def write_probe(path: Path, probe: Probe) -> None:
    """Keep a probe, whole or not at all. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, probe.to_json())


def get_probe(
    model: str | Path,
    config: EngineConfig | None = None,
    *,
    fresh: bool = False,
    say: Say = lambda text: None,
    directory: Path | None = None,
    progress: bool = False,
    measure: Callable[..., Probe] = run_probe,
) -> Probe:
    """The probe of a model on the device that `config` names: kept from before if still true, else measured.

    fresh: measure in any case. say: told in words what was found. directory: of the kept ones, by default
    probes/ in the user's cache directory. Raises what opening the model and the device raises.
    """
    config = config or EngineConfig()
    checkpoint: Checkpoint = open_checkpoint(model)
    outside = free_before_context() if config.device != "cpu" else None  # a context cannot be unmade
    device = open_device(config.device, config.dtype)
    key = fingerprint(device, checkpoint.path, config)
    path = probe_path(key, directory)
    if fresh:
        say("measuring anew, as asked")
    else:
        probe, found = read_probe(path, key, device.free_bytes())
        say(found if probe else f"measuring: {found}")
        if probe is not None:
            device.close()
            return probe
    probe = measure(checkpoint, config, device, key, outside=outside, progress=progress)
    try:
        write_probe(path, probe)
    except OSError as error:
        say(f"the probe could not be kept: {error}")
    return probe


def kept_predictor(
    model: str | Path, device: Device, config: EngineConfig, directory: Path | None = None
) -> tuple[StepPredictor | None, str]:
    """Step times of a model that runs on `device`, from what `sharp probe` kept; None where there is nothing
    true, and in words what was found. Measures nothing."""
    same = EngineConfig(
        device=config.device, dtype=config.dtype, block_size=config.block_size, rungs=config.rungs
    )
    key = fingerprint(device, resolve(model), same)
    probe, found = read_probe(probe_path(key, directory), key, None)
    return (probe.predictor if probe else None), found
