"""`sharp probe`: what was measured, and the options that follow, as text or one JSON object."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from sharp.cli.errors import bad_input, say
from sharp.config import EngineConfig
from sharp.curves import StepCurve
from sharp.info import show_bytes
from sharp.probe import Probe, Proposal
from sharp.probe_cache import get_probe


def probe_command(
    model: str, config: EngineConfig, target_itl_ms: float | None, fresh: bool, as_json: bool
) -> dict[str, Any] | None:
    """Probe, or read what is kept; print the report, or return what --json prints.

    CommandError for a latency target that is no number of milliseconds or cannot be met.
    """
    probe = get_probe(
        model, config, fresh=fresh, say=lambda text: say(f"sharp: {text}"), progress=sys.stderr.isatty()
    )
    with bad_input():
        proposal = probe.propose(target_itl_ms)
    if as_json:
        found: dict[str, Any] = msgspec.to_builtins(probe)
        return found | {"budget": probe.budget.as_json(), "proposal": msgspec.to_builtins(proposal)}
    print(probe_text(probe, proposal))
    return None


def probe_text(probe: Probe, proposal: Proposal) -> str:
    """The report for people."""
    kept = f"kept from {probe.date}" if probe.from_cache else f"measured in {probe.seconds:.1f} s"
    lines = [
        f"{probe.model} on {probe.device}, {probe.dtype} ({kept})",
        f"memory: {show_bytes(probe.free)} free of {show_bytes(probe.total)} before loading",
        "",
        str(probe.budget),
        f"{probe.num_blocks:,} pages of {probe.block_size} tokens, {probe.kv_bytes_per_token:,} bytes each",
        "",
        *_table("prefill: ms of a step of one prompt's chunk", "tokens", probe.prefill),
        "",
        *_table("decode: ms of a step of one token for each sequence", "sequences", probe.decode),
        "the engine itself: {:.0f} us and {:.1f} us a sequence before a step, {:.0f} and {:.1f} after".format(
            *(1e6 * s for s in probe.host_s)
        ),
        *(f"left out: {why}" for why in probe.curves.skipped),
        "",
        "copies, GB/s",
        *(
            f"  {row['way']:<28}{show_bytes(row['bytes']):>12}{row['bytes_per_s'] / 1e9:>10.1f}"
            for row in probe.copies
        ),
        "",
        f"max_num_batched_tokens {proposal.max_num_batched_tokens}, max_num_seqs {proposal.max_num_seqs}: "
        f"{proposal.why}",
    ]
    return "\n".join(lines)


def _table(title: str, what: str, curve: StepCurve) -> list[str]:
    measured = {(tokens, context): seconds for tokens, context, seconds in curve.points}
    head = "".join(f"{f'context {context}':>14}" for context in curve.contexts)
    lines = [title, f"  {what:>10}{head}{'tokens/s':>12}"]
    for tokens in curve.tokens:
        cells = "".join(
            f"{measured[tokens, c] * 1e3:>14.2f}" if (tokens, c) in measured else f"{'-':>14}"
            for c in curve.contexts
        )
        first = next(measured[tokens, c] for c in curve.contexts if (tokens, c) in measured)
        lines.append(f"  {tokens:>10}{cells}{tokens / first:>12,.0f}")
    return lines
