"""Refuse a model that cannot fit, before it is loaded, and say which of the known models would.

Knows the budget's arithmetic and the manifest; refuses to measure: the free bytes come in as an argument.
"""

from __future__ import annotations

from dataclasses import replace

from sharp.budget import CUDA_CONTEXT, plan_memory, weight_bytes
from sharp.config import EngineConfig, ModelConfig
from sharp.manifest import read_manifest
from sharp.model_config import ModelFileError


def refuse_if_too_large(
    model: ModelConfig,
    config: EngineConfig,
    *,
    where: str,
    free: int,
    dtype: str,
    kind: str,
    max_model_len: int,
    workspaces: int = 0,
    staging: int = 0,
    graphs: int = 0,
) -> None:
    """Return if weights, workspace and pages fit in `free` bytes (nothing loaded) and in memory_limit.

    where: the model's file, for the message; workspaces, staging, graphs: see plan_memory. Raises MemoryError
    with figures and the known models that fit.
    """
    weights = weight_bytes(model, dtype, kind)
    context = CUDA_CONTEXT if kind == "cuda" else 0
    room = free if config.memory_limit is None else min(free, config.memory_limit - context)
    if weights > room:
        limit = "" if config.memory_limit is None else f" of memory_limit {config.memory_limit:,}"
        problem = f"the weights need {weights:,} bytes as {dtype}, but {max(room, 0):,} are free{limit}"
    else:
        try:
            plan_memory(
                model, config, free=free - weights, dtype=dtype, kind=kind, max_model_len=max_model_len,
                workspaces=workspaces, staging=staging, graphs=graphs,
            )  # fmt: skip
            return
        except MemoryError as error:
            problem = str(error)
    fitting = known_models_that_fit(config, free=free, dtype=dtype, kind=kind)
    raise MemoryError(f"{where}: {problem}; known models that would fit: {', '.join(fitting) or 'none'}")


def known_models_that_fit(config: EngineConfig, *, free: int, dtype: str, kind: str) -> list[str]:
    """Names of the manifest's pulled models that `config` can hold in `free` bytes with their own context.

    Only a file that is here says its shapes, so what was not pulled is not judged.
    """
    from sharp.weights import open_checkpoint

    names = []
    own = replace(config, max_model_len=None, num_blocks=None)
    for name in read_manifest():
        try:
            model = open_checkpoint(name).config
            plan_memory(
                model,
                own,
                free=free - weight_bytes(model, dtype, kind),
                dtype=dtype,
                kind=kind,
                max_model_len=model.max_position_embeddings,
            )
        except (ModelFileError, MemoryError):
            continue
        names.append(name)
    return names
