"""How long it takes from a process's start to its first token, on random weights in files.

Knows: a folder of such weights, processes, and the caches that a fresh one lacks. Refuses to know kernels.
Run as `python -m sharp.bench_startup FOLDER DEVICE DTYPE` it is the process that is timed: it says in one
line of JSON what its first token was, as soon as it has it.

"fresh" means: no kernel is compiled, no probe is kept. The weights were just written, so the operating system
has them in memory where it has room for them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharp import results
from sharp.model_config import ModelConfig
from sharp.random_model import IdTokenizer, RandomCheckpoint
from sharp.weights import Checkpoint, expected_shapes

PROMPT = [5, 7, 11, 13, 17, 19, 23, 29]
LIMIT_S = 570.0  # for one process
SPARE_BYTES = 2 << 30  # left on the disk


def config_json(config: ModelConfig) -> dict[str, Any]:
    """What Hugging Face's config.json says of a model with plain rotary positions."""
    from sharp.families import FAMILIES

    return {
        "architectures": [FAMILIES[config.architecture].hf_class], "model_type": config.architecture,
        "torch_dtype": "bfloat16", "hidden_act": "silu", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def write_weights(checkpoint: Checkpoint, folder: Path) -> None:
    """A Hugging Face directory of a checkpoint in bfloat16, a file a layer: no more is held at once.

    ValueError where the disk has no room, naming what is needed and what is free."""
    import ml_dtypes
    from safetensors.numpy import save_file

    needed = 2 * checkpoint.config.num_parameters + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free; the weights and some room need {needed:,}")
    files: dict[str, list[str]] = {}
    for name in checkpoint.names:
        part = f"layer-{int(name.split('.')[2]):03}" if name.startswith("model.layers.") else "rest"
        files.setdefault(f"{part}.safetensors", []).append(name)
    shapes = expected_shapes(checkpoint.config)
    for file, names in files.items():
        tensors = {name: checkpoint.rows(name, 0, shapes[name][0]) for name in names}
        save_file({n: t.astype(ml_dtypes.bfloat16, copy=False) for n, t in tensors.items()}, folder / file)
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_json(checkpoint.config)))


class WithoutTokenizer(Checkpoint):
    """A checkpoint in files that speaks in token ids."""

    def tokenizer(self) -> Any:
        return IdTokenizer()


def first_token(folder: Path, device_name: str, dtype: str) -> int:
    """Open the model and answer one prompt with one token."""
    from sharp.bench_model import options_of
    from sharp.config import EngineConfig
    from sharp.device import open_device
    from sharp.hf_dir import HFDirectory
    from sharp.llm import LLM
    from sharp.model import Model
    from sharp.request import SamplingParams

    device = open_device(device_name, dtype)
    checkpoint = WithoutTokenizer(HFDirectory(folder))
    options = options_of(device.kind, checkpoint.config)
    config = EngineConfig(device=device.kind, dtype=device.dtype, **options)
    model = Model(checkpoint, config, device)
    with LLM(model, device=device.kind, dtype=device.dtype, **options) as llm:
        [output] = llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    return output.outputs[0].token_ids[0]


def time_process(folder: Path, device: str, dtype: str, cache: Path | None = None) -> tuple[float, int]:
    """Seconds from starting the process until it has said its first token, and that token. cache: what takes
    the place of the user's cache directory. RuntimeError with what the process said, if it fails."""
    paths = os.pathsep.join([str(results.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    words = [sys.executable, "-m", "sharp.bench_startup", str(folder), device, dtype]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:  # a pipe that nobody reads may be full
        start = time.perf_counter()
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=results.ROOT
        ) as process:
            assert process.stdout is not None
            limit = threading.Timer(LIMIT_S, process.kill)
            limit.start()
            line = process.stdout.readline()  # comes with the token, before the process cleans up
            seconds = time.perf_counter() - start
            process.wait()
            limit.cancel()
        errors.seek(0)
        said = errors.read()[-2000:]
    if process.returncode or not line:
        raise RuntimeError(f"the process that was timed ended with {process.returncode}: {said}")
    return seconds, int(json.loads(line)["token"])


@contextmanager
def weights_on_disk(shape: str) -> Iterator[Path]:
    """A folder of random weights of a shape of SHAPES, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="sharp-") as folder:
        write_weights(RandomCheckpoint(shape), Path(folder))
        yield Path(folder)


def measure_startup(folder: Path, device: str, dtype: str, rounds: int) -> tuple[float, float, float]:
    """(seconds fresh, median seconds with everything cached, error): the error is 0 if all processes had the
    same first token, else 2."""
    with tempfile.TemporaryDirectory(prefix="sharp-cache-") as cache:
        fresh, token = time_process(folder, device, dtype, Path(cache))
        again = [time_process(folder, device, dtype, Path(cache)) for _ in range(rounds)]
    wrong = any(other != token for _, other in again)
    return fresh, statistics.median(seconds for seconds, _ in again), 2.0 * wrong


def main(words: list[str]) -> None:
    folder, device, dtype = words
    token = first_token(Path(folder), device, dtype)
    print(json.dumps({"token": token}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
