"""Rotary positions: how a model stretches its angles, and the table of cosines and sines that kernels read.

Everything is computed on the host, step by step as transformers does (modeling_rope_utils.py), in float32:
a model was trained with these very roundings. Knows a head's dimension and its constants; refuses to know
heads, layers and files. Every error is a ValueError that names the value.

Sources: Su et al. 2021 (arXiv:2104.09864); linear: Chen et al. 2023 (arXiv:2306.15595); yarn: Peng et al.
2023 (arXiv:2309.00071); llama3: the reference code of Llama 3.1, apply_scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

MAX_NUMBER = 1e30  # of a constant in a file: beyond it, and under its inverse, float32 ends
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def positive(value: Any) -> bool:
    """Whether `value` is a number that float32 can divide by (true and false are none)."""
    return (
        not isinstance(value, bool)
        and isinstance(value, (int, float))
        and 1 / MAX_NUMBER <= value <= MAX_NUMBER
    )


@dataclass(frozen=True)
class RopeScaling:
    """One way to stretch the angles; fields that a kind does not use keep their defaults.

    kind: one of ROPE_KINDS, or "factors": a divisor for each frequency, which is how GGUF files spell llama3.
    original_positions: positions before the stretch (llama3, yarn). attention_factor: what cosines and sines
    are multiplied with (yarn).
    """

    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (*ROPE_KINDS, "factors"):
            raise ValueError(f"rope type {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not positive(value):
                raise ValueError(
                    f"rope {field.name} must be a positive number up to {MAX_NUMBER:g}, not {value!r}"
                )
        if self.kind in ("llama3", "yarn") and not (
            isinstance(self.original_positions, int) and 0 < self.original_positions < 2**31
        ):
            raise ValueError(
                f"rope original_max_position_embeddings must be a whole number from 1 to 2**31 - 1, "
                f"not {self.original_positions!r}"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor {self.high_freq_factor} must be over low_freq_factor "
                f"{self.low_freq_factor}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope truncate must be true or false, not {self.truncate!r}")
        if not all(positive(value) for value in self.factors):
            raise ValueError("rope factors must be positive numbers")

    def describe(self) -> str:
        """What `sharp info` prints: the kind and the numbers that it uses."""
        if self.kind == "factors":
            return f"factors of each frequency, {min(self.factors):g} to {max(self.factors):g}"
        parts = [] if self.kind == "default" else [f"factor {self.factor:g}"]
        if self.kind in ("llama3", "yarn"):
            parts.append(f"over {self.original_positions:,} positions")
        if self.kind == "llama3":
            parts.append(
                f"low and high frequency factors {self.low_freq_factor:g}, {self.high_freq_factor:g}"
            )
        if self.kind == "yarn":
            parts.append(f"beta {self.beta_fast:g} to {self.beta_slow:g}")
            parts.append(f"attention factor {self.attention_factor:g}")
        return ", ".join([self.kind, *parts])


DEFAULT_ROPE = RopeScaling()


def inv_freq(rope: RopeScaling, theta: float, head_dim: int) -> FloatArray:
    """Radians a position of each pair: f32[head_dim / 2]; theta^(-2i / head_dim) where nothing is scaled.

    The powers are rounded from float64, which gives torch's float32 powers but for one in some hundred;
    numpy's own float32 powers differ in one of ten, and at position 100,000 that is visible.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(float(theta), exponent.astype(np.float64)).astype(np.float32)
    plain: FloatArray = np.float32(1) / powers
    factor = np.float32(rope.factor)
    if rope.kind == "linear":
        return (plain / factor).astype(np.float32)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        kept = np.float32(1) - _yarn_ramp(rope, theta, head_dim)
        stretched = np.float32(1) / (factor * powers)
        return (stretched * (np.float32(1) - kept) + plain * kept).astype(np.float32)
    if rope.kind == "factors":
        if len(rope.factors) != head_dim // 2:
            raise ValueError(f"there are {len(rope.factors)} rope factors, {head_dim // 2} are required")
        return (plain / np.array(rope.factors, np.float32)).astype(np.float32)
    return plain


def _llama3(rope: RopeScaling, plain: FloatArray) -> FloatArray:
    """Long waves divided by factor, short ones kept, those between blended."""
    low, high, old = rope.low_freq_factor, rope.high_freq_factor, rope.original_positions
    wave = np.float32(2 * math.pi) / plain
    scaled = np.where(wave > np.float32(old / low), plain / np.float32(rope.factor), plain)
    smooth = (np.float32(old) / wave - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * scaled / np.float32(rope.factor) + smooth * scaled
    between = ~(wave < np.float32(old / high)) & ~(wave > np.float32(old / low))
    result: FloatArray = np.where(between, blended, scaled).astype(np.float32)
    return result


def _yarn_ramp(rope: RopeScaling, theta: float, head_dim: int) -> FloatArray:
    """0 for pairs that turn over beta_fast times in the original context, 1 under beta_slow, linear
    between."""

    def pair_that_turns(times: float) -> float:
        turns = math.log(rope.original_positions / (times * 2 * math.pi))
        return head_dim * turns / (2 * math.log(theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    ramp = np.clip(ramp, 0, 1, out=ramp)
    return ramp


def rope_table(rope: RopeScaling, theta: float, head_dim: int, max_positions: int) -> FloatArray:
    """cos and sin of every position: f32[max_positions, head_dim], cosines first, then sines.

    Angles are position * inv_freq in float32; both halves are multiplied with yarn's attention factor.
    """
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * inv_freq(rope, theta, head_dim)[None, :]
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    if rope.attention_factor != 1:
        table *= np.float32(rope.attention_factor)
    return table


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """0.1 ln(factor) + 1 (1 up to a factor of 1); with mscale and mscale_all_dim the quotient of two such
    terms, their logarithms weighted. transformers uses the two together or not at all."""

    def term(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return term(mscale) / term(mscale_all_dim) if mscale and mscale_all_dim else term(1.0)
