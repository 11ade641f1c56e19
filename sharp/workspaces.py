"""What kernels of attention and sampling keep on the device beside their operands, cut from the model's
arena.

Knows which rungs want what, and how much. Refuses to know what a kernel does with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from kernels_numba.attention_contract import SPLIT
from kernels_numba.ops.decode_attention import door as decode_door
from kernels_numba.ops.decode_attention.fold import UNWRITTEN_BYTE
from kernels_numba.ops.prefill_attention import door as prefill_door
from kernels_numba.ops.sample import warp as sample_door
from sharp.device import Array, Device
from sharp.layout import aligned
from sharp.memory import DeviceArray
from sharp.model_config import ModelConfig

TERM = "workspaces"
PREFILL_COUNTERS = 2  # see prefill_attention's Workspace


@dataclass(frozen=True)
class AttentionNeeds:
    """Sizes for num_seqs sequences with num_splits splits between them; decode, prefill: whether their rungs
    want any; state: whether prefill's keeps what it has folded there."""

    decode: bool
    prefill: bool
    state: bool
    num_seqs: int
    num_splits: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @staticmethod
    def of(model: ModelConfig, rungs: dict[str, str], num_seqs: int, max_model_len: int) -> AttentionNeeds:
        """Enough for num_seqs sequences of max_model_len tokens. ValueError if that is not countable."""
        decode = rungs.get("decode_attention", "") in decode_door.NEEDS
        prefill = rungs.get("prefill_attention", "")
        splits = num_seqs * -(-max_model_len // SPLIT)
        if decode and splits * model.num_q_heads >= 1 << 31:
            raise ValueError(
                f"{num_seqs} sequences of {max_model_len} tokens have {splits} splits of {model.num_q_heads} "
                "heads; decode attention counts to 2**31; lower max_num_seqs or max_model_len"
            )
        return AttentionNeeds(
            decode, prefill in prefill_door.NEEDS, prefill == prefill_door.MMA, num_seqs, splits,
            model.num_q_heads, model.num_kv_heads, model.head_dim,
        )  # fmt: skip

    @property
    def _state_shape(self) -> tuple[int, int]:
        return prefill_door.Workspace.state_shape(self.head_dim) if self.state else (0, 0)

    def _decode_shapes(self) -> list[tuple[tuple[int, ...], type]]:
        """As decode_attention's Workspace has them: partial, partial_ml, counters."""
        return [
            ((self.num_splits, self.num_q_heads, self.head_dim), np.float32),
            ((self.num_splits, self.num_q_heads, 2), np.float32),
            ((2 + self.num_seqs * self.num_kv_heads,), np.int32),
        ]

    @property
    def num_bytes(self) -> int:
        """What give() takes of an arena."""
        total = (
            sum(aligned(4 * int(np.prod(shape))) for shape, _ in self._decode_shapes()) if self.decode else 0
        )
        total += aligned(4 * PREFILL_COUNTERS) if self.prefill else 0
        return total + (aligned(4 * int(np.prod(self._state_shape))) if self.state else 0)

    def give(self, ops: SimpleNamespace, device: Device) -> None:
        """Allocate, set what must have a value to it, and bind all of it to the ops that want it."""
        if self.decode:
            sums, extremes, counters = (
                device.empty(shape, dtype, term=TERM) for shape, dtype in self._decode_shapes()
            )
            for unwritten in (sums, extremes):
                device.fill(unwritten, UNWRITTEN_BYTE)
            device.fill(counters, 0)
            space = decode_door.Workspace(_lent(sums), _lent(extremes), _lent(counters), self.num_splits)
            ops.decode_attention = partial(ops.decode_attention, workspace=space)
        if self.prefill:
            counters = device.empty((PREFILL_COUNTERS,), np.int32, term=TERM)
            device.fill(counters, 0)
            kept = _lent(device.empty(self._state_shape, np.float32, term=TERM)) if self.state else None
            ops.prefill_attention = partial(
                ops.prefill_attention, workspace=prefill_door.Workspace(_lent(counters), kept)
            )
        device.synchronize()


@dataclass(frozen=True)
class SampleNeeds:
    """Of sampling's rung "warp", for num_rows rows of vocab_size ids; num_rows 0: another rung, which wants
    none."""

    num_rows: int
    vocab_size: int

    @staticmethod
    def of(rungs: dict[str, str], num_rows: int, vocab_size: int) -> SampleNeeds:
        """ValueError for more rows or ids than the rung takes."""
        needs = SampleNeeds(num_rows if rungs.get("sample") == sample_door.RUNG else 0, vocab_size)
        if needs.num_rows:
            sample_door.Workspace.num_words(num_rows, vocab_size)
        return needs

    def _words(self) -> int:
        return sample_door.Workspace.num_words(self.num_rows, self.vocab_size)

    @property
    def num_bytes(self) -> int:
        """What give() takes of an arena."""
        return aligned(4 * self._words()) if self.num_rows else 0

    def give(self, ops: SimpleNamespace, device: Device) -> None:
        """Allocate, set to 0 and bind to the op, if it wants any."""
        if self.num_rows:
            words = device.empty((self._words(),), np.int32, term=TERM)
            device.fill(words, 0)
            space = sample_door.Workspace(_lent(words), self.num_rows, self.vocab_size)
            ops.sample = partial(ops.sample, workspace=space)
            device.synchronize()


def _lent(array: Array) -> Array:
    """The array without its owner: kernels remember workspaces for as long as the process lives, and must not
    keep a dropped model's memory. The model has the arena, and the ops."""
    if not isinstance(array, DeviceArray):
        return array
    return DeviceArray(array.address, array.shape, array.dtype, array.strides)
