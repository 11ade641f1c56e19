"""The table of what runs: rows and columns follow the requests, and plan() is as fast as it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_times import CASES, measure
from test_scheduler import prompt_of, request

from sharp.request import Request
from sharp.running import RunningTable

PLAN_US = {"256+1000": 150, "256+1000 pages": 150, "1024": 400}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 12)), max_size=80))
def test_rows_follow_requests(moves: list[tuple[bool, int, int]]) -> None:
    """Requests come, grow and go in any order, past the first size of the table in both directions."""
    table, inside = RunningTable(), list[Request]()
    for number, (comes, which, pages) in enumerate(moves):
        if comes:
            item = request(f"r{number}", prompt_of(1 + which, number))
            item.block_ids = list(range(pages))
            table.add(item, 99)
            inside.append(item)
        elif inside:
            gone = inside.pop(which % len(inside))
            table.remove(gone)
            assert (gone.table, gone.row, gone.num_computed_tokens) == (None, -1, 0)
        if inside:
            table.add_pages(inside[which % len(inside)], [100 + number])
        rows = table.rows[::2]
        table.append_tokens(rows, np.arange(len(rows), dtype=np.int32))
        table.check()
        assert table.requests() == inside
        assert len(table) == len(inside)


@pytest.mark.parametrize("column", ["known", "last_token", "num_pages", "seed", "name", "prompt"])
def test_check_sees_a_wrong_column(column: str) -> None:
    table = RunningTable()
    for name in "abc":
        table.add(request(name, prompt_of(5)), 99)
    table.check()
    getattr(table, column)[1] = "other" if column == "name" else 77
    with pytest.raises(AssertionError, match="b: "):
        table.check()


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize("case", CASES)
def test_plan_is_in_time(case: str, ahead: bool) -> None:
    """CPU time, the least of many rounds: what else runs on the machine hardly counts."""
    assert measure(*CASES[case], rounds=200, ahead=ahead)["plan cpu"] < PLAN_US[case]
