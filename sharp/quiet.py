"""Runs of steps that give each running sequence one token and nothing else, taken at once: for a simulator.

Knows when a step can only be like the one before it. Refuses to know time, and what a token is.
"""

from __future__ import annotations

from sharp.scheduler import Scheduler


def quiet_steps(scheduler: Scheduler) -> int:
    """How many steps behind those in flight are quiet, whatever waits: none ends, so nothing that waits can
    come in. 0 where a step may differ, or pages be missing."""
    config, table, rows = scheduler.config, scheduler.table, scheduler.table.rows
    if config.admission != "reserve" or not len(rows):
        return 0
    if config.prefix_caching or scheduler.pages.forks.copies:  # pages are published, copied on the way
        return 0
    ahead = table.known[rows] + table.coming[rows]
    if (ahead - table.computed[rows] != 1).any():
        return 0
    return max(0, int((table.limit[rows] - ahead).min()) - 1)


def skip(scheduler: Scheduler, steps: int, token_id: int) -> None:
    """What `steps` plans and commits of `token_id` for each running sequence would come to.

    Raises ValueError for more than quiet_steps(), and with a step in flight.
    """
    quiet = quiet_steps(scheduler)
    if scheduler.flights or not 0 <= steps <= quiet:
        raise ValueError(f"{steps} steps cannot be skipped; {0 if scheduler.flights else quiet} are quiet")
    table, rows = scheduler.table, scheduler.table.rows
    table.computed[rows] += steps
    table.known[rows] += steps
    table.last_token[rows] = token_id
    for request in scheduler.running:
        request.output_token_ids.extend([token_id] * steps)
    scheduler.step += steps
