"""What the L2 cache should keep: policies for the _hint forms of loads, stores, TMA copies (PTX ISA,
"createpolicy", sm_80).

Data that is read once (weights of a decode step) goes first, so that what is read again (activations, pages
shared by requests) stays. A policy is a 64-bit value: make it once, outside the loop.
"""

from __future__ import annotations

from typing import Any

from kernels_numba.ptx.asm import instruction


def _policy(priority: str, what: str) -> Any:
    return instruction(
        f"policy_{priority}", f"createpolicy.fractional.L2::{priority}.b64 $0, 1.0;", "", "l",
        doc=f"The policy {what} (createpolicy.fractional).", memory=False, volatile=False,
    )  # fmt: skip


policy_evict_first = _policy("evict_first", "of lines to be dropped before others")
policy_evict_last = _policy("evict_last", "of lines to be dropped after others")
policy_evict_normal = _policy("evict_normal", "of lines like any other, for where a policy must be given")
