"""Token buckets: the sizes that steps are launched for, so that a few graphs serve every step.

Knows: counts of tokens and sequences. Refuses to know: graphs, devices, what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sharp.plan import BatchPlan

SMALLEST_MIXED = 16  # tokens: a prompt chunk's bucket
# What a block walks meanwhile, in keys of a decode (9 to 11 ns each on an H100): while one launch more is
# made and waited for; while all SMs read KEYS keys of decodes; while they compute PAIRS pairs of a chunk's
# query and a key that it sees. Measured at 32/8 heads of 64 and 28/4 of 128, which differ by a sixth.
LAUNCH_KEYS, KEYS, PAIRS = 1024, 16, 300
Decodes = Literal["ride", "apart", "either"]


@dataclass(frozen=True, order=True)
class Bucket:
    """A step of up to `tokens` tokens of up to `seqs` sequences, a logits row each. mixed: it may hold
    sequences of several tokens; else all are decodes. A layer has one launch of attention: decode's where all
    are decodes, else prefill's, in which a decode is a chunk of one token. apart: both, decode's for the
    decodes of a mixed step."""

    mixed: bool
    tokens: int
    seqs: int
    apart: bool = False

    @property
    def decodes(self) -> int:
        """Sequences that decode attention is launched for."""
        return self.seqs if self.apart or not self.mixed else 0

    @property
    def chunks(self) -> int:
        """Sequences that prefill attention is launched for."""
        return self.seqs if self.mixed else 0

    def __str__(self) -> str:
        return f"{'mixed' if self.mixed else 'decode'} {self.tokens}{' apart' if self.apart else ''}"


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Tokens of the buckets for steps of up to `most`: 1, 2, 4, 8, then every half and whole of a power of
    two between 16 and it (16, 24, 32, 48, 64, ...), `most` itself last. ValueError for less than 1.

    Launches are sized by the bucket, and tiles past the real count leave at once, so what a bucket has too
    much costs blocks that come and go, less than a tenth of a microsecond each on an SM: a third more of them
    is little, and twice as many sizes would be twice the graphs to capture and keep. Below 16 tokens the
    steps are short enough for single blocks to show; there it is every power of two.
    """
    if most < 1:
        raise ValueError(f"a bucket for {most} tokens; at least 1 is required")
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        if size >= 16 and size * 3 // 2 < most:
            sizes.append(size * 3 // 2)
        size *= 2
    return (*sizes, most)


def rides(plan: BatchPlan) -> bool:
    """Whether a mixed step's decodes ride in the chunks' launch of attention, as chunks of one token: where
    the longest of them, which one block walks alone, is hidden by the rest. No bit depends on it."""
    decodes = plan.num_decodes
    keys = plan.context_lens[:decodes]
    longest = int(keys.max(initial=0))
    if longest <= LAUNCH_KEYS:
        return True
    lens, queries = plan.context_lens[decodes:].astype(np.int64), np.diff(plan.cu_seqlens_q[decodes:])
    pairs = int((queries * lens - queries * (queries - 1) // 2).sum())
    return longest <= LAUNCH_KEYS + int(keys.sum()) // KEYS + pairs // PAIRS


class Buckets:
    """The buckets of an engine: decodes of up to max_seqs sequences, mixed steps of up to max_tokens tokens.

    A mixed step is never launched for fewer than 16 tokens: no tile of a GEMM has fewer rows.
    """

    def __init__(self, max_tokens: int, max_seqs: int, decodes: Decodes = "ride") -> None:
        """decodes: of a mixed step, whether they ride in the chunks' launch of attention, have one of their
        own, or (either) as rides() says."""
        self.max_tokens, self.max_seqs, self.decodes = max_tokens, max_seqs, decodes
        self.decode = tuple(Bucket(False, size, size) for size in bucket_sizes(max_seqs))
        mixed = [size for size in bucket_sizes(max_tokens) if size >= min(SMALLEST_MIXED, max_tokens)]
        self.mixed = tuple(Bucket(True, size, min(size, max_seqs)) for size in mixed)
        # A decode beside a chunk: three tokens of two sequences.
        some = decodes != "ride" and max_tokens >= 3 and max_seqs >= 2
        self.apart = tuple(replace(bucket, apart=True) for bucket in self.mixed) if some else ()

    def all(self) -> tuple[Bucket, ...]:
        """Every bucket, the largest first: what it needs, all need."""
        return (*reversed(self.mixed), *reversed(self.apart), *reversed(self.decode))

    def of(self, plan: BatchPlan) -> Bucket:
        """The smallest bucket that holds a plan. ValueError for one that is larger than all."""
        tokens, seqs, decodes = plan.num_tokens, plan.num_seqs, plan.num_decodes
        buckets = self.mixed if decodes < seqs else self.decode
        if 0 < decodes < seqs and self.apart and (self.decodes == "apart" or not rides(plan)):
            buckets = self.apart
        for bucket in buckets:
            if tokens <= bucket.tokens and seqs <= bucket.seqs:
                return bucket
        raise ValueError(
            f"a step of {tokens} tokens and {len(plan.logits_rows)} logits rows, of {seqs} "
            f"sequences, is over the {self.max_tokens} tokens and {self.max_seqs} sequences of the workspace"
        )
