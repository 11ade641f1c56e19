"""Steps in flight: planned, neither committed nor rolled back. Two at most, in the order of planning.

A step may be planned while the one before it still runs. A sequence that was sampled there goes on with a
token whose value the host does not know: BatchPlan.token_ids holds ~r for the id sampled in logits row r of
the plan before. `table.coming` counts such tokens of each row, `table.logits_row` says where the latest is.

What ends or is preempted while its steps are in flight loses its row and its pages at once, and both may be
another's in the next plan. Rows are told apart by their number of admission. Pages need no care: a device
runs steps in the order of planning, so a step in flight has read and written its pages before a later one
writes there, and whoever gets a page reads only what it has written itself, or what was published. A page is
published when the step that filled it is committed; a later step of the same sequence writes behind it.
Refuses to know why a step is committed or undone.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharp.plan import BatchPlan, Int32
from sharp.running import RunningTable

MOST = 2  # one that runs, and one behind it


@dataclass(frozen=True, eq=False)
class Flight:
    """A plan of B sequences and R logits rows, and whose rows of the table it was made of."""

    plan: BatchPlan
    rows: Int32  # [B] the table's row of each sequence
    sampled: Int32  # [R] the sequence of each logits row
    admissions: npt.NDArray[np.int64]  # [B] of the rows, when it was planned

    def alive(self, table: RunningTable) -> npt.NDArray[np.bool_]:
        """bool[B]: which sequences still have their row."""
        same: npt.NDArray[np.bool_] = table.admission[self.rows] == self.admissions
        return same


class Flights:
    """The steps in flight over the rows of `table`, oldest first."""

    def __init__(self, table: RunningTable) -> None:
        self._table = table
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def plans(self) -> tuple[BatchPlan, ...]:
        return tuple(flight.plan for flight in self._flights)

    def add(self, plan: BatchPlan, rows: Int32, sampled: Int32) -> None:
        """A plan takes off: its tokens count as computed, those it samples are coming."""
        table, own = self._table, rows[sampled]
        table.computed[rows] = plan.context_lens
        table.coming[own] += 1
        table.logits_row[own] = np.arange(len(own), dtype=np.int32)
        self._flights.append(Flight(plan, rows, sampled, table.admission[rows]))

    def oldest(self, plan: BatchPlan) -> Flight:
        """The flight of a plan that is the next to land. Raises ValueError for any other."""
        if not self._flights or self._flights[0].plan is not plan:
            raise ValueError(f"the plan of step {plan.step} is not the {self._which('oldest')} in flight")
        return self._flights[0]

    def land(self, plan: BatchPlan) -> npt.NDArray[np.bool_]:
        """The oldest plan has happened; returns bool[B], which of its sequences still have their row."""
        flight = self.oldest(plan)
        self._flights.popleft()
        alive = flight.alive(self._table)
        self._table.coming[self._own(flight, alive)] -= 1
        return alive

    def undo(self, plan: BatchPlan) -> tuple[Flight, npt.NDArray[np.bool_]]:
        """The newest plan will not happen: lengths are as before it. Returns it, and which of its sequences
        still have their row. Raises ValueError for any other plan."""
        if not self._flights or self._flights[-1].plan is not plan:
            raise ValueError(f"the plan of step {plan.step} is not the {self._which('newest')} in flight")
        flight, table = self._flights.pop(), self._table
        alive = flight.alive(table)
        table.computed[flight.rows[alive]] -= plan.counts[alive]
        table.coming[self._own(flight, alive)] -= 1
        for before in self._flights:  # its ids are the latest again
            own = before.rows[before.sampled]
            table.logits_row[own] = np.arange(len(own), dtype=np.int32)
        return flight, alive

    def _own(self, flight: Flight, alive: npt.NDArray[np.bool_]) -> Int32:
        own: Int32 = flight.rows[flight.sampled[alive[flight.sampled]]]
        return own

    def _which(self, end: str) -> str:
        return f"{end} one" if len(self._flights) > 1 else "one"

    def check(self) -> None:
        """Raise AssertionError unless the table counts what is in flight."""
        assert len(self._flights) <= MOST, "too many steps in flight"
        coming: Counter[int] = Counter()
        for flight in self._flights:
            coming.update(self._own(flight, flight.alive(self._table)).tolist())
        rows = self._table.rows
        assert self._table.coming[rows].tolist() == [coming[row] for row in rows.tolist()], "coming tokens"
