"""RunningTable: what runs, as numpy columns, so that a step is made by slicing and not request by request.

A running request owns a row until it ends or is preempted. Its lists (prompt, answer, pages) stay its own; a
column holds what every step needs of it: a copy that check() holds against the lists, but for `computed`,
which stands here alone. Refuses to know budgets, policies and why a row comes or goes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sharp.request import Request

COLUMNS: dict[str, Any] = {
    "live": np.bool_,  # False: the row is free
    "admission": np.int64,  # which of all that ever got a row this is, from 1; 0: the row is free
    "computed": np.int32,  # tokens planned into steps: Request.num_computed_tokens reads it
    "prompt": np.int32,  # tokens of the prompt
    "known": np.int32,  # tokens whose values are known
    "coming": np.int32,  # tokens that steps in flight sample: their values are not known yet
    "logits_row": np.int32,  # of the latest plan that samples one: where the latest coming token will be
    "limit": np.int32,  # known tokens at which the answer ends with "length"
    "last_token": np.int32,
    "num_pages": np.int32,
    "published": np.int32,  # first pages that were shared with others or offered to the prefix cache
    "num_samples": np.int32,  # that will fork from it
    "temperature": np.float32,
    "top_k": np.int32,  # 0: all
    "top_p": np.float32,
    "seed": np.uint64,
    "num_logprobs": np.int32,  # -1: none
    "has_stop_ids": np.bool_,
    "obeys_eos": np.bool_,
    "request": np.object_,
    "name": np.object_,
}


class RunningTable:
    """Columns of R rows and pages i32[R, P], -1 padded; both grow by doubling and never shrink."""

    live: npt.NDArray[np.bool_]
    admission: npt.NDArray[np.int64]
    computed: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int32]
    known: npt.NDArray[np.int32]
    coming: npt.NDArray[np.int32]
    logits_row: npt.NDArray[np.int32]
    limit: npt.NDArray[np.int32]
    last_token: npt.NDArray[np.int32]
    num_pages: npt.NDArray[np.int32]
    published: npt.NDArray[np.int32]
    num_samples: npt.NDArray[np.int32]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    seed: npt.NDArray[np.uint64]
    num_logprobs: npt.NDArray[np.int32]
    has_stop_ids: npt.NDArray[np.bool_]
    obeys_eos: npt.NDArray[np.bool_]
    request: npt.NDArray[np.object_]
    name: npt.NDArray[np.object_]

    def __init__(self) -> None:
        for name, dtype in COLUMNS.items():
            setattr(self, name, np.zeros(16, dtype))
        self.pages = np.full((16, 8), -1, np.int32)
        self._order = np.zeros(16, np.int32)  # rows by admission; free ones among them if _stale
        self._ordered = 0
        self._stale = False
        self._free = list(range(15, -1, -1))
        self._admissions = 0  # since the start
        self.promised = 0  # samples that will fork from what runs: seats that are taken

    def __len__(self) -> int:
        return len(self.live) - len(self._free)

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """i32[B]: the rows in use, in order of admission."""
        if self._stale:  # once for all that left since the last look
            order = self._order[: self._ordered]
            order = order[self.live[order]]
            self._ordered = len(order)
            self._order[: self._ordered] = order
            self._stale = False
        return self._order[: self._ordered]

    def requests(self) -> list[Request]:
        """What runs, in order of admission."""
        running: list[Request] = self.request[self.rows].tolist()
        return running

    def add(self, request: Request, limit: int, *, computed: int = 0, published: int = 0) -> None:
        """Give the request a row, its `block_ids` in it. limit: known tokens at which it ends; computed:
        tokens whose K and V are in its pages, or will be before its first step; published: as the column."""
        rows = self.rows  # first: the new row may be one that has just left
        if not self._free:
            self._double_rows()
        row, params = self._free.pop(), request.params
        self._order[len(rows)] = row
        self._ordered += 1
        self.live[row] = True
        self._admissions += 1
        self.admission[row] = self._admissions
        self.computed[row], self.published[row] = computed, published
        self.prompt[row], self.known[row] = len(request.prompt_token_ids), request.num_tokens
        self.coming[row] = 0
        self.limit[row], self.last_token[row] = limit, request.last_token
        self.temperature[row], self.seed[row] = params.temperature, request.seed
        self.top_k[row], self.top_p[row] = params.top_k or 0, params.top_p
        self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self.has_stop_ids[row], self.obeys_eos[row] = bool(params.stop_token_ids), not params.ignore_eos
        self.request[row], self.name[row] = request, request.request_id
        self.num_pages[row] = 0
        self.pages[row] = -1
        request.row, request.table = row, self
        self.promise(request)
        pages, request.block_ids = request.block_ids, []
        self.add_pages(request, pages)

    def add_pages(self, request: Request, pages: list[int]) -> None:
        """Append pages to a running request's own, in its list and its row."""
        start = len(request.block_ids)
        request.block_ids = request.block_ids + pages
        stop = len(request.block_ids)
        if stop > self.pages.shape[1]:
            width = max(stop, 2 * self.pages.shape[1]) - self.pages.shape[1]
            self.pages = np.pad(self.pages, ((0, 0), (0, width)), constant_values=-1)
        self.pages[request.row, start:stop] = pages
        self.num_pages[request.row] = stop

    def promise(self, request: Request) -> None:
        """Take note of how many samples are to fork from a running request, now that it has changed."""
        self.promised += len(request.samples) - int(self.num_samples[request.row])
        self.num_samples[request.row] = len(request.samples)

    def remove(self, request: Request) -> None:
        """Free the request's row. Its `block_ids` are left to it."""
        self.promised -= int(self.num_samples[request.row])
        self.num_samples[request.row] = 0
        self.live[request.row], self.admission[request.row] = False, 0
        self.request[request.row] = self.name[request.row] = None
        self._free.append(request.row)
        self._stale = True
        request.row, request.table = -1, None

    def append_tokens(
        self, rows: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32]
    ) -> list[tuple[Request, int]]:
        """A new token for each row, in the answers and the columns; returns (request, token id)."""
        self.known[rows] += 1
        self.last_token[rows] = token_ids
        pairs = list(zip(self.request[rows].tolist(), token_ids.tolist(), strict=True))
        for request, token_id in pairs:
            request.output_token_ids.append(token_id)
        return pairs

    def _double_rows(self) -> None:
        old = len(self.live)
        for name, dtype in COLUMNS.items():
            column = np.zeros(2 * old, dtype)
            column[:old] = getattr(self, name)
            setattr(self, name, column)
        self.pages = np.pad(self.pages, ((0, old), (0, 0)), constant_values=-1)
        self._order = np.pad(self._order, (0, old))
        self._free = list(range(2 * old - 1, old - 1, -1))

    def check(self) -> None:
        """Raise AssertionError unless columns and requests agree."""
        rows = self.rows
        assert self.promised == sum(len(request.samples) for request in self.requests()), "seats"
        assert len(set(rows.tolist())) == len(rows) == len(self) == self.live.sum(), "rows are lost"
        for row, request in zip(rows.tolist(), self.requests(), strict=True):
            name = request.request_id
            assert request.table is self, f"{name} does not know its table"
            assert request.row == row, f"{name} does not know its row"
            assert self.name[row] == name, f"{name}: name"
            assert self.prompt[row] == len(request.prompt_token_ids), f"{name}: prompt"
            assert self.known[row] == request.num_tokens, f"{name}: known tokens"
            assert self.last_token[row] == request.last_token, f"{name}: last token"
            assert self.num_samples[row] == len(request.samples), f"{name}: samples"
            known = self.known[row] + max(0, self.coming[row] - 1)  # the latest coming token is not computed
            assert self.computed[row] <= known, f"{name}: more computed than known"
            assert self.seed[row] == request.seed, f"{name}: seed"
            assert self.top_k[row] == (request.params.top_k or 0), f"{name}: top-k"
            assert self.top_p[row] == np.float32(request.params.top_p), f"{name}: top-p"
            pages = self.pages[row]
            assert pages[pages >= 0].tolist() == request.block_ids, f"{name}: pages"
            assert self.num_pages[row] == len(request.block_ids), f"{name}: number of pages"
