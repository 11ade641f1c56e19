"""The forward pass: one readable list of launches over packed tokens, written once for every device.

`forward` knows the order of the operations; `ops` decides who executes them: numpy (`reference`), plain
numba.cuda kernels, or later rungs, one by one. It refuses to know requests and the scheduler: a step is token
ids, positions, slots and block tables, with no padding anywhere.

Rounding points (activation dtype bfloat16; with float32 nothing is rounded). Every op computes in float32
from inputs as stored, and rounds once where its result is stored:

    embedding        copied from the table, already rounded
    rms_norm         its output (normalised x weight) is rounded once
    gemm             float32 accumulation with K ascending, bias added in float32, rounded once; of o and down
                     residual + that in float32, rounded again, is the new residual, which the norm reads
    qk_norm          (Qwen3) each head of q and k normalised x weight, rounded once, in place
    rope_store_kv    angles from a float32 table (yarn's attention factor is in it); the rotated pair rounded
                     once; keys and values copied to their pages
    attention        scores, softmax and the weighted sum in float32, rounded once; a sliding window leaves
                     keys out and changes nothing else
    gemm_silu_mul    gates and ups are a gemm's, rounded once; silu(gate) * up in float32, rounded once
    lm_head          float32 accumulation, logits stay float32
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from kernels_numba.ops import resolve
from kernels_numba.ops.apply_step import StepLayout
from sharp import driver
from sharp.budget import Budget, plan_memory, weight_bytes
from sharp.config import EngineConfig, ModelConfig
from sharp.device import Array, Device, open_device
from sharp.eager import Eager
from sharp.fits import refuse_if_too_large
from sharp.layout import aligned, workspace
from sharp.plan import BatchPlan, Int32, SampleOutput
from sharp.rope import rope_table
from sharp.rungs import choose_rungs, describe_rungs, refuse_rungs, where_decodes
from sharp.runtime import device_bytes, open_runtime, predicted_bytes
from sharp.sampling import sample
from sharp.staging import DeviceBatch, StepArrays, stage, staging_bytes
from sharp.weight_stream import Lanes, stream_weights
from sharp.weights import Checkpoint, ModelWeights, load_weights, open_checkpoint
from sharp.workspaces import AttentionNeeds, SampleNeeds


@dataclass(frozen=True)
class Workspace:
    """Caller-owned outputs, allocated once for the largest step: T is the step-token budget, R the most
    rows.
    """

    residual: Array  # [T, H] the residual stream
    x: Array  # [T, H] normalised input of the next product
    qkv: Array  # [T, Hq + 2 Hkv, D]
    attention: Array  # [T, Hq, D]
    gate_up: Array  # [T, 2 I]
    act: Array  # [T, I]
    x_rows: Array  # [R, H] the rows of x that become logits, side by side
    logits: Array  # f32[R, V]
    sampled: Array  # i32[R]

    @staticmethod
    def allocate(config: ModelConfig, device: Device, num_tokens: int, num_rows: int) -> Workspace:
        planned = workspace(config, num_tokens, num_rows)
        return Workspace(
            **{name: device.empty(shape, dtype, term=term) for name, (term, shape, dtype) in planned.items()}
        )


@dataclass(frozen=True)
class KVCache:
    """Pages of one layer: [num_blocks, num_kv_heads, block_size, head_dim] each."""

    k: Array
    v: Array


def copy_pages(device: Device, kv: list[KVCache], pairs: Int32) -> None:
    """Queue the copies of (source, destination) pages in all layers."""
    for cache in kv if len(pairs) else ():
        device.copy_rows(cache.k, pairs)
        device.copy_rows(cache.v, pairs)


def product_adder(ops: SimpleNamespace) -> Callable[..., None]:
    """add(residual, x, rows, weight, norm, eps=, stream=): residual += rows @ weight^T; x =
    rms_norm(residual).

    The product adds. Where a rung of gemm that somebody registered knows no residual, the norm does, with the
    same roundings.
    """

    def in_product(
        residual: Array, x: Array, rows: Array, weight: Array, norm: Array, *, eps: float, stream: Any
    ) -> None:
        ops.gemm(residual, rows, weight, residual=residual, stream=stream)
        ops.rms_norm(x, residual, norm, eps=eps, stream=stream)

    def in_norm(
        residual: Array, x: Array, rows: Array, weight: Array, norm: Array, *, eps: float, stream: Any
    ) -> None:
        ops.gemm(x, rows, weight, stream=stream)
        ops.rms_norm(x, x, norm, eps=eps, residual=residual, stream=stream)

    return in_product if "residual" in inspect.signature(ops.gemm).parameters else in_norm


def forward(
    config: ModelConfig,
    weights: ModelWeights,
    batch: StepArrays,
    ops: SimpleNamespace,
    kv: list[KVCache],
    cos_sin: Array,
    work: Workspace,
    stream: Any,
) -> Array:
    """Logits f32[R, V] of the batch's `logits_rows`; the keys and values of all T tokens are in their pages
    after it.

    Nothing is allocated on the device and nothing waits: all launches go to `stream`. Decodes come before the
    rest: of a bucket, those past the real number write zeros into rows that belong to the rest.
    """
    tokens, rows = batch.num_tokens, batch.num_rows
    hq, hkv = config.num_q_heads, config.num_kv_heads
    residual, x = work.residual[:tokens], work.x[:tokens]
    gate_up, act = work.gate_up[:tokens], work.act[:tokens]
    qkv = work.qkv[:tokens]
    q, k, v = qkv[:, :hq], qkv[:, hq : hq + hkv], qkv[:, hq + hkv :]
    qkv_rows = qkv.reshape(tokens, (hq + 2 * hkv) * config.head_dim)
    attention = work.attention[:tokens]
    attention_rows = attention.reshape(tokens, hq * config.head_dim)
    decodes = batch.num_decodes
    decode_q, decode_out = q[:decodes], attention[:decodes]
    eps, scale = config.rms_norm_eps, config.head_dim**-0.5
    norms = [layer.input_norm for layer in weights.layers] + [weights.final_norm]
    add = partial(product_adder(ops), residual, x, eps=eps, stream=stream)

    ops.embedding(residual, batch.token_ids, weights.embed, stream=stream)
    ops.rms_norm(x, residual, norms[0], eps=eps, stream=stream)
    for index, (layer, cache) in enumerate(zip(weights.layers, kv, strict=True)):
        window = config.window(index)  # without one, rungs that know no windows serve too
        masked = {} if window is None else {"window": window}
        ops.gemm(qkv_rows, x, layer.qkv, layer.qkv_bias, stream=stream)
        if config.qk_norm:
            ops.qk_norm(q, k, layer.q_norm, layer.k_norm, eps=eps, stream=stream)
        ops.rope_store_kv(
            q, k, v, batch.positions, cos_sin, cache.k, cache.v, batch.slot_mapping, stream=stream
        )
        if decodes:
            ops.decode_attention(
                decode_out, decode_q, cache.k, cache.v, batch.decode_context_lens, batch.decode_block_table,
                softmax_scale=scale, stream=stream, **masked,
            )  # fmt: skip
        if batch.num_prefills:
            ops.prefill_attention(
                attention, q, cache.k, cache.v, batch.prefill_cu_seqlens_q, batch.prefill_context_lens,
                batch.prefill_block_table, softmax_scale=scale, stream=stream, **masked,
            )  # fmt: skip
        add(attention_rows, layer.o, layer.post_norm)
        ops.gemm_silu_mul(act, x, layer.gate_up, gate_up, stream=stream)
        add(act, layer.down, norms[index + 1])
    logits = work.logits[:rows]
    ops.lm_head(logits, x, weights.lm_head, batch.logits_rows, stream=stream)
    return logits


class Model(Eager):
    """Weights, pages and workspace on one device, and a step's three verbs: stage, forward, sample; launch
    and land, which the engine drives, are made of them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        device: Device,
        *,
        progress: bool = False,
        observe: Callable[[str], object] = lambda mark: None,
    ) -> None:
        """Load the weights and allocate the rest. observe: called with "weights" when they are there."""
        self.config = checkpoint.config
        self.device = device
        self.block_size = config.block_size
        self.max_model_len = config.max_model_len or self.config.max_position_embeddings
        if self.max_model_len > self.config.max_position_embeddings:
            raise ValueError(
                f"max_model_len {self.max_model_len} is over the model's "
                f"{self.config.max_position_embeddings} positions"
            )
        c = self.config
        self.rungs = choose_rungs(c, config, device)
        self.ops = resolve(device.default_rung, self.rungs)
        refuse_rungs(self.rungs, c, config, device)
        self.decodes = where_decodes(self.rungs, device.default_rung, self.max_model_len)
        rows = min(config.max_num_seqs, config.max_num_batched_tokens)
        layout = StepLayout(config.max_num_batched_tokens, rows, -(-self.max_model_len // self.block_size))
        staging = staging_bytes(layout.max_tokens, rows, layout.max_pages)
        needs = AttentionNeeds.of(self.config, self.rungs, rows, self.max_model_len)
        sorting = SampleNeeds.of(self.rungs, rows, self.config.vocab_size)
        asynchronous = device.copy_stream is not None
        shape: dict[str, Any] = {"dtype": device.dtype, "kind": device.kind}
        shape |= {"max_model_len": self.max_model_len, "workspaces": needs.num_bytes + sorting.num_bytes}
        shape["staging"] = 2 * aligned(staging) if asynchronous else 0
        if self.overlaps:
            shape["staging"] += device_bytes(layout)
            graphs = predicted_bytes(layout, c.num_layers, self.decodes)
            shape["graphs"] = graphs if config.graphs else 0
        free = device.free_bytes()
        refuse_if_too_large(self.config, config, where=str(checkpoint.path), free=free, **shape)
        self.tokenizer = checkpoint.tokenizer()
        if asynchronous:  # all is planned before anything is allocated, and cut from one arena
            left = free - weight_bytes(self.config, device.dtype, device.kind)
            self.budget: Budget = plan_memory(self.config, config, free=left, **shape)
        with device.arena(self.budget.arena if asynchronous else 0) as self.arena:
            if asynchronous:
                self.weights = stream_weights(checkpoint, cast(Lanes, device), progress=progress)
            else:
                self.weights = load_weights(checkpoint, device.upload_float, progress=progress)
            observe("weights")
            if not asynchronous:
                self.budget = plan_memory(self.config, config, free=device.free_bytes(), **shape)
            self.num_blocks = self.budget.num_blocks
            needs.give(self.ops, device)
            sorting.give(self.ops, device)
            angles = rope_table(
                self.config.rope, self.config.rope_theta, self.config.head_dim, self.max_model_len
            )
            self.cos_sin = device.upload(angles, term="rope_table")
            self.work = Workspace.allocate(self.config, device, config.max_num_batched_tokens, rows)
            if self.rungs.get("lm_head") == "warp":
                self.ops.lm_head = partial(self.ops.lm_head, x_rows=self.work.x_rows)
            device.reserve_staging(staging)
            page_shape = (self.num_blocks, self.config.num_kv_heads, self.block_size, self.config.head_dim)
            self.kv = [
                KVCache(*(device.empty(page_shape, term="kv_pages") for _ in range(2)))
                for _ in range(self.config.num_layers)
            ]
            if self.overlaps:
                self.runtime = open_runtime(self, layout, config.graphs)

    @classmethod
    def load(cls, path: str | Path, config: EngineConfig, *, progress: bool = False) -> Model:
        """Open a checkpoint (GGUF file, HF directory or pulled name) and put it on the device the config
        names.
        """
        checkpoint = open_checkpoint(path)
        return cls(checkpoint, config, open_device(config.device, config.dtype), progress=progress)

    @property
    def device_name(self) -> str:
        return (
            f"{self.device.name}, {self.device.dtype}{describe_rungs(self.rungs, self.device.default_rung)}"
        )

    @property
    def overlaps(self) -> bool:
        """Whether steps run beside the host: on a GPU, not in numpy and not in numba's simulator."""
        return self.device.capability is not None

    def stage(self, plan: BatchPlan) -> DeviceBatch:
        """Bring a plan to the device. Raises ValueError if it is larger than the workspace."""
        if plan.num_tokens > self.work.x.shape[0] or len(plan.logits_rows) > self.work.logits.shape[0]:
            raise ValueError(
                f"a step of {plan.num_tokens} tokens and {len(plan.logits_rows)} logits rows is over the "
                f"workspace of {self.work.x.shape[0]} tokens and {self.work.logits.shape[0]} rows"
            )
        with self._step(plan):
            return stage(plan, self.device)

    @property
    def uses_cuda(self) -> bool:
        """Whether a lost CUDA (driver.poisoned) is this model's loss too."""
        return self.device.kind == "cuda"

    @contextmanager
    def _step(self, plan: BatchPlan) -> Iterator[None]:
        """Errors of CUDA from inside say which step and whose; a CUDA that was lost is not asked again."""
        if self.uses_cuda:
            driver.refuse_if_lost()
        with driver.during(f"step {plan.step} ({plan.num_tokens} tokens of {plan.num_seqs} requests)"):
            yield

    def forward(self, batch: DeviceBatch) -> Array:
        """Queue one forward pass; returns f32[R, V] on the device, valid once the stream has got there.

        Pages that the plan wants copied (samples that part) are copied first.
        """
        with self._step(batch.plan):
            copy_pages(self.device, self.kv, batch.plan.page_copies)
            where = self.kv, self.cos_sin, self.work, self.device.stream
            return forward(self.config, self.weights, batch, self.ops, *where)

    def sample(self, logits: Array, batch: DeviceBatch) -> SampleOutput:
        """Wait for the step and return the chosen ids (and log-probabilities where asked for)."""
        rows = len(batch.plan.logits_rows)
        with self._step(batch.plan):
            return sample(logits, batch, self.work.sampled[:rows], self.ops, self.device)

    def close(self) -> None:
        """Give the device's memory back; the model cannot be used afterwards. The garbage collector does the
        same for a model that nobody refers to any more."""
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None
        self.device.close()
        del self.weights, self.kv, self.work
        if self.arena is not None:
            self.arena.close()
